-- Gives every pending event of locked partitions its offset: $1 partition ids, $2 events per partition at most.
--
-- Pending is what lies beyond the cursor, and the events of the transactions that were still running when the cursor
-- passed them. Those are taken whole and first: they sort below the cursor. Everything here, the new in_flight included, is
-- seen by one snapshot. The lateral subquery keeps the index's order, so nothing is sorted whatever the number of partitions.
with head as materialized (
    select p.id, p.end_offset, p.seen_xid, p.seen_id, p.in_flight
    from tidemark.topic_partitions p
    where p.id = any ($1::int[])
),
pending as materialized (
    select h.id as partition_id, e.*
    from head h
    cross join lateral (
        select c.xid, c.id, c.object_id, c.byte_offset, c.max_timestamp, c.n_records, c.byte_length,
               h.end_offset + sum(c.n_records) over (order by c.xid, c.id rows unbounded preceding) as end_offset
        from (
            (select l.*
             from tidemark.record_batch_events l
             where l.partition_id = h.id and l.xid = any (h.in_flight))
            union all
            (select m.*
             from tidemark.record_batch_events m
             where m.partition_id = h.id and (m.xid, m.id) > (h.seen_xid, h.seen_id)
             order by m.xid, m.id
             limit $2::int)
        ) c
    ) e
),
placed as (
    insert into tidemark.record_batches
        (start_offset, object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
    select e.end_offset - e.n_records, e.object_id, e.byte_offset, e.max_timestamp, e.partition_id, e.n_records,
           e.byte_length
    from pending e
),
total as (
    select e.partition_id, count(*) as events, sum(e.byte_length) as bytes, max(e.end_offset) as end_offset
    from pending e
    group by e.partition_id
),
-- Where the cursor goes. A partition with nothing but late events keeps its own.
advanced as (
    select t.partition_id, t.events, t.bytes, t.end_offset, t.end_offset - h.end_offset as records,
           case when (e.xid, e.id) > (h.seen_xid, h.seen_id) then e.xid else h.seen_xid end as seen_xid,
           case when (e.xid, e.id) > (h.seen_xid, h.seen_id) then e.id else h.seen_id end as seen_id
    from total t
    join pending e on e.partition_id = t.partition_id and e.end_offset = t.end_offset
    join head h on h.id = t.partition_id
),
moved as (
    update tidemark.topic_partitions p
    set end_offset = a.end_offset,
        byte_size = p.byte_size + a.bytes,
        seen_xid = a.seen_xid,
        seen_id = a.seen_id,
        in_flight = array(select x.xid from pg_snapshot_xip(pg_current_snapshot()) x(xid) where x.xid < a.seen_xid)
    from advanced a
    where p.id = a.partition_id and p.id = any ($1::int[])
    returning p.id, a.events, a.records, a.bytes, a.seen_xid, a.seen_id
)
select m.id, m.events, m.records, m.bytes,
       m.events >= $2::int and exists (
           select from tidemark.record_batch_events e
           where e.partition_id = m.id and (e.xid, e.id) > (m.seen_xid, m.seen_id)
       ) as has_more
from moved m
