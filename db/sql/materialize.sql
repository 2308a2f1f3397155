-- name: transaction_settings
-- In every transaction that materializes or deletes, after `set transaction isolation level read committed`.
-- The planner is left no way to a plan that costs more as the log grows: statistics of a queue are always out of date, and a plan
-- cached for an empty table would scan a full one. A hash join would read a whole table in order to join a few rows, and so
-- would a nested loop over a materialized scan of what was a small table when the plan was made. With one plan
-- left there is no reason to plan again: without force_generic_plan the plan is made again for the first executions of a
-- prepared statement, and whenever the estimates look different, which costs more than placing a hundred events.
--
-- What gives offsets is durable before anybody is told (invariant 4): an offset that was seen must survive a crash, also where a
-- role's or a pooler's default is less. A stronger setting than `on` stays.
select set_config('enable_seqscan', 'off', true),
       set_config('enable_bitmapscan', 'off', true),
       set_config('enable_mergejoin', 'off', true),
       set_config('enable_hashjoin', 'off', true),
       set_config('enable_material', 'off', true),
       set_config('jit', 'off', true),
       set_config('plan_cache_mode', 'force_generic_plan', true),
       case when current_setting('synchronous_commit') in ('off', 'local') then
           set_config('synchronous_commit', 'on', true)
       end;

-- name: lock_partitions
/*+ IndexScan(p topic_partitions_pkey) */
-- Locks partitions in the order of their ids, the one lock order there is: $1 partition ids. A statement of its own, always:
-- one that waited for a lock and then read events would read them as they were before the wait, and give them offsets
-- twice. NO KEY UPDATE, so that whatever references a partition is not blocked.
--
-- One row: the ids that exist, and the seconds that this took. They are told by the server, for a client that sends the next
-- statement along with this one cannot see the moment between them. That statement reads the ids from the setting.
select coalesce(array_agg(l.id), '{}') as ids, extract(epoch from clock_timestamp() - statement_timestamp())::float8 as seconds,
       set_config('tidemark.locked', coalesce(array_agg(l.id), '{}')::text, true)
from (
    select p.id
    from tidemark.topic_partitions p
    where p.id = any ($1::int[]) and (select tidemark.tx_base() is not null)
    order by p.id
    for no key update of p
) l;

-- name: lock_free_partitions
/*+ IndexScan(p topic_partitions_pkey) */
-- As lock_partitions, for those that nobody else has locked; waits for none. The ids that are missing are locked or do not exist.
select coalesce(array_agg(l.id), '{}') as ids, extract(epoch from clock_timestamp() - statement_timestamp())::float8 as seconds,
       set_config('tidemark.locked', coalesce(array_agg(l.id), '{}')::text, true)
from (
    select p.id
    from tidemark.topic_partitions p
    where p.id = any ($1::int[]) and (select tidemark.tx_base() is not null)
    order by p.id
    for no key update of p skip locked
) l;

-- name: place_incremental
/*+ IndexScan(b record_batch_events_pkey) IndexOnlyScan(e record_batch_events_pkey) IndexOnlyScan(m record_batch_events_pkey)
    IndexScan(n runs_pkey) IndexScan(s passes_pkey) IndexScan(w sweeps_pkey) IndexScan(o objects_tx_idx)
    IndexOnlyScan(v record_batch_events_pkey) Set(enable_material off) */
-- Gives the pending events of locked partitions their offsets: $1 events per partition at most. The partitions are those that
-- lock_partitions put into the setting. Everything here is seen by one snapshot. One row for each partition that got any.
with recursive pass as materialized (
    select c.tx_base + pg_current_xact_id()::text::bigint as tx, tidemark.running_transactions() as running
    from tidemark.cluster c
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
    from tidemark.cursors(current_setting('tidemark.locked')::int[]) c
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
            select b.tx, b.id, b.n_records, b.byte_length, b.max_timestamp
            from tidemark.record_batch_events b
            where b.partition_id = s.partition_id and (b.tx, b.id) > (n.tx, n.id)
              and b.tx <= coalesce(n.late_tx, 9223372036854775807)
            order by b.tx, b.id
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
select t.partition_id, sum(t.batches)::int as events, sum(t.records)::bigint as records, sum(t.bytes)::bigint as log_bytes,
       count(*)::int as runs,
       -- A pass that stopped at its limit may have left something; any other one has not.
       bool_or(t.taken = $1::int and exists (
           select
           from tidemark.pending_events(
               t.partition_id, case when t.late_tx is null then t.last_tx else t.seen_tx end,
               case when t.late_tx is null then t.last_id else t.seen_id end, t.last_tx, t.last_id, t.late[t.source:], 1)
       )) as has_more
from step t
where t.batches > 0
group by t.partition_id;

-- name: place_window
/*+ IndexScan(a record_batch_events_pkey) IndexScan(b record_batch_events_pkey) IndexOnlyScan(k record_batch_events_pkey)
    IndexOnlyScan(e record_batch_events_pkey) IndexOnlyScan(m record_batch_events_pkey) IndexScan(n runs_pkey)
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
                    select a.id, a.n_records, a.byte_length, a.max_timestamp
                    from tidemark.record_batch_events a
                    where a.partition_id = c.partition_id and a.tx = x.tx
                      and a.id > case when x.tx = c.last_tx then c.last_id else -9223372036854775808 end
                    order by a.id
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
select t.partition_id, sum(t.batches)::int as events, sum(t.records)::bigint as records, sum(t.bytes)::bigint as log_bytes,
       count(*)::int as runs,
       bool_or(t.taken = $1::int and exists (
           select
           from tidemark.pending_events(
               t.partition_id, case when t.late_tx is null then t.last_tx else t.seen_tx end,
               case when t.late_tx is null then t.last_id else t.seen_id end, t.last_tx, t.last_id, t.late[t.source:], 1)
       )) as has_more
from run t
group by t.partition_id;

-- name: ages_of_run
-- For a sample of how long commits wait: the seconds since the commit of each event of a run, $1 partition, $2 how many newer
-- runs it has. A commit's time is when commit_object ran; its transaction may have ended later.
select extract(epoch from clock_timestamp() - o.committed_at)::float8 as seconds
from (
    select r as run
    from tidemark.runs r
    where r.partition_id = $1::int
    order by r.start_offset desc
    offset $2::int
    limit 1
) n
cross join lateral tidemark.run_events(n.run) e
join tidemark.objects o on o.id = e.object_id;
