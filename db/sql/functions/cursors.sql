-- The transactions that run in the caller's snapshot, its own aside, as places in the order of commits, ascending.
create or replace function tidemark.running_transactions() returns bigint[]
language sql stable parallel safe
begin atomic
    select array(
        select c.tx_base + x.xid::text::bigint
        from tidemark.cluster c, pg_snapshot_xip(pg_current_snapshot()) x(xid)
        order by 1
    );
end;

-- The newest run of a partition: it is the end of its log and its cursor. Like the next two it costs one descent, and becomes a
-- part of the query that calls it.
create or replace function tidemark.newest_run(partition_id int) returns setof tidemark.runs
language sql stable parallel safe
begin atomic
    select n.* from tidemark.runs n where n.partition_id = newest_run.partition_id order by n.start_offset desc limit 1;
end;

-- Where a log starts, once something was deleted from it.
create or replace function tidemark.log_start(partition_id int) returns setof tidemark.log_starts
language sql stable parallel safe
begin atomic
    select l.*
    from tidemark.log_starts l
    where l.partition_id = log_start.partition_id
    order by l.start_offset desc, l.deleted_to desc
    limit 1;
end;

-- The run that holds an offset, or the last one before it: many that are deleted may lie below the start of a log.
create or replace function tidemark.run_at(partition_id int, an_offset bigint) returns setof tidemark.runs
language sql stable parallel safe
begin atomic
    select f.*
    from tidemark.runs f
    where f.partition_id = run_at.partition_id and f.start_offset <= an_offset
    order by f.start_offset desc
    limit 1;
end;

-- The events of a run with their offsets, in order: those between its first and its last, but for transactions it skipped.
--
-- Always the same ones. What the run's pass saw lies below its snapshot's end; so whatever is neither visible in that
-- snapshot nor among the transactions it shows as running was rolled back, and appears to nobody.
create or replace function tidemark.run_events(run tidemark.runs)
returns table (
    start_offset bigint, tx bigint, id bigint, object_id bigint, byte_offset bigint, max_timestamp bigint, n_records int,
    byte_length int
)
language sql stable parallel safe
begin atomic
    select run.start_offset + sum(e.n_records) over (order by e.tx, e.id rows unbounded preceding) - e.n_records,
           e.tx, e.id, e.id >> 16, e.byte_offset, e.max_timestamp, e.n_records, e.byte_length
    from tidemark.record_batch_events e
    where e.partition_id = run.partition_id
      and (e.tx, e.id) >= (run.first_tx, coalesce(run.first_id, -9223372036854775808))
      and (e.tx, e.id) <= (run.last_tx, coalesce(run.last_id, 9223372036854775807))
      and (run.skipped is null or e.tx <> all (run.skipped));
end;

