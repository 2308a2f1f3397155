/*+ IndexScan(p topic_partitions_pkey) IndexScan(l record_batch_events_pkey) IndexScan(m record_batch_events_pkey)
    IndexOnlyScan(e record_batch_events_pkey) Leading((r (t p))) NestLoop(t p) NestLoop(r t p) Set(enable_material off) */
-- As place_window, event by event instead of by a running sum: $1 partition ids, $2 events per partition at most.
with recursive running as materialized (
    select array(select pg_snapshot_xip(pg_current_snapshot())) as xids
),
-- Each step of the recursion takes the next event of every partition by an index probe, and adds its records to what
-- came before. A step that finds none left writes a last row, `done`, with the partition's totals. The positions are kept
-- apart: late events are searched from the start, the others from the cursor.
step as (
    select p.id as partition_id, p.in_flight,
           '0'::xid8 as late_xid, (-9223372036854775808)::bigint as late_id, p.seen_xid, p.seen_id,
           p.end_offset, 0::bigint as events, 0::bigint as main_events, 0::bigint as records, 0::bigint as bytes,
           null::bigint as object_id, null::bigint as byte_offset, null::bigint as max_timestamp,
           null::int as n_records, null::int as byte_length, false as done
    from tidemark.topic_partitions p
    where p.id = any ($1::int[])
    union all
    select s.partition_id, s.in_flight,
           case when e.late then e.xid else s.late_xid end, case when e.late then e.id else s.late_id end,
           case when e.late is false then e.xid else s.seen_xid end,
           case when e.late is false then e.id else s.seen_id end,
           s.end_offset + coalesce(e.n_records, 0), s.events + (e.late is not null)::int,
           s.main_events + (e.late is false)::int, s.records + coalesce(e.n_records, 0),
           s.bytes + coalesce(e.byte_length, 0), e.object_id, e.byte_offset, e.max_timestamp, e.n_records,
           e.byte_length, e.late is null
    from step s
    left join lateral (
        (select true as late, l.*
         from tidemark.record_batch_events l
         where l.partition_id = s.partition_id and l.xid = any (s.in_flight) and (l.xid, l.id) > (s.late_xid, s.late_id)
         order by l.xid, l.id
         limit 1)
        union all
        (select false, m.*
         from tidemark.record_batch_events m
         where m.partition_id = s.partition_id and (m.xid, m.id) > (s.seen_xid, s.seen_id)
             and s.main_events < $2::int
         order by m.xid, m.id
         limit 1)
        -- Late events first: they sort below the cursor.
        order by xid, id
        limit 1
    ) e on true
    where not s.done
),
placed as (
    insert into tidemark.record_batches
        (start_offset, object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
    select s.end_offset - s.n_records, s.object_id, s.byte_offset, s.max_timestamp, s.partition_id, s.n_records,
           s.byte_length
    from step s
    where s.n_records is not null
),
last as materialized (
    select s.partition_id, s.seen_xid, s.seen_id, s.events, s.records, s.bytes
    from step s
    where s.done and s.events > 0
),
moved as (
    update tidemark.topic_partitions p
    set end_offset = p.end_offset + t.records,
        byte_size = p.byte_size + t.bytes,
        seen_xid = t.seen_xid,
        seen_id = t.seen_id,
        in_flight = case r.xids
            when '{}' then r.xids
            else array(select x.xid from unnest(r.xids) x(xid) where x.xid < t.seen_xid)
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
