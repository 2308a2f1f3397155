/*+ IndexScan(p topic_partitions_pkey) IndexScan(l record_batch_events_pkey) IndexScan(m record_batch_events_pkey)
    IndexOnlyScan(e record_batch_events_pkey) Leading((r (t p))) NestLoop(t p) NestLoop(r t p) Set(enable_material off) */
-- Gives every pending event of locked partitions its offset: $1 partition ids, $2 events per partition at most.
-- Everything here, the new in_flight included, is seen by one snapshot.
with head as materialized (
    select p.id, p.end_offset, p.seen_xid, p.seen_id, p.in_flight
    from tidemark.topic_partitions p
    where p.id = any ($1::int[])
),
running as materialized (
    select array(select pg_snapshot_xip(pg_current_snapshot())) as xids
),
-- Pending is what lies beyond the cursor, and the events of the transactions that were still running when the cursor
-- passed them. Those are taken whole and first: they sort below the cursor. The lateral subquery keeps the index's order, so
-- nothing is sorted whatever the number of partitions.
--
-- The window carries the totals along, so that a partition's last row has all that its head needs; adding them up
-- and looking for that row afterwards takes a second and a third pass over the events.
pending as materialized (
    select h.id as partition_id, h.end_offset as base, e.*
    from head h
    cross join lateral (
        select c.xid, c.id, c.object_id, c.byte_offset, c.max_timestamp, c.n_records, c.byte_length,
               sum(c.n_records) over so_far as records,
               sum(c.byte_length) over so_far as bytes,
               row_number() over so_far as events,
               lead(false, 1, true) over so_far as is_last
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
        window so_far as (order by c.xid, c.id rows unbounded preceding)
    ) e
),
placed as (
    insert into tidemark.record_batches
        (start_offset, object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
    select e.base + e.records - e.n_records, e.object_id, e.byte_offset, e.max_timestamp, e.partition_id, e.n_records,
           e.byte_length
    from pending e
),
-- Materialized, or the update would copy each of its rows a second time, for rechecking them after a lock wait.
last as materialized (
    select e.partition_id, e.xid, e.id, e.events, e.records, e.bytes
    from pending e
    where e.is_last
),
-- The heads are locked, so their values are those read above. A partition with nothing but late events keeps its position.
moved as (
    update tidemark.topic_partitions p
    set end_offset = p.end_offset + t.records,
        byte_size = p.byte_size + t.bytes,
        seen_xid = greatest(p.seen_xid, t.xid),
        seen_id = case when (t.xid, t.id) > (p.seen_xid, p.seen_id) then t.id else p.seen_id end,
        in_flight = case r.xids
            when '{}' then r.xids
            else array(select x.xid from unnest(r.xids) x(xid) where x.xid < greatest(p.seen_xid, t.xid))
        end
    from last t, running r
    where p.id = t.partition_id
    returning p.id, t.events, t.records, t.bytes, p.seen_xid, p.seen_id
)
select m.id, m.events, m.records, m.bytes,
       m.events >= $2::int and exists (
           select from tidemark.record_batch_events e
           where e.partition_id = m.id and (e.xid, e.id) > (m.seen_xid, m.seen_id)
       ) as has_more
from moved m
