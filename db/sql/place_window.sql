/*+ IndexScan(m record_batch_events_pkey) IndexScan(b record_batch_events_pkey) IndexOnlyScan(k record_batch_events_pkey)
    IndexOnlyScan(h record_batch_events_pkey) IndexOnlyScan(a record_batch_events_pkey) IndexScan(r runs_pkey)
    IndexScan(s passes_pkey) IndexScan(w sweeps_pkey) IndexScan(o objects_tx_idx) IndexOnlyScan(v record_batch_events_pkey)
    Set(enable_material off) */
-- As place_incremental, by a running sum over all that a partition gets instead of run by run: $1 events per partition at most.
-- It gives the same runs; the comments there say what they are.
with pass as materialized (
    select c.tx_base + pg_current_xact_id()::text::bigint as tx, tidemark.running_transactions() as running
    from tidemark.cluster c
),
cursor as materialized (
    select c.* from tidemark.cursors(current_setting('tidemark.locked')::int[]) c
),
run as materialized (
    select c.partition_id, c.late, c.seen_tx, c.seen_id, c.last_tx as resumed_tx, c.last_id as resumed_id,
           c.end_offset as base, c.end_bytes as base_bytes, greatest(c.max_timestamp, q.newest) as max_timestamp,
           q.source, q.late_tx, q.first_tx, q.last_tx, q.last_id, q.batches, q.records, q.bytes, q.taken, q.records_to,
           q.bytes_to, q.previous_id,
           -- Where the run before it in the same source ended, or where the source begins.
           coalesce(q.previous_tx, q.late_tx, c.seen_tx) as from_tx
    from cursor c
    -- How much of the limit the late transactions take.
    cross join lateral (
        select case when c.late is null then 0 else (
            select count(*)::int
            from (
                select
                from unnest(c.late) x(tx)
                cross join lateral (
                    select
                    from tidemark.record_batch_events k
                    where k.partition_id = c.partition_id and k.tx = x.tx
                      and k.id > case when x.tx = c.last_tx then c.last_id else -9223372036854775808 end
                    limit $1::int
                ) e
                limit $1::int
            ) t
        ) end as events
        offset 0
    ) l
    cross join lateral (
        select p.*,
               sum(p.batches) over upto as taken, sum(p.records) over upto as records_to, sum(p.bytes) over upto as bytes_to,
               max(p.max_timestamp) over upto as newest,
               lag(p.last_tx) over source as previous_tx, lag(p.last_id) over source as previous_id
        from (
            select f.source, f.late_tx, f.late_tx as first_tx, f.late_tx as last_tx,
                   max(f.id) filter (where f.n % 64 = 63 or f.total = $1::int) as last_id, count(*)::int as batches,
                   sum(f.n_records) as records, sum(f.byte_length) as bytes, max(f.max_timestamp) as max_timestamp,
                   f.n / 64 as number
            from (
                select x.source::int as source, x.tx as late_tx, e.*,
                       row_number() over (partition by x.source order by e.id rows unbounded preceding) - 1 as n,
                       row_number() over (order by x.source, e.id rows unbounded preceding) as total
                from unnest(c.late) with ordinality x(tx, source)
                cross join lateral (
                    select m.id, m.n_records, m.byte_length, m.max_timestamp
                    from tidemark.record_batch_events m
                    where m.partition_id = c.partition_id and m.tx = x.tx
                      and m.id > case when x.tx = c.last_tx then c.last_id else -9223372036854775808 end
                    order by m.id
                    limit $1::int
                ) e
                where c.late is not null
                order by x.source, e.id
                limit $1::int
            ) f
            group by f.source, f.late_tx, f.n / 64
            union all
            select coalesce(cardinality(c.late), 0) + 1, null, min(f.tx), max(f.tx),
                   max(f.id) filter (where f.n % 64 = 63 or f.n + 1 + l.events = $1::int), count(*)::int,
                   sum(f.n_records), sum(f.byte_length), max(f.max_timestamp), f.n / 64
            from (
                select e.*, row_number() over (order by e.tx, e.id rows unbounded preceding) - 1 as n
                from (
                    select b.tx, b.id, b.n_records, b.byte_length, b.max_timestamp
                    from tidemark.record_batch_events b
                    where b.partition_id = c.partition_id and (b.tx, b.id) > (c.seen_tx, c.seen_id)
                    order by b.tx, b.id
                    limit $1::int - l.events
                ) e
            ) f
            group by f.n / 64
        ) p
        window upto as (order by p.source, p.number rows unbounded preceding),
               source as (partition by p.source order by p.number rows unbounded preceding)
    ) q
),
placed as (
    insert into tidemark.runs
        (start_offset, end_offset, end_bytes, max_timestamp, first_tx, last_tx, first_id, last_id, seen_tx, seen_id, pass_tx,
         partition_id, batches, skipped, late)
    select t.base + t.records_to - t.records, t.base + t.records_to, t.base_bytes + t.bytes_to, t.max_timestamp,
           t.first_tx, t.last_tx,
           case when t.first_tx <> t.from_tx then null
                when t.previous_id is not null then t.previous_id + 1
                when t.late_tx is null then t.seen_id + 1
                when t.late_tx = t.resumed_tx then t.resumed_id + 1 end,
           t.last_id,
           case when t.late_tx is not null then t.seen_tx end, case when t.late_tx is not null then t.seen_id end,
           case when p.running[1] < case when t.late_tx is null then t.last_tx else t.seen_tx end then p.tx end,
           t.partition_id, t.batches,
           case when t.late_tx is null and width_bucket(t.from_tx, p.running) < width_bucket(t.last_tx, p.running) then
               p.running[width_bucket(t.first_tx, p.running) + 1:width_bucket(t.last_tx, p.running)] end,
           case when t.taken = $1::int then
               nullif(t.late[case when t.last_id is not null then t.source else t.source + 1 end:], '{}') end
    from run t
    cross join pass p
    returning pass_tx
),
remembered as (
    insert into tidemark.passes (tx, in_flight)
    select p.tx, p.running from pass p where exists (select from placed l where l.pass_tx is not null)
)
select t.partition_id, sum(t.batches)::int as events, sum(t.records)::bigint as records, sum(t.bytes)::bigint as bytes,
       count(*)::int as runs,
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
from run t
group by t.partition_id
