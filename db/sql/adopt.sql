-- name: adopt_settings
-- In every transaction of an adoption: it reads the whole of the seed's tables in some, which may take longer than a statement of
-- the hot paths ever should. It does not wait long for the seed's programs: they have to be stopped. What it wrote is durable
-- before the next step begins.
select set_config(s.name, case s.name when 'lock_timeout' then '10s' else '0' end, true)
from pg_settings s
where s.name in ('lock_timeout', 'statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout')
union all
select set_config('synchronous_commit', 'on', true)
where current_setting('synchronous_commit') in ('off', 'local');

-- name: adopt_reading
-- In those that read all of the seed: what its tables hold is joined as a whole. Statistics may be missing, and those of what
-- was written just now are; a nested loop chosen by them would compare each batch with each partition.
select set_config('enable_nestloop', 'off', true), set_config('jit', 'off', true), set_config('work_mem', '64MB', true);

-- name: lock_adoption
-- One adoption at a time in a database: $1 the lock's number. The session has it until it ends or unlocks.
select pg_try_advisory_lock($1::bigint);

-- name: unlock_adoption
-- $1 the lock's number.
select pg_advisory_unlock($1::bigint);

-- name: discard_temporary
-- Drops the views and tables that an adoption made in its session.
discard temp;

-- name: find_seed
-- The seed's tables in schema $1, in the order in which they are locked: which there are, the columns that are missing, and the
-- statements that lock each, and show it as a view of this session with the same columns whichever release of the seed wrote it.
-- Run what it returns with \gexec. A column that some releases lack has what stands in for it, and what that needs.
with relation as materialized (
    select w.*, r.name, r.columns
    from (values
        (1, 'topics', array['topic_v2', 'topics']),
        (2, 'partitions', array['topic_partitions']),
        (3, 'batches', array['record_batch_v2', 'record_batches']),
        (4, 'events', array['record_batch_events'])
    ) w(n, role, names)
    left join lateral (
        select format('%I.%I', s.nspname, c.relname) as name,
               array(
                   select a.attname from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
               ) as columns
        from unnest(w.names) with ordinality u(name, n)
        join pg_namespace s on s.nspname = $1::text
        join pg_class c on c.relnamespace = s.oid and c.relname = u.name and c.relkind in ('r', 'p')
        order by u.n
        limit 1
    ) r on true
),
field(n, roles, name, source, instead, needs, type) as (values
    (1, '{topics,events}'::text[], 'id', 'id', null, null, null),
    (2, '{topics}', 'name', 'name', null, null, '::text'),
    (3, '{partitions,batches,events}', 'topic_id', 'topic_id', null, null, null),
    (4, '{partitions,batches,events}', 'partition', 'partition', null, null, '::bigint'),
    (5, '{partitions,batches}', 'start_offset', 'start_offset', null, null, '::bigint'),
    (6, '{partitions}', 'end_offset', 'end_offset', null, null, '::bigint'),
    (7, '{batches}', 'n_records', 'n_records', 's.end_offset - s.start_offset', 'end_offset', '::bigint'),
    (8, '{events}', 'n_records', 'n_records', null, null, '::bigint'),
    (9, '{batches,events}', 'key', 's3_key', null, null, '::text collate "C"'),
    (10, '{batches,events}', 'byte_offset', 'byte_offset', '0', null, '::bigint'),
    (11, '{batches,events}', 'byte_length', 'byte_length', '0', null, '::bigint'),
    (12, '{batches,events}', 'max_timestamp', 'max_timestamp', '-1', null, '::bigint'),
    (13, '{events}', 'processed', 'processed', null, null, '::boolean'),
    (14, '{topics,batches,events}', 'created_at', 'created_at', 'null', null, '::timestamptz'),
    (15, '{topics,partitions,batches,events}', 'deleted_at', 'deleted_at', 'null', null, '::timestamptz')
)
select r.names, r.name as relation,
       coalesce(array_agg(f.source order by f.n) filter (
           where not e.is_there and (f.instead is null or f.needs is not null and f.needs <> all (r.columns))), '{}') as missing,
       format('lock table %s in share mode', r.name) as lock,
       format('create temporary view seed_%s as select %s from %s s', r.role, string_agg(
           format('(%s)%s as %I', case when e.is_there then format('s.%I', f.source) else f.instead end, f.type, f.name),
           ', ' order by f.n), r.name) as view
