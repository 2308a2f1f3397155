-- name: init_producer
-- $1 producer id and $2 epoch of one that is known, or nulls.
select p.producer_id, p.producer_epoch
from tidemark.init_producer($1::bigint, $2::int) p;

-- name: producer_states
-- $1 partition id, producers before id $2 or null, $3 at most.
select s.producer_id, s.producer_epoch, s.last_sequence, s.batches, s.last_commit
from tidemark.producer_states($1::int, $2::bigint, $3::int) s;

-- name: expire_producers
-- Forgets what partitions know of producers that were silent for $4 seconds: looks at $3 of them, by partition and producer, in
-- descending order from before partition $1 and producer $2 on (null: from its last one). Each step goes to the newest row of the
-- next one, and over none of those that were deleted behind it. One row: where it got, nulls at the end, and how many went.
--
-- A batch is as old as its object, and where that is forgotten no older than the next commit that is there.
with recursive known as (
    (select b.partition_id, b.producer_id, b.ordinal, b.tx, b.id, 1 as n
     from tidemark.producer_batches b
     where (b.partition_id, b.producer_id) < ($1::int, coalesce($2::bigint, 9223372036854775807))
     order by b.partition_id desc, b.producer_id desc, b.ordinal desc
     limit 1)
    union all
    select f.partition_id, f.producer_id, f.ordinal, f.tx, f.id, k.n + 1
    from known k
    cross join lateral (
        select b.*
        from tidemark.producer_batches b
        where (b.partition_id, b.producer_id) < (k.partition_id, k.producer_id)
        order by b.partition_id desc, b.producer_id desc, b.ordinal desc
        limit 1
    ) f
    where k.n < $3::int
),
silent as materialized (
    select k.*
    from known k
    where coalesce(
        (select o.committed_at from tidemark.objects o where o.id = k.id >> 16),
        (select o.committed_at from tidemark.objects o where o.tx > k.tx order by o.tx limit 1)
    ) < statement_timestamp() - make_interval(secs => $4::double precision)
),
gone as (
    delete from tidemark.producer_batches b
    using silent s
    where b.partition_id = s.partition_id and b.producer_id = s.producer_id and b.ordinal <= s.ordinal
)
select l.partition_id, l.producer_id, (select count(*)::int from silent) as expired
from (select 1) one
left join (select k.partition_id, k.producer_id from known k where k.n = $3::int) l on true;

-- name: expire_producer_ids
-- Forgets ids of producers that were given, or had their epoch raised, more than $1 seconds ago; such a producer gets a new id in
-- place of the next epoch. Looks at $2 of them, from any one on.
delete from tidemark.producers p
using (
    select q.id, q.epoch, q.created_at
    from tidemark.producers q
    where q.id >= (select floor(random() * max(m.id))::bigint from tidemark.producers m)
    order by q.id
    limit $2::int
) g
where p.id = g.id and p.epoch = g.epoch and g.created_at < statement_timestamp() - make_interval(secs => $1::double precision);
