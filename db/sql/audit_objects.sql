-- Audit: the objects of a stretch: partitions $1 from offsets $2 on, $3 batches of each at most. $4 are those of the partitions
-- whose whole log that is. The first offence of each kind in each partition, with the number of them.
--
-- An object that only lies in partitions of $4 must have exactly live_batches batches and pending events there: fewer is a
-- lost event, more a doubled one. Any other must count at least the batches seen, or it would be freed too early.
with batch as materialized (
    select r.id as partition_id, b.object_id, b.start_offset
    from unnest($1::int[], $2::bigint[]) r(id, from_offset)
    cross join lateral (
        select x.object_id, x.start_offset
        from tidemark.record_batches x
        where x.partition_id = r.id and x.start_offset >= r.from_offset
        order by x.start_offset
        limit $3::int
    ) b
),
pending as materialized (
    select p.id as partition_id, e.object_id
    from tidemark.topic_partitions p
    cross join lateral (
        select x.object_id
        from (
            (select l.object_id
             from tidemark.record_batch_events l
             where l.partition_id = p.id and l.xid = any (p.in_flight)
             limit $3::int)
            union all
            (select m.object_id
             from tidemark.record_batch_events m
             where m.partition_id = p.id and (m.xid, m.id) > (p.seen_xid, p.seen_id)
             order by m.xid, m.id
             limit $3::int)
        ) x
        limit $3::int
    ) e
    where p.id = any ($4::int[])
),
-- With more events pending than were read, nothing can be said about the sums.
complete as materialized (
    select coalesce(array_agg(u.id), '{}') as ids
    from unnest($4::int[]) u(id)
    where (select count(*) from pending q where q.partition_id = u.id) < $3::int
),
waiting as materialized (
    select q.object_id, count(*) as events from pending q group by q.object_id
),
touched as materialized (
    select b.partition_id, b.object_id, count(*) as batches, min(b.start_offset) as first_start
    from batch b
    group by b.partition_id, b.object_id
),
checked as (
    select t.partition_id, t.object_id, t.batches, t.first_start, o.id as known_id, o.key, o.live_batches,
           sum(t.batches) over (partition by t.object_id) as seen,
           coalesce(w.events, 0) as waiting,
           o.partition_ids <@ c.ids as complete,
           coalesce(o.batch_counts[array_position(o.partition_ids, t.partition_id)], 0) as committed,
           exists (select from tidemark.dead_objects d where d.object_id = t.object_id) as dead
    from touched t
    cross join complete c
    left join tidemark.objects o on o.id = t.object_id
    left join waiting w on w.object_id = t.object_id
),
offence as (
    select k.partition_id, k.first_start, v.invariant, v.detail
    from checked k
    cross join lateral (values
        ('object', k.known_id is null,
         format('batch at offset %s refers to object %s, which does not exist', k.first_start, k.object_id)),
        ('batch_count', k.batches > k.committed,
         format('object %s (%L) brought %s batches, the log holds %s of it, the first at offset %s', k.object_id, k.key,
                k.committed, k.batches, k.first_start)),
        ('live_batches', k.dead,
         format('object %s (%L) is in dead_objects, its batch at offset %s is not deleted', k.object_id, k.key,
                k.first_start)),
        ('live_batches', k.live_batches < k.seen,
         format('object %s (%L) has live_batches %s, but at least %s batches, one at offset %s', k.object_id, k.key,
                k.live_batches, k.seen, k.first_start)),
        ('live_batches', k.complete and k.live_batches >= k.seen and k.live_batches <> k.seen + k.waiting,
         format('object %s (%L) has live_batches %s, but %s batches, one at offset %s, and %s pending events',
                k.object_id, k.key, k.live_batches, k.seen, k.first_start, k.waiting))
    ) v(invariant, violated, detail)
    where v.violated and (k.known_id is not null or v.invariant = 'object')
)
select distinct on (f.partition_id, f.invariant)
       f.partition_id, f.invariant, f.first_start, f.detail, count(*) over (partition by f.partition_id, f.invariant)
from offence f
order by f.partition_id, f.invariant, f.first_start