from relation r
join field f on r.role = any (f.roles)
cross join lateral (select f.source = any (r.columns) as is_there) e
group by r.n, r.role, r.names, r.name
order by r.n;

-- name: create_seed_rows
-- What is to be adopted, from the views of find_seed: the batches that have an offset, and the events that have none yet. Left
-- out are batches without records, which have no offset, and those before the start of their log. What the seed has marked as
-- deleted is not there.
create temporary view seed_rows as
with home as (
    select t.name as topic, p.topic_id, p.partition, p.start_offset
    from pg_temp.seed_partitions p
    join pg_temp.seed_topics t on t.id = p.topic_id
    where t.deleted_at is null and p.deleted_at is null
)
select h.topic, h.partition, false as is_pending, b.start_offset, b.n_records, b.key, b.byte_offset, b.byte_length,
       coalesce(b.max_timestamp, -1) as max_timestamp, b.created_at, null as id
from home h
join pg_temp.seed_batches b on b.topic_id = h.topic_id and b.partition = h.partition
where b.deleted_at is null and b.n_records is distinct from 0
  and (b.n_records <= h.start_offset - b.start_offset) is not true
union all
select h.topic, h.partition, true, null, e.n_records, e.key, e.byte_offset, e.byte_length, coalesce(e.max_timestamp, -1),
       e.created_at, e.id
from home h
join pg_temp.seed_events e on e.topic_id = h.topic_id and e.partition = h.partition
where e.deleted_at is null and e.n_records is distinct from 0 and e.processed is not true;

-- name: create_seed_figures
-- What each partition of the seed holds, by which it is told whether the seed was written to. A log begins where the seed says,
-- or later, with the first batch that is there.
create temporary view seed_figures as
select t.name as topic, p.partition,
       case when r.batches > 0 then greatest(p.start_offset, r.first_offset) else p.end_offset end as start_offset, p.end_offset,
       coalesce(r.batches, 0) as batches, coalesce(r.pending, 0) as pending
from pg_temp.seed_topics t
join pg_temp.seed_partitions p on p.topic_id = t.id
left join (
    select q.topic, q.partition, min(q.start_offset) as first_offset, count(*) filter (where not q.is_pending) as batches,
           count(*) filter (where q.is_pending) as pending
    from pg_temp.seed_rows q
    group by q.topic, q.partition
) r on r.topic = t.name and r.partition = p.partition
where t.deleted_at is null and p.deleted_at is null;

