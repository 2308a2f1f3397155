-- name: describe_topics
-- Topics with the sums over their partitions (at most what 64 bits hold), by name: $1 names, null for all of them.
select t.name, t.id, t.created_at, t.retention_ms, t.retention_bytes, t.partitions,
       coalesce(least(sum(p.start_offset), 9223372036854775807), 0)::bigint as start_offsets,
       coalesce(least(sum(p.end_offset), 9223372036854775807), 0)::bigint as end_offsets,
       coalesce(min(p.end_offset), 0) as min_end_offset, coalesce(max(p.end_offset), 0) as max_end_offset,
       coalesce(least(sum(p.byte_size), 9223372036854775807), 0)::bigint as byte_size
from tidemark.topics t
left join tidemark.named_partitions p on p.topic = t.name
where $1::text[] is null or t.name = any ($1::text[])
group by t.id
order by t.name;

-- name: describe_partitions
-- Partitions with their backlog: $1 topic names, null for all; $2 count a partition's events up to this number; $3 only those
-- with a backlog. `lag` is how many seconds ago the oldest pending event was committed.
with backlog as materialized (
    select b.partition_id, b.events, b.committed_at
    from (
        select array_agg(p.id) as ids
        from tidemark.topic_partitions p
        join tidemark.topics t on t.id = p.topic_id
        where $1::text[] is null or t.name = any ($1::text[])
    ) a
    cross join lateral tidemark.pending(a.ids, $2::int, null) b
)
select n.topic, n.partition, n.partition_id, n.start_offset, n.end_offset, n.byte_size, coalesce(b.events, 0) as backlog,
       case when b.committed_at is not null then
           greatest(extract(epoch from clock_timestamp() - b.committed_at), 0)::float8
       end as lag
from tidemark.named_partitions n
left join backlog b on b.partition_id = n.partition_id
where ($1::text[] is null or n.topic = any ($1::text[])) and (b.events > 0 or not $3::boolean)
order by n.topic, n.partition;

-- name: read_leftovers
-- What waits to be deleted, each counted up to 100,000: partitions of deleted topics, and objects in storage.
select (select count(*) from (select from tidemark.deleted_partitions d where d.purged_at is null limit 100000) p) as partitions,
       (select count(*) from (select from tidemark.dead_objects o limit 100000) k) as objects;

-- name: read_dispatch
-- How far fan-out got: seconds since it last had something to do, seconds since the oldest commit it has not seen (null for
-- none), and whether the database is in the cluster its log speaks of.
select greatest(extract(epoch from clock_timestamp() - f.seen_at), 0)::float8 as last,
       case when u.committed_at is not null then
           greatest(extract(epoch from clock_timestamp() - u.committed_at), 0)::float8
       end as undispatched,
       coalesce((select c.system_identifier from tidemark.cluster c) = k.system_identifier, false) as own_cluster
from (select n.* from tidemark.fan_outs n order by n.id desc limit 1) f
cross join pg_control_system() k
cross join lateral (
    select least(
        (select o.committed_at
         from tidemark.objects o
         where o.tx > f.seen_tx
         order by o.tx
         limit 1),
        (select min(o.committed_at)
         from tidemark.objects o
         where o.tx = any (f.in_flight))
    ) as committed_at
) u;

-- name: find_holders
-- What is open and holds something up, the oldest first: $1 rows at most. Transactions that have an id, in any database: what
-- they commit comes late, and passes remember them until they end. And what keeps dead rows of this database from vacuum:
-- sessions with a snapshot, prepared transactions, standbys with feedback, replication slots (those without a reader keep the
-- write-ahead log, too). `seconds` of standbys and slots, which no transaction began: the age of the oldest commit that they
-- do not see.
select h.kind, h.name, h.database, h.owner as "user", h.application, h.state, h.has_id,
       extract(epoch from clock_timestamp() - coalesce(h.since, (
           select o.committed_at
           from tidemark.objects o
           where h.held is not null and o.tx > (select c.tx_base from tidemark.cluster c)
               + pg_snapshot_xmax(pg_current_snapshot())::text::bigint - h.held
           order by o.tx
           limit 1
       )))::float8 as seconds,
       regexp_replace(h.query, '^/\*\+[^*]*\*/\s*', '') as query
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
limit $1::int;

-- name: find_lock_waits
-- Sessions of this database that wait for a lock, and each session they wait for, longest first: at most $1 pairs.
-- A session waiting for a row holds or awaits a lock on the row's place, which names the partition. Process 0 is a prepared
-- transaction; its name stands in the last column. Queries are shown without the hint in front of some of ours.
select w.pid, w.application_name as application,
       extract(epoch from clock_timestamp() - coalesce(l.waitstart, w.query_start))::float8 as waited,
       l.locktype as lock, t.name as topic, p.partition, regexp_replace(w.query, '^/\*\+[^*]*\*/\s*', '') as query,
       b.pid as blocker_pid, coalesce(a.usename, x.owner)::text as blocker_user, a.application_name as blocker_application,
       a.state as blocker_state,
       extract(epoch from clock_timestamp() - coalesce(a.xact_start, x.prepared))::float8 as blocker_age,
       regexp_replace(a.query, '^/\*\+[^*]*\*/\s*', '') as blocker_query, x.gid as blocker_gid
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
limit $1::int;

