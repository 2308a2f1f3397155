-- Open transactions that cursors have passed and keep an eye on, oldest first: at most $1. What these commit gets its offsets
-- when they end; until then every materialization of these partitions looks for it.
with held as materialized (
    select x.xid, count(*) as partitions
    from tidemark.topic_partitions p
    cross join unnest(p.in_flight) x(xid)
    group by x.xid
)
select h.xid::text, h.partitions, a.pid, a.datname::text, a.usename::text, a.application_name, a.state,
       extract(epoch from clock_timestamp() - a.xact_start)::float8 as age, a.query, null as gid
from held h
join pg_stat_activity a on a.backend_xid = h.xid::xid
union all
select h.xid::text, h.partitions, null, x.database::text, x.owner::text, null, 'prepared',
       extract(epoch from clock_timestamp() - x.prepared)::float8, null, x.gid
from held h
join pg_prepared_xacts x on x.transaction = h.xid::xid
order by age desc nulls last
limit $1::int