-- name: find_seed_problems
-- What stands in the way, told by the seed's topics and partitions: is_conflict where it is something of Tidemark's. In an order
-- of their own, so that the first ones are the same each time; also refuses a cluster that is not the log's.
with topic as materialized (
    select t.id, t.name, translate(t.name, '.', '_') as folded
    from pg_temp.seed_topics t
    where t.deleted_at is null and tidemark.tx_base() is not null
),
home as materialized (
    select t.id as topic_id, t.name as topic, p.partition, p.start_offset, p.end_offset
    from topic t
    left join pg_temp.seed_partitions p on p.topic_id = t.id and p.deleted_at is null
)
select v.is_conflict, v.problem
from (
    select true as is_conflict, t.name, 0::bigint as partition,
           format('topic %L is there already, as %L with the id %s', t.name, k.name, k.id) as problem
    from topic t
    join tidemark.topics k on translate(k.name, '.', '_') = t.folded or k.id::text = t.id::text
    where not exists (select from tidemark.adopted_partitions a where a.topic = t.name and a.completed_at is not null)
    union all
    select false, t.name, 0,
           format('topic %L has no legal name: use 1 to 249 of the characters A-Z a-z 0-9 . _ -', left(t.name, 300))
    from topic t
    where (t.name ~ '^[A-Za-z0-9._-]{1,249}$' and t.name not in ('.', '..')) is not true
    union all
    select false, min(t.name), 0,
           format('topics %s have names that differ in nothing, or in . and _ alone',
                  string_agg(quote_literal(t.name), ', ' order by t.name))
    from topic t
    group by t.folded
    having count(*) > 1
    union all
    select false, h.topic, 0,
           case when count(h.partition) = 0 then format('topic %L has no partition', h.topic)
                when count(*) > 100000 then format('topic %L has %s partitions, more than 100000', h.topic, count(*))
                else format('topic %L has %s partitions, numbered %s to %s: they have to be 0 to %s, each once', h.topic,
                            count(*), min(h.partition), max(h.partition), count(*) - 1) end
    from home h
    group by h.topic_id, h.topic
    having (count(h.partition) between 1 and 100000 and count(distinct h.partition) = count(*) and min(h.partition) = 0
            and max(h.partition) = count(*) - 1) is not true
    union all
    select false, h.topic, h.partition,
           format('%s/%s: the log cannot hold %s to %s', h.topic, h.partition, coalesce(h.start_offset::text, 'NULL'),
                  coalesce(h.end_offset::text, 'NULL'))
    from home h
    where h.partition is not null and (0 <= h.start_offset and h.start_offset <= h.end_offset) is not true
    union all
    select false, null, s.partition,
           format('%s %s of topic id %s, partition %s, which do not exist together', s.rows, s.kind, coalesce(s.topic_id, 'NULL'),
                  coalesce(s.partition::text, 'NULL'))
    from (
        select 'batches' as kind, b.topic_id::text as topic_id, b.partition, count(*) as rows
        from pg_temp.seed_batches b
        where b.deleted_at is null
        group by b.topic_id, b.partition
        union all
        select 'unprocessed events', e.topic_id::text, e.partition, count(*)
        from pg_temp.seed_events e
        where e.deleted_at is null and e.processed is not true
        group by e.topic_id, e.partition
        union all
        select 'partitions', p.topic_id::text, p.partition, count(*)
        from pg_temp.seed_partitions p
        where p.deleted_at is null
          and not exists (select from pg_temp.seed_topics t where t.id = p.topic_id)
        group by p.topic_id, p.partition
    ) s
    where not exists (select from home h where h.topic_id::text = s.topic_id and h.partition = s.partition)
      and not exists (select from pg_temp.seed_topics t where t.id::text = s.topic_id and t.deleted_at is not null)
) v
order by v.is_conflict desc, v.name, v.partition, v.problem;

-- name: reserve_partitions
-- The first step of an adoption: gives the seed's partitions their ids here, unless that was done before. A topic keeps its id
-- where that is a uuid.
insert into tidemark.adopted_partitions (topic_id, start_offset, end_offset, batches, pending, partition_id, partition, topic)
select f.id, f.start_offset, f.end_offset, f.batches, f.pending, nextval('tidemark.topic_partitions_id_seq'), f.partition, f.topic
from (
    select t.id, f.*
    from (
        select s.name, case when s.id::text ~ '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then s.id::text::uuid
                            else gen_random_uuid() end as id
        from pg_temp.seed_topics s
        where s.deleted_at is null
    ) t
    join pg_temp.seed_figures f on f.topic = t.name
    where not exists (
        select
        from tidemark.adopted_partitions a
        where a.completed_at is null or a.topic in (select s.name from pg_temp.seed_topics s where s.deleted_at is null)
    )
    order by f.topic, f.partition
) f;

-- name: compare_seed
-- Partitions of the seed that are not what they were when their adoption began, by name: what they held then, and what they
-- hold now (null for nothing).
select coalesce(a.topic, f.topic) as topic, coalesce(a.partition, f.partition) as partition,
       case when a.topic is not null then
           format('[%s, %s), %s batches, %s events', a.start_offset, a.end_offset, a.batches, a.pending) end as was,
       case when f.topic is not null then
           format('[%s, %s), %s batches, %s events', f.start_offset, f.end_offset, f.batches, f.pending) end as now