-- name: find_row_locks
-- Who holds the rows of partitions $1, the oldest first, $2 holders at most. Workers pass over what is locked, so nobody need
-- wait. The row's xmax is the transaction that locked it, or stands for several that share it; each holds a lock on its own id
-- until it ends, which everybody may see. Process 0 is a prepared transaction.
select coalesce(h.pid, 0) as pid, coalesce(a.usename, x.owner)::text as "user", a.application_name as application, a.state,
       extract(epoch from clock_timestamp() - coalesce(a.xact_start, x.prepared))::float8 as age,
       regexp_replace(a.query, '^/\*\+[^*]*\*/\s*', '') as query, x.gid, h.partition_ids
from (
    select l.pid, case when l.pid is null then l.transactionid::text end as prepared, array_agg(distinct i.id) as partition_ids
    from (
        select p.xmax, array_agg(p.id) as ids
        from tidemark.topic_partitions p
        where p.id = any ($1::int[])
        group by p.xmax
    ) r
    join pg_database d on d.datname = current_database()
    cross join lateral (
        select r.xmax as xid
        union all
        -- The numbers that stand for several are counted apart: only one that was given, and is not forgotten, may be asked.
        select m.xid
        from pg_get_multixact_members(case when mxid_age(r.xmax) between 1 and mxid_age(d.datminmxid) then r.xmax end) m
        where m.mode <> 'keysh'
    ) x
    join pg_locks l on l.transactionid = x.xid and l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted
    cross join unnest(r.ids) i(id)
    group by 1, 2
) h
left join pg_stat_activity a on a.pid = h.pid
left join pg_prepared_xacts x on x.transaction::text = h.prepared
order by coalesce(a.xact_start, x.prepared), h.pid
limit $2::int;

-- name: figures_topics
-- Figures by topic, the $1 oldest topics by name and all others together under null: topics and partitions; every record that
-- got an offset, records and bytes kept; partitions and events that wait (counted up to $2 in all), age of the oldest in
-- seconds, partitions whose oldest is older than $3 seconds; records that no audit has read, and when one last read some, in
-- seconds since the epoch. Some descents for each partition, and what is counted.
with backlog as materialized (
    select b.partition_id, b.events, extract(epoch from clock_timestamp() - b.committed_at)::float8 as age
    from (select array_agg(p.id) as ids from tidemark.topic_partitions p) a
    cross join lateral tidemark.pending(a.ids, $2::int, $2::int) b
)
select l.name, count(distinct l.id) as topics, count(p.partition_id) as partitions,
       coalesce(least(sum(p.end_offset), 9223372036854775807), 0)::bigint as end_offsets,
       coalesce(least(sum(p.end_offset - p.start_offset), 9223372036854775807), 0)::bigint as records,
       coalesce(least(sum(p.byte_size), 9223372036854775807), 0)::bigint as bytes,
       count(b.events) as waiting, coalesce(sum(b.events), 0)::bigint as events, greatest(max(b.age), 0)::float8 as lag,
       count(*) filter (where b.age > $3::float8) as overdue,
       coalesce(least(sum(greatest(p.end_offset - greatest(d.audited_to, p.start_offset), 0)), 9223372036854775807), 0)::bigint
           as unaudited,
       extract(epoch from max(d.audited_at))::float8 as audited_at
from (
    select t.id, t.name as topic, case when row_number() over (order by t.created_at, t.id) <= $1::int then t.name end as name
    from tidemark.topics t
) l
left join tidemark.named_partitions p on p.topic = l.topic
left join backlog b on b.partition_id = p.partition_id
left join tidemark.audit_progress d on d.partition_id = p.partition_id
group by l.name;

-- name: figures_tables
-- Tidemark's tables: bytes on disk without indexes, live and dead rows as the statistics estimate them.
select s.relname::text as name, pg_table_size(s.relid) as bytes, s.n_live_tup as live_rows, s.n_dead_tup as dead_rows
from pg_stat_user_tables s
where s.schemaname = 'tidemark'
order by s.relname;

-- name: figures_indexes
-- Tidemark's indexes and their bytes on disk.
select s.relname::text as "table", s.indexrelname::text as name, pg_relation_size(s.indexrelid) as bytes
from pg_stat_user_indexes s
where s.schemaname = 'tidemark'
order by s.relname, s.indexrelname;

-- name: figures_connections
-- Sessions of this database by state, Tidemark's and others', and how many the server admits in all.
select a.application_name = 'tidemark' as ours, coalesce(a.state, 'unknown') as state, count(*) as sessions,
       current_setting('max_connections')::int as allowed
from pg_stat_activity a
where a.datname = current_database() and a.backend_type = 'client backend'
group by 1, 2;
