/*+ IndexScan(m record_batch_events_pkey) IndexOnlyScan(h record_batch_events_pkey)
    IndexOnlyScan(a record_batch_events_pkey) IndexScan(r runs_pkey) IndexScan(s passes_pkey)
    IndexScan(w sweeps_pkey) IndexScan(o objects_tx_idx) IndexOnlyScan(v record_batch_events_pkey) Set(enable_material off) */
-- Gives the pending events of locked partitions their offsets: $1 events per partition at most. The partitions are those that
-- lock_partitions put into the setting. Everything here is seen by one snapshot. One row for each partition that got any.
with recursive pass as materialized (
    select c.tx_base + pg_current_xact_id()::text::bigint as tx, tidemark.running_transactions() as running
    from tidemark.cluster c
),
cursor as materialized (
    select c.* from tidemark.cursors(current_setting('tidemark.locked')::int[]) c
),
-- Run by run: each step takes the next 64 events of every partition by one scan of the index, and adds them up to what came
-- before. The sources, in their order: each late transaction, then all that lies beyond the position. So nothing beyond it
-- is taken while a late one is left (invariant 3).
--
-- A run that took as many as it might is cut there, at an event, and the next step goes on behind it. Any other one ends with
-- its last transaction, all of which was taken, and the next step begins with the next source.
step as (
    select c.partition_id, c.late, c.seen_tx, c.seen_id, c.last_tx as resumed_tx, c.last_id as resumed_id,
           0 as source, false as is_cut, 0 as taken, null::bigint as late_tx, c.seen_tx as from_tx, null::bigint as first_tx,
           null::bigint as first_id, null::bigint as last_tx, null::bigint as last_id, 0 as batches, 0::bigint as records,
           c.end_offset, 0::bigint as bytes, c.end_bytes, c.max_timestamp
    from cursor c
    union all
    select s.partition_id, s.late, s.seen_tx, s.seen_id, s.resumed_tx, s.resumed_id,
           n.source, e.batches = n.size, s.taken + e.batches, n.late_tx, n.tx, e.first_tx,
           case when e.first_tx = n.tx and n.id > -9223372036854775808 then n.id + 1 end, e.last_tx, e.last_id, e.batches,
           e.records, s.end_offset + e.records, e.bytes, s.end_bytes + e.bytes, greatest(s.max_timestamp, e.max_timestamp)
    from step s
    cross join lateral (
        select o.source, o.late_tx, least(64, $1::int - s.taken) as size,
               case when s.is_cut then s.last_tx else coalesce(o.late_tx, s.seen_tx) end as tx,
               case when s.is_cut then s.last_id
                    when o.late_tx is null then s.seen_id
                    when o.late_tx = s.resumed_tx then s.resumed_id
                    else -9223372036854775808 end as id
        from (select p.source, s.late[p.source] as late_tx
              from (select case when s.is_cut then s.source else s.source + 1 end as source) p) o
        offset 0
    ) n
    cross join lateral (
        select min(b.tx) as first_tx, max(b.tx) as last_tx, (array_agg(b.id order by b.tx, b.id))[n.size] as last_id,
               count(*)::int as batches, coalesce(sum(b.n_records), 0)::bigint as records,
               coalesce(sum(b.byte_length), 0)::bigint as bytes, max(b.max_timestamp) as max_timestamp
        from (
            select m.tx, m.id, m.n_records, m.byte_length, m.max_timestamp
            from tidemark.record_batch_events m
            where m.partition_id = s.partition_id and (m.tx, m.id) > (n.tx, n.id)
              and m.tx <= coalesce(n.late_tx, 9223372036854775807)
            order by m.tx, m.id
            limit n.size
        ) b
    ) e
    where s.taken < $1::int and (s.is_cut or s.source <= coalesce(cardinality(s.late), 0))
),
placed as (
    insert into tidemark.runs
        (start_offset, end_offset, end_bytes, max_timestamp, first_tx, last_tx, first_id, last_id, seen_tx, seen_id, pass_tx,
         partition_id, batches, skipped, late)
    select t.end_offset - t.records, t.end_offset, t.end_bytes, t.max_timestamp, t.first_tx, t.last_tx, t.first_id, t.last_id,
           case when t.late_tx is not null then t.seen_tx end, case when t.late_tx is not null then t.seen_id end,
           case when p.running[1] < case when t.late_tx is null then t.last_tx else t.seen_tx end then p.tx end,
           t.partition_id, t.batches,
           case when t.late_tx is null and width_bucket(t.from_tx, p.running) < width_bucket(t.last_tx, p.running) then
               p.running[width_bucket(t.first_tx, p.running) + 1:width_bucket(t.last_tx, p.running)] end,
           case when t.taken = $1::int then
               nullif(t.late[case when t.is_cut then t.source else t.source + 1 end:], '{}') end
    from step t
    cross join pass p
    where t.batches > 0
    returning pass_tx
),
remembered as (
    insert into tidemark.passes (tx, in_flight)
    select p.tx, p.running from pass p where exists (select from placed l where l.pass_tx is not null)
)
select t.partition_id, sum(t.batches)::int as events, sum(t.records)::bigint as records, sum(t.bytes)::bigint as bytes,
       count(*)::int as runs,
       -- A pass that stopped at its limit may have left something; any other one has not.
       bool_or(t.taken = $1::int and (
           t.source < coalesce(cardinality(t.late), 0)
           or exists (
               select from tidemark.record_batch_events h
               where h.partition_id = t.partition_id and h.tx = t.late_tx and h.id > t.last_id
           )
           or exists (
               select from tidemark.record_batch_events a
               where a.partition_id = t.partition_id
                 and (a.tx, a.id) > (case when t.late_tx is null then t.last_tx else t.seen_tx end,
                                     case when t.late_tx is null then t.last_id else t.seen_id end)
           )
       )) as has_more
from step t
where t.batches > 0
group by t.partition_id