from (
    select p.*
    from tidemark.adopted_partitions p
    where p.completed_at is null or p.topic in (select s.name from pg_temp.seed_topics s where s.deleted_at is null)
) a
full join pg_temp.seed_figures f on f.topic = a.topic and f.partition = a.partition
where (a.start_offset, a.end_offset, a.batches, a.pending) is distinct from (f.start_offset, f.end_offset, f.batches, f.pending)
order by 1, 2;

-- name: adoption_state
-- What is adopted: topics, partitions, batches with an offset, events without, and whether all of it is complete.
select count(distinct a.topic) as topics, count(*) as partitions, coalesce(sum(a.batches), 0)::bigint as batches,
       coalesce(sum(a.pending), 0)::bigint as pending, coalesce(bool_and(a.completed_at is not null), true) as is_complete,
       coalesce(max(a.batches + a.pending), 0) as longest
from tidemark.adopted_partitions a
where a.completed_at is null or a.topic in (select s.name from pg_temp.seed_topics s where s.deleted_at is null);

-- name: load_batches
-- All that is to be copied, as a table of this session. The order is: partition by partition, batches by their offsets, and
-- behind them the events that have none, as the seed would have taken them. `rank` counts in the partition, from 1, and becomes
-- the event's tx; `place` counts in the object, from 0. `run_n` is where the batch's run begins in the whole: a transaction takes
-- whole runs, so they come out alike wherever one was interrupted.
create temporary table adopted_batches as
select q.partition_id, q.rank, q.n - (q.rank - 1) % 64 as run_n, q.place, q.is_pending, q.start_offset, q.n_records, q.key,
       q.byte_offset, q.byte_length, q.max_timestamp, q.created_at, q.previous_end, q.end_bytes, q.newest
from (
    select a.partition_id, r.*, row_number() over (upto rows unbounded preceding) as rank,
           row_number() over (order by a.partition_id, r.is_pending, r.start_offset, r.created_at, r.id
                              rows unbounded preceding) as n,
           row_number() over (partition by r.key order by a.partition_id, r.is_pending, r.start_offset, r.created_at, r.id
                              rows unbounded preceding) - 1 as place,
           lag(r.start_offset::numeric + r.n_records) over upto as previous_end,
           sum(r.byte_length) over (upto rows unbounded preceding) as end_bytes,
           max(r.max_timestamp) over (upto rows unbounded preceding) as newest
    from tidemark.adopted_partitions a
    join pg_temp.seed_rows r on r.topic = a.topic and r.partition = a.partition
    where a.completed_at is null
    window upto as (partition by a.partition_id order by r.is_pending, r.start_offset, r.created_at, r.id)
) q;

-- name: load_objects
-- The objects of what is to be copied, with all that a commit would have said of them. `run_n` is where the first of its batches
-- is. It was committed when the seed's newest event of it was created; where nothing tells that, now.
create temporary table adopted_objects as
select g.key, g.batches, g.partition_ids, g.batch_counts, g.run_n, greatest(g.created_at, e.created_at) as committed_at,
       sha256(record_send(row(g.key, g.partition_ids, g.batch_counts))) as content_hash
from (
    select c.key, sum(c.batches)::bigint as batches, array_agg(c.partition_id order by c.partition_id) as partition_ids,
           array_agg(c.batches::int order by c.partition_id) as batch_counts, min(c.run_n) as run_n,
           max(c.created_at) as created_at
    from (
        select b.key, b.partition_id, count(*) as batches, min(b.run_n) as run_n, max(b.created_at) as created_at
        from pg_temp.adopted_batches b
        group by b.key, b.partition_id
    ) c
    group by c.key
) g
left join (
    select s.key, max(s.created_at) as created_at from pg_temp.seed_events s group by s.key
) e on e.key = g.key
order by g.run_n;

-- name: index_batches
-- Each transaction finds its stretch by this.
create index on pg_temp.adopted_batches (run_n);

-- name: index_objects
-- As index_batches.
create index on pg_temp.adopted_objects (run_n);

