-- Audit: events of partitions $1 that need a closer look, $2 of each at most: consumed ones, the newest first, that have no batch
-- among the last of the log, and pending ones whose object does not exist. A consumed event whose batch retention can have
-- deleted is none: something is deleted from the log, and not all batches of the object are there.
with head as materialized (
    select p.id, p.seen_xid, p.seen_id, p.in_flight, p.start_offset
    from tidemark.topic_partitions p
    where p.id = any ($1::int[])
),
consumed as materialized (
    select h.id as partition_id, h.start_offset, e.*
    from head h
    cross join lateral (
        select c.xid, c.id, c.object_id, c.byte_offset, c.byte_length, c.n_records
        from tidemark.record_batch_events c
        where c.partition_id = h.id and (c.xid, c.id) <= (h.seen_xid, h.seen_id) and c.xid <> all (h.in_flight)
        order by c.xid desc, c.id desc
        limit $2::int
    ) e
),
-- Twice as many, because late events have their batches between those of others.
tail as materialized (
    select h.id as partition_id, b.*
    from head h
    cross join lateral (
        select t.object_id, t.byte_offset, t.byte_length, t.n_records
        from tidemark.record_batches t
        where t.partition_id = h.id
        order by t.start_offset desc
        limit 2 * $2::int
    ) b
)
select c.partition_id, c.xid::text, c.id, c.object_id, true as consumed
from consumed c
where not exists (
    select from tail t
    where t.partition_id = c.partition_id and t.object_id = c.object_id and t.byte_offset = c.byte_offset
      and t.byte_length = c.byte_length and t.n_records = c.n_records
)
and (c.start_offset = 0
     or (select o.live_batches = (select sum(b.batches) from unnest(o.batch_counts) b(batches))
         from tidemark.objects o where o.id = c.object_id))
union all
select h.id, e.xid::text, e.id, e.object_id, false
from head h
cross join lateral (
    (select l.xid, l.id, l.object_id
     from tidemark.record_batch_events l
     where l.partition_id = h.id and l.xid = any (h.in_flight)
     limit $2::int)
    union all
    (select m.xid, m.id, m.object_id
     from tidemark.record_batch_events m
     where m.partition_id = h.id and (m.xid, m.id) > (h.seen_xid, h.seen_id)
     order by m.xid, m.id
     limit $2::int)
) e
where not exists (select from tidemark.objects o where o.id = e.object_id)
