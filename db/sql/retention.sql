-- name: find_expired
-- Retention: the last of the $2 partitions that follow partition id $1, and those of them whose oldest run is to go. Takes no
-- locks; what it finds is looked at again under lock. Of a topic without limits it reads no more than that.
select max(g.id) as last_id, coalesce(array_agg(g.id order by g.id) filter (where e.runs > 0), '{}') as expired
from (
    select p.id
    from tidemark.topic_partitions p
    where p.id > $1::int
    order by p.id
    limit $2::int
) g
cross join lateral (select count(*) as runs from tidemark.runs_to_delete(g.id, 1)) e;

-- name: delete_expired
/*+ IndexScan(n runs_pkey) IndexScan(l log_starts_pkey) IndexScan(v record_batch_events_pkey) IndexScan(u runs_pkey)
    IndexScan(w log_starts_pkey) Leading((g v)) NestLoop(g v) Leading((q u)) NestLoop(q u) Leading((g w)) NestLoop(g w) */
-- Retention: deletes the expired runs of locked partitions with their events: whole runs, $1 batches of each partition or less,
-- but always one run. The partitions are those that lock_free_partitions put into the setting. Which runs they are is decided
-- here, in a snapshot from after the lock. The objects whose batches are gone are left in a setting for the next statements.
with expired as materialized (
    select r.*, sum(r.batches) over (partition by r.partition_id order by r.start_offset) as batches_to,
           r.start_offset = h.start_offset as is_newest, k.start_offset as log_start, k.deleted_to, k.start_bytes, k.stale_run
    from unnest(current_setting('tidemark.locked')::int[]) i(id)
    left join lateral tidemark.newest_run(i.id) h on true
    left join lateral tidemark.log_start(i.id) k on true
    -- One more than can go, so that it is known whether there are more.
    cross join lateral tidemark.runs_to_delete(i.id, $1::int + 1) r
),
gone as materialized (
    select e.* from expired e where e.batches_to <= $1::int or e.batches_to = e.batches
),
deleted as (
    delete from tidemark.record_batch_events v
    using gone g
    where v.partition_id = g.partition_id
      and (v.tx, v.id) >= (g.first_tx, coalesce(g.first_id, -9223372036854775808))
      and (v.tx, v.id) <= (g.last_tx, coalesce(g.last_id, 9223372036854775807))
      and (g.skipped is null or v.tx <> all (g.skipped))
    returning v.id >> 16 as object_id, v.byte_length
),
-- The newest run stays, because it is the cursor. It goes with the next ones.
dropped as (
    delete from tidemark.runs u
    using (
        select g.partition_id, g.start_offset from gone g where not g.is_newest
        union
        select g.partition_id, g.stale_run from gone g
    ) q
    where u.partition_id = q.partition_id and u.start_offset = q.start_offset
),
moved as (
    insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, stale_run, partition_id)
    select greatest(max(g.log_start), max(g.end_offset)), max(g.end_offset), greatest(max(g.start_bytes), max(g.end_bytes)),
           max(g.start_offset) filter (where g.is_newest), g.partition_id
    from gone g
    group by g.partition_id
),
behind as (
    delete from tidemark.log_starts w
    using gone g
    where w.partition_id = g.partition_id and w.start_offset = g.log_start and w.deleted_to = g.deleted_to
),
spent as (
    insert into tidemark.deleted_batches (object_id, tx, batches)
    select d.object_id, (select tidemark.tx_base() + pg_current_xact_id()::text::bigint), count(*)
    from deleted d
    group by d.object_id
    returning object_id
)
select (select count(*) from deleted) as batches,
       (select coalesce(sum(d.byte_length), 0)::bigint from deleted d) as log_bytes,
       array(select distinct e.partition_id from expired e where e.batches_to > $1::int and e.batches_to <> e.batches)
           as unfinished,
       set_config('tidemark.spent', array(select s.object_id from spent s)::text, true) as spent;

-- name: lock_spent_objects
-- Retention: locks the objects whose batches it deleted, in the order of their ids. A statement of its own, before they are
-- counted: of two transactions that delete the last batches of an object at one moment the second waits here, and counts
-- with the first one's. Otherwise each would miss the other's. A lock leaves no version of the row behind.
select
from tidemark.objects o
where o.id = any (current_setting('tidemark.spent')::bigint[])
order by o.id
for no key update of o;

-- name: free_spent_objects
-- Retention: puts those of the locked objects that have no batch left into dead_objects.
insert into tidemark.dead_objects (object_id)
select o.id
from tidemark.objects o
where o.id = any (current_setting('tidemark.spent')::bigint[])
  and o.batches = (select sum(d.batches) from tidemark.deleted_batches d where d.object_id = o.id)
on conflict on constraint dead_objects_pkey do nothing;