-- name: analyze_batches
-- Nobody else does that for a session's own tables.
analyze pg_temp.adopted_batches, pg_temp.adopted_objects;

-- name: find_row_problems
-- What stands in the way, told by the batches: as find_seed_problems, of each kind the first in a partition.
with batch as materialized (
    select a.topic, a.partition, a.end_offset as log_end, b.*
    from pg_temp.adopted_batches b
    join tidemark.adopted_partitions a on a.partition_id = b.partition_id
)
select v.is_conflict, v.problem
from (
    select true as is_conflict, null::text as topic, null::int as partition, null::numeric as start_offset,
           format('object %L is committed already (id %s), and not by this adoption', o.key, k.id) as problem
    from pg_temp.adopted_objects o
    join tidemark.objects k on k.key = o.key
    where k.content_hash <> o.content_hash
    union all
    select false, null, null, null, format('object %L has %s batches, more than 65536', o.key, o.batches)
    from pg_temp.adopted_objects o
    where o.batches > 65536
    union all
    (select distinct on (b.partition_id)
            false, b.topic, b.partition, b.start_offset,
            format('%s/%s: %s has n_records %s, object key %s, bytes from %s with length %s, max_timestamp %s: a batch has 1 to '
                   '2147483647 records, a key of 1 to 1024 bytes, a byte range of less than 2 GiB without negative numbers, and '
                   'milliseconds up to the year 9999',
                   b.topic, b.partition,
                   case when b.is_pending then 'an unprocessed event'
                        else format('the batch at offset %s', coalesce(b.start_offset::text, 'NULL')) end,
                   coalesce(b.n_records::text, 'NULL'), coalesce(quote_literal(left(b.key, 100)), 'NULL'),
                   coalesce(b.byte_offset::text, 'NULL'), coalesce(b.byte_length::text, 'NULL'), b.max_timestamp)
     from batch b
     where (b.n_records between 1 and 2147483647 and octet_length(b.key) between 1 and 1024 and b.byte_offset >= 0
            and b.byte_length between 0 and 2147483647 and b.max_timestamp <= 253402300799999
            and (b.is_pending or b.start_offset >= 0)) is not true
     order by b.partition_id, b.rank)
    union all
    (select distinct on (b.partition_id)
            false, b.topic, b.partition, b.start_offset,
            format('%s/%s: offsets %s: the batch before ends at %s, and the next one begins at %s', b.topic, b.partition,
                   case when b.start_offset > b.previous_end then 'are missing' else 'were given twice' end, b.previous_end,
                   b.start_offset)
     from batch b
     where not b.is_pending and b.start_offset <> b.previous_end
     order by b.partition_id, b.rank)
    union all
    select false, l.topic, l.partition, l.batch_end,
           format('%s/%s: the log ends at %s, and its last batch at %s', l.topic, l.partition, l.log_end, l.batch_end)
    from (
        select b.topic, b.partition, b.log_end, max(b.start_offset::numeric + b.n_records) as batch_end
        from batch b
        where not b.is_pending
        group by b.topic, b.partition, b.log_end
    ) l
    where l.batch_end <> l.log_end
) v
order by v.is_conflict desc, v.topic nulls first, v.partition, v.start_offset, v.problem;

-- name: adoption_room
-- Whether transactions 1 to $1 are over, so that they stand before all that will be committed.
select c.tx_base + pg_snapshot_xmin(pg_current_snapshot())::text::bigint > $1::bigint as is_enough
from tidemark.cluster c;

-- name: adopted_upto
-- Where the copying goes on: behind the run of the last event that is there. Zero where there is none.
select coalesce((
    select b.run_n + 1
    from (
        select a.partition_id, e.tx
        from tidemark.adopted_partitions a
        cross join lateral (
            select v.tx from tidemark.record_batch_events v where v.partition_id = a.partition_id order by v.tx desc limit 1
        ) e
        where a.completed_at is null
        order by a.partition_id desc
        limit 1
    ) l
    join pg_temp.adopted_batches b on b.partition_id = l.partition_id and b.rank = l.tx
), 0);