-- Where the logs of partitions end, and what is pending in them: events beyond (seen_tx, seen_id), and those of the transactions
-- `late`; of the one that is last_tx only those beyond last_id. What pending means stands here and in pending_events, below.
--
-- The newest run says it. Late are the transactions that were running below the position when it was made, are no longer, and
-- have events here: what is still running is not asked for. So are those that the run's pass did not place to their end; the
-- one it was at comes first, and is the run's last_tx. What the sweep found settled is not asked for again. Where the whole of
-- a transaction is placed, the id is the greatest.
--
-- Costs a descent for each partition, and the transactions of each pass once, however many partitions it served.
-- Without a search_path of its own, so that it becomes a part of the query that calls it; its names are bound when it is made.
-- "Offset 0" keeps the planner from computing one expression in several places.
create or replace function tidemark.cursors(partition_ids int[])
returns table (
    partition_id int, end_offset bigint, end_bytes bigint, max_timestamp bigint, seen_tx bigint, seen_id bigint,
    last_tx bigint, last_id bigint, late bigint[]
)
language sql stable parallel safe
begin atomic
    select m.partition_id, m.end_offset, m.end_bytes, m.max_timestamp, m.seen_tx, m.seen_id, m.last_tx, m.last_id, l.late
    from (
        select n.pass_tx, count(*) as size,
               array_agg(row(i.id, coalesce(n.end_offset, 0), coalesce(n.end_bytes, 0), n.max_timestamp,
                             coalesce(n.seen_tx, n.last_tx, 0),
                             coalesce(case when n.seen_tx is null then n.last_id else n.seen_id end, 9223372036854775807),
                             n.last_tx, coalesce(n.last_id, 9223372036854775807), n.late)) as members
        from unnest(cursors.partition_ids) i(id)
        left join lateral tidemark.newest_run(i.id) n on true
        group by n.pass_tx
    ) g
    cross join lateral (
        select array(
            select x.tx
            from tidemark.passes s
            cross join unnest(s.in_flight) x(tx)
            cross join (
                select w.settled_tx, w.unsettled from tidemark.sweeps w order by w.id desc limit 1
            ) w
            where s.tx = g.pass_tx and x.tx <> all (tidemark.running_transactions())
              and (x.tx >= w.settled_tx or x.tx = any (w.unsettled))
              -- What committed nothing is late nowhere: most open transactions are others' and not ours.
              and (select true from tidemark.objects o where o.tx = x.tx limit 1)
            order by x.tx
        ) as ended
        offset 0
    ) e
    -- For many partitions, those that the ended transactions touched: fewer to read than all partitions to probe for each.
    cross join lateral (
        select case when g.size * cardinality(e.ended) > 1000 then array(
            select distinct u.id
            from tidemark.objects o
            cross join unnest(o.partition_ids) u(id)
            where o.tx = any (e.ended)
            order by u.id
        ) end as touched
        offset 0
    ) t
    cross join lateral unnest(g.members) m(
        partition_id int, end_offset bigint, end_bytes bigint, max_timestamp bigint, seen_tx bigint, seen_id bigint,
        last_tx bigint, last_id bigint, late bigint[]
    )
    cross join lateral (
        select case when m.late is not null
                    or e.ended <> '{}'
                       and (t.touched is null or t.touched[width_bucket(m.partition_id, t.touched)] = m.partition_id)
               then nullif(array(
            select x.tx
            -- Those above the position are not late: they are beyond it.
            from unnest(m.late || e.ended[1:width_bucket(m.seen_tx, e.ended)]) x(tx)
            -- "Is true" keeps this a probe for each; as a join it would read all events of the partition.
            where (exists (
                select from tidemark.record_batch_events v
                where v.partition_id = m.partition_id and v.tx = x.tx
                  and v.id > case when x.tx = m.last_tx then m.last_id else -9223372036854775808 end
            )) is true
            order by x.tx <> m.last_tx, x.tx
        ), '{}') end as late
        offset 0
    ) l;
end;

-- The pending events of a partition: those beyond its position, then those of the late transactions. At most `most` beyond the
-- position and of each late transaction, null for no limit. The other arguments are a row of tidemark.cursors, which says what
-- they mean. Becomes a part of the query that calls it. (Placing has its own form of this: there the events are added up.)
create or replace function tidemark.pending_events(
    partition_id int, seen_tx bigint, seen_id bigint, last_tx bigint, last_id bigint, late bigint[], most int
)
returns table (tx bigint, object_id bigint, is_late boolean)
language sql stable parallel safe
begin atomic
    (select e.tx, e.id >> 16, false
     from tidemark.record_batch_events e
     where e.partition_id = pending_events.partition_id and (e.tx, e.id) > (seen_tx, seen_id)
     order by e.tx, e.id
     limit most)
    union all
    select x.tx, l.object_id, true
    from unnest(late) x(tx)
    cross join lateral (
        select m.id >> 16 as object_id
        from tidemark.record_batch_events m
        where m.partition_id = pending_events.partition_id and m.tx = x.tx
          and m.id > case when x.tx = last_tx then last_id else -9223372036854775808 end
        order by m.id
        limit most
    ) l;
end;
