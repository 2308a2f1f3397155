-- What is open and holds something up, the oldest first: $1 rows at most. Transactions that have an id, in any database: what
-- they commit comes late, and passes remember them until they end. And what keeps dead rows of this database from vacuum:
-- sessions with a snapshot, prepared transactions, standbys with feedback, replication slots (those without a reader keep the
-- write-ahead log, too). `seconds` of standbys and slots, which no transaction began: the age of the oldest commit that they
-- do not see.
select h.kind, h.name, h.database, h.owner, h.application, h.state, h.has_id,
       extract(epoch from clock_timestamp() - coalesce(h.since, (
           select o.committed_at
           from tidemark.objects o
           where h.held is not null and o.tx > (select c.tx_base from tidemark.cluster c)
               + pg_snapshot_xmax(pg_current_snapshot())::text::bigint - h.held
           order by o.tx
           limit 1
       )))::float8 as seconds,
       h.query
from (
    select case when a.backend_type = 'walsender' then 'standby' else 'session' end as kind, a.pid::text as name,
           a.datname::text as database, a.usename::text as owner, a.application_name as application, a.state,
           a.backend_xid is not null as has_id, a.xact_start as since, age(a.backend_xmin) as held, a.query
    from pg_stat_activity a
    -- A vacuum waits for no other one; parallel workers have what their leader has.
    where a.pid <> pg_backend_pid() and a.backend_type not in ('autovacuum worker', 'parallel worker')
      and (a.backend_xid is not null
           or a.backend_xmin is not null and (a.datname = current_database() or a.backend_type = 'walsender'))
    union all
    select 'prepared transaction', x.gid, x.database::text, x.owner::text, null, null, true, x.prepared, null, null
    from pg_prepared_xacts x
    union all
    select 'replication slot', s.slot_name::text, s.database::text, null, null,
           case when s.active then 'active' else 'inactive' end, false, null, greatest(age(s.xmin), age(s.catalog_xmin)), null
    from pg_replication_slots s
    where not s.active or s.xmin is not null or s.catalog_xmin is not null
) h
order by seconds desc nulls last, h.kind, h.name
limit $1::int