-- name: copy_objects
-- Copies the objects whose first batch is in the stretch from $1 up to $2. A statement of its own, before the events, which look
-- up their ids. Their tx is 0, before all that fan-out looks for: it would send tasks for partitions that do not exist yet.
insert into tidemark.objects (tx, committed_at, batches, key, content_hash, partition_ids, batch_counts)
select 0, coalesce(o.committed_at, clock_timestamp()), o.batches, o.key, o.content_hash, o.partition_ids, o.batch_counts
from pg_temp.adopted_objects o
where o.run_n >= $1::bigint and o.run_n < $2::bigint
order by o.run_n, o.key
on conflict on constraint objects_key_key do nothing;

-- name: copy_events
-- Copies the events in the stretch from $1 up to $2, and makes the runs that give them the offsets they had. One row: the batches
-- of the stretch, the events that were written, and the objects that copy_objects has to have written.
with batch as materialized (
    select b.* from pg_temp.adopted_batches b where b.run_n >= $1::bigint and b.run_n < $2::bigint
),
logged as (
    insert into tidemark.record_batch_events
        (tx, id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
    select b.rank, (o.id << 16) + b.place, b.byte_offset, b.max_timestamp, b.partition_id, b.n_records, b.byte_length
    from batch b
    join tidemark.objects o on o.key = b.key
    returning partition_id
),
placed as (
    insert into tidemark.runs (start_offset, end_offset, end_bytes, max_timestamp, first_tx, last_tx, partition_id, batches)
    select min(b.start_offset), max(b.start_offset + b.n_records), max(b.end_bytes), max(b.newest), min(b.rank), max(b.rank),
           b.partition_id, count(*)
    from batch b
    where not b.is_pending
    group by b.partition_id, b.run_n
)
select (select count(*) from batch) as batches, (select count(*) from logged) as events,
       (select count(*) from pg_temp.adopted_objects o where o.run_n >= $1::bigint and o.run_n < $2::bigint) as objects;

-- name: check_adopted
-- Compares the stretch from $1 up to $2 with the log as readers see it: each batch by its offset, each pending event by its
-- order. One row: how many are the same on both sides, and the first two that are not, with the side they are on.
with seed as materialized (
    select b.partition_id, b.rank, b.is_pending, b.start_offset, b.n_records, b.key, b.byte_offset, b.byte_length, b.max_timestamp
    from pg_temp.adopted_batches b
    where b.run_n >= $1::bigint and b.run_n < $2::bigint
),
stretch as materialized (
    select s.partition_id, s.is_pending, min(s.start_offset) as first_offset, max(s.start_offset) as last_offset,
           min(s.rank) as first_rank, max(s.rank) as last_rank
    from seed s
    group by s.partition_id, s.is_pending
),
side as (
    select 'seed' as side, s.partition_id, s.start_offset, case when s.is_pending then s.rank end as rank, s.n_records, s.key,
           s.byte_offset, s.byte_length, s.max_timestamp
    from seed s
    union all
    select 'log', s.partition_id, e.start_offset, null, e.n_records, o.key, e.byte_offset, e.byte_length, e.max_timestamp
    from stretch s
    join tidemark.runs r on r.partition_id = s.partition_id and r.start_offset between s.first_offset and s.last_offset
    cross join lateral tidemark.run_events(r) e
    left join tidemark.objects o on o.id = e.object_id
    where not s.is_pending
    union all
    select 'log', s.partition_id, null, v.tx, v.n_records, o.key, v.byte_offset, v.byte_length, v.max_timestamp
    from stretch s
    join tidemark.record_batch_events v on v.partition_id = s.partition_id and v.tx between s.first_rank and s.last_rank
    left join tidemark.objects o on o.id = v.id >> 16
    where s.is_pending
),
compared as materialized (
    select min(d.side) as side, d.partition_id, d.start_offset, d.rank, d.n_records, d.key, d.byte_offset, d.byte_length,
           d.max_timestamp, count(*) = 2 and min(d.side) <> max(d.side) as is_same
    from side d
    group by d.partition_id, d.start_offset, d.rank, d.n_records, d.key, d.byte_offset, d.byte_length, d.max_timestamp
)
select (select count(*) from compared c where c.is_same) as same,
       array(
           select format('%s/%s: the %s has %s with %s records, object %L, %s bytes from %s, max_timestamp %s', a.topic,
                         a.partition, c.side, coalesce('a batch at offset ' || c.start_offset, 'event ' || c.rank), c.n_records,
                         c.key, c.byte_length, c.byte_offset, c.max_timestamp)
           from (
               select n.* from compared n where not n.is_same order by n.partition_id, n.start_offset, n.rank, n.side desc limit 2
           ) c
           join tidemark.adopted_partitions a on a.partition_id = c.partition_id
           order by c.partition_id, c.start_offset, c.rank, c.side desc
       ) as differences;

-- name: publish_topics
-- The last step: creates the topics of what is adopted.
insert into tidemark.topics (id, name, partitions, created_at)
select a.topic_id, a.topic, count(*), coalesce(max(t.created_at), clock_timestamp())
from tidemark.adopted_partitions a
join pg_temp.seed_topics t on t.name = a.topic
where a.completed_at is null and t.deleted_at is null
group by a.topic_id, a.topic
on conflict do nothing;

-- name: publish_partitions
-- With the ids that were reserved for them, and that their events have.
insert into tidemark.topic_partitions (id, topic_id, partition)
overriding system value
select a.partition_id, a.topic_id, a.partition
from tidemark.adopted_partitions a
where a.completed_at is null
order by a.partition_id;

-- name: publish_starts
-- Where logs begin from which something was deleted. Before the first run there is nothing.
insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, partition_id)
select a.start_offset, r.start_offset, 0, a.partition_id
from tidemark.adopted_partitions a
cross join lateral (
    select f.start_offset from tidemark.runs f where f.partition_id = a.partition_id order by f.start_offset limit 1
) r
where a.completed_at is null and a.start_offset > 0;

