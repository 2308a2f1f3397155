-- name: create_topic
-- $1 name, $2 number of partitions, $3 id or null, $4 milliseconds and $5 bytes of retention, null for no limit.
select tidemark.create_topic($1::text, $2::int, $3::uuid, $4::bigint, $5::bigint);

-- name: add_partitions
-- $1 topic name, $2 partitions in all.
select tidemark.add_partitions($1::text, $2::int);

-- name: delete_topic
-- $1 topic name.
select tidemark.delete_topic($1::text);

-- name: list_topics
-- Topics with names $1 or ids $2, null for all, after name $3, $4 at most.
select t.id, t.name, t.partition_ids, t.retention_ms, t.retention_bytes, t.created_at
from tidemark.list_topics($1::text[], $2::uuid[], $3::text, $4::int) t;

-- name: known_partitions
-- Which of the partitions $1 are there, or were there until their topic was deleted.
select array(select p.id from tidemark.topic_partitions p where p.id = any ($1::int[])
             union all select d.partition_id from tidemark.deleted_partitions d where d.partition_id = any ($1::int[])) as ids;

-- name: partition_ids
-- $1 topic name.
select tidemark.partition_ids($1::text);

-- name: highest_partition_id
-- The partition id given last, 0 for none.
select coalesce(max(p.id), 0)
from tidemark.topic_partitions p;

-- name: name_partitions
-- Topic name and number of partitions $1.
select p.id, t.name, p.partition
from tidemark.topic_partitions p
join tidemark.topics t on t.id = p.topic_id
where p.id = any ($1::int[]);

-- name: set_retention
-- Sets both limits of topic $1, null for none: $2 milliseconds, $3 bytes.
select tidemark.set_retention($1::text, $2::bigint, $3::bigint);

-- name: delete_records
-- $1 partition id, $2 offset.
select tidemark.delete_records($1::int, $2::bigint);

-- name: lock_deleted_partitions
-- Purge: locks partitions of deleted topics of which something may be left, $1 after id $2; leaves their ids in the setting. What
-- another purge has is passed over, so several share the work. One that was purged is looked at again after a day, and
-- then forgotten: what could still commit to it, from a snapshot that old, is gone by then.
select coalesce(array_agg(l.partition_id), '{}') as ids,
       set_config('tidemark.locked', coalesce(array_agg(l.partition_id), '{}')::text, true)
from (
    select d.partition_id
    from tidemark.deleted_partitions d
    where d.purged_at is null and d.partition_id > $2::int
    order by d.partition_id
    limit $1::int
    for update of d skip locked
) l;

-- name: purge
-- Purge: deletes the events of the locked partitions from where the last pass stopped, $1 of each at most, and with nothing left
-- of them the rest. The transactions that were running when the first pass came may still commit to a partition. When they are
-- over, and there are no more events, it begins once more at the first one, and what it finds then is the last there can be.
with now as materialized (
    select c.tx_base + pg_snapshot_xmin(pg_current_snapshot())::text::bigint as oldest_tx,
           c.tx_base + pg_snapshot_xmax(pg_current_snapshot())::text::bigint as next_tx
    from tidemark.cluster c
),
gone as (
    delete from tidemark.record_batch_events v
    using (
        select e.partition_id, e.tx, e.id
        from unnest(current_setting('tidemark.locked')::int[]) i(id)
        join tidemark.deleted_partitions d on d.partition_id = i.id
        cross join lateral (
            select b.partition_id, b.tx, b.id
            from tidemark.record_batch_events b
            where b.partition_id = i.id and (b.tx, b.id) > (coalesce(d.purged_tx, 0), coalesce(d.purged_id, 0))
            order by b.tx, b.id
            limit $1::int
        ) e
    ) g
    where v.partition_id = g.partition_id and v.tx = g.tx and v.id = g.id
    returning v.partition_id, v.tx, v.id, v.byte_length
),
page as materialized (
    select i.id, n.oldest_tx, n.next_tx, d.settled_tx, d.purged_tx, g.*,
           -- Nothing more can come, and the last pass that began at the first event found none.
           g.events = 0 and d.purged_tx is null and d.settled_tx <= n.oldest_tx as is_empty
    from unnest(current_setting('tidemark.locked')::int[]) i(id)
    cross join now n
    join tidemark.deleted_partitions d on d.partition_id = i.id
    cross join lateral (
        select count(*) as events, (array_agg(o.tx order by o.tx desc, o.id desc))[1] as last_tx,
               (array_agg(o.id order by o.tx desc, o.id desc))[1] as last_id
        from gone o
        where o.partition_id = i.id
    ) g
),
runs_gone as (
    delete from tidemark.runs r
    using (
        select c.partition_id, c.start_offset
        from unnest(current_setting('tidemark.locked')::int[]) i(id)
        cross join lateral (
            select u.partition_id, u.start_offset
            from tidemark.runs u
            where u.partition_id = i.id
            order by u.start_offset
            limit $1::int
        ) c
    ) g
    where r.partition_id = g.partition_id and r.start_offset = g.start_offset
    returning r.partition_id
),
rest as (
    delete from tidemark.producer_batches p using page g where g.is_empty and p.partition_id = g.id
),
starts as (
    delete from tidemark.log_starts l using page g where g.is_empty and l.partition_id = g.id
),
audited as (
    delete from tidemark.audit_progress a using page g where g.is_empty and a.partition_id = g.id
),
moved as (
    update tidemark.deleted_partitions d
    set settled_tx = coalesce(d.settled_tx, p.next_tx),
        purged_tx = case when p.events > 0 then p.last_tx when p.settled_tx <= p.oldest_tx then null else d.purged_tx end,
        purged_id = case when p.events > 0 then p.last_id when p.settled_tx <= p.oldest_tx then null else d.purged_id end,
        purged_at = case when p.is_empty and not exists (select from runs_gone r where r.partition_id = p.id)
                    then clock_timestamp() end
    from page p
    where d.partition_id = p.id
    returning d.purged_at is not null as is_purged
),
spent as (
    insert into tidemark.deleted_batches (object_id, tx, batches)
    select o.id >> 16, (select tidemark.tx_base() + pg_current_xact_id()::text::bigint), count(*)
    from gone o
    group by o.id >> 16
    returning object_id
)
select (select count(*) from gone) as batches, (select coalesce(sum(o.byte_length), 0)::bigint from gone o) as log_bytes,
       (select count(*) from moved m where m.is_purged) as partitions,
       exists (select from runs_gone)
       or exists (select from page p where p.events > 0 or p.is_empty or p.settled_tx <= p.oldest_tx) as went_on,
       set_config('tidemark.spent', array(select s.object_id from spent s)::text, true) as spent;

-- name: forget_purged
-- Looks at partitions again that were purged a day ago, $1 at most: those that have events again are to be purged again, the
-- others are forgotten.
with old as materialized (
    select d.partition_id,
           exists (select from tidemark.record_batch_events e where e.partition_id = d.partition_id) as has_events
    from tidemark.deleted_partitions d
    where d.purged_at < clock_timestamp() - interval '1 day'
    order by d.partition_id
    limit $1::int
    for update of d skip locked
),
again as (
    update tidemark.deleted_partitions d set purged_at = null from old o where d.partition_id = o.partition_id and o.has_events
)
delete from tidemark.deleted_partitions d using old o where d.partition_id = o.partition_id and not o.has_events;
