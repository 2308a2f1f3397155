-- Sessions of this database that wait for a lock, and each session they wait for, longest first: at most $1 pairs.
-- A session waiting for a row holds or awaits a lock on the row's place, which names the partition. Process 0 is a prepared
-- transaction; its name stands in the last column.
select w.pid, w.application_name, extract(epoch from clock_timestamp() - coalesce(l.waitstart, w.query_start))::float8 as waited,
       l.locktype, t.name, p.partition, w.query,
       b.pid, coalesce(a.usename, x.owner)::text, a.application_name, a.state,
       extract(epoch from clock_timestamp() - coalesce(a.xact_start, x.prepared))::float8, a.query, x.gid
from pg_stat_activity w
join pg_locks l on l.pid = w.pid and not l.granted
cross join lateral (select distinct u.pid from unnest(pg_blocking_pids(w.pid)) u(pid)) b
left join pg_stat_activity a on a.pid = b.pid
left join pg_prepared_xacts x on b.pid = 0 and x.transaction = l.transactionid
left join lateral (
    select format('(%s,%s)', k.page, k.tuple)::tid as place
    from pg_locks k
    where k.pid = w.pid and k.locktype = 'tuple' and k.relation = 'tidemark.topic_partitions'::regclass
    limit 1
) r on true
left join tidemark.topic_partitions p on p.ctid = r.place
left join tidemark.topics t on t.id = p.topic_id
where w.datname = current_database() and w.wait_event_type = 'Lock'
order by waited desc, w.pid, b.pid
limit $1::int