-- name: publish_empty
-- And where those begin from which everything was.
select tidemark.begin_at(a.partition_id, a.start_offset)
from tidemark.adopted_partitions a
where a.completed_at is null and a.batches = 0 and a.start_offset > 0
order by a.partition_id;

-- name: complete_adoption
-- The number of topics.
with completed as (
    update tidemark.adopted_partitions a
    set completed_at = clock_timestamp()
    where a.completed_at is null
    returning a.topic
)
select count(distinct c.topic) from completed c;

-- name: discard_events
-- Takes back what was copied last: about $3 events from the end of the last partition up to id $1, of that one those up to rank
-- $2, by whole runs. So what is left is what an adoption leaves that is interrupted. An object goes with the first of its batches
-- that was copied. One row: where it was, how far down it came, and how many went; none where nothing is left.
with last as materialized (
    select a.partition_id, e.tx, greatest(e.tx - $3::int, 0) / 64 * 64 as down_to
    from tidemark.adopted_partitions a
    cross join lateral (
        select v.tx
        from tidemark.record_batch_events v
        where v.partition_id = a.partition_id
          and v.tx <= case when a.partition_id = $1::int then $2::bigint else 9223372036854775807 end
        order by v.tx desc
        limit 1
    ) e
    where a.completed_at is null and a.partition_id <= $1::int
    order by a.partition_id desc
    limit 1
),
gone as (
    delete from tidemark.record_batch_events v
    using last l
    where v.partition_id = l.partition_id and v.tx > l.down_to and v.tx <= l.tx
    returning v.id
),
runs as (
    delete from tidemark.runs r
    using last l
    where r.partition_id = l.partition_id and r.first_tx > l.down_to
),
objects as (
    delete from tidemark.objects o
    using gone g
    where g.id & 65535 = 0 and o.id = g.id >> 16
)
select l.partition_id, l.down_to, (select count(*) from gone) as events from last l;

-- name: discard_partitions
-- The end of that: the partitions' ids are free, though nobody gets them again.
delete from tidemark.adopted_partitions a
where a.completed_at is null;
