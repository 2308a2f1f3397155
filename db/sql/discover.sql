-- name: read_fan_out
-- How far the last fan-out got: commits up to seen_tx but those of the transactions in_flight are dispatched.
select f.seen_tx, f.in_flight
from tidemark.fan_outs f
order by f.id desc
limit 1;

-- name: find_committed
/*+ IndexScan(o objects_tx_idx) IndexScan(l objects_tx_idx) */
-- Partitions touched by commits that the last fan-out did not see, with the events each brought: $1 the last transaction it saw,
-- $2 those that were running then, $3 commits and $4 batches at most; where there are more, no partitions and
-- is_complete false. Says how far it got, for save_fan_out. Costs O(commits since), whatever the number of partitions.
with now as materialized (
    select c.tx_base + pg_snapshot_xmax(pg_current_snapshot())::text::bigint - 1 as seen_tx,
           tidemark.running_transactions() as running
    from tidemark.cluster c
),
fresh as materialized (
    (select l.id, l.batches, l.partition_ids, l.batch_counts
     from tidemark.objects l
     where l.tx = any (array(select x.tx from unnest($2::bigint[]) x(tx), now n where x.tx <> all (n.running)))
     limit $3::int)
    union all
    (select o.id, o.batches, o.partition_ids, o.batch_counts
     from tidemark.objects o
     where o.tx > $1::bigint
     order by o.tx
     limit $3::int)
),
-- An object touches no more partitions than it has batches, which are told without reading its arrays.
total as materialized (
    select count(*)::int as commits, count(*) < $3::int and coalesce(sum(f.batches), 0) <= $4::bigint as is_complete
    from fresh f
)
select n.seen_tx, n.running, t.commits, t.is_complete, p.partition_ids, p.events
from now n
cross join total t
cross join lateral (
    select coalesce(array_agg(g.id), '{}') as partition_ids, coalesce(array_agg(g.events), '{}') as events
    from (
        select u.id, sum(u.events)::bigint as events
        -- In the list of columns, row by row; as a table, unnest would first store what each object has. The arrays are as
        -- long as each other by constraint.
        from (select unnest(f.partition_ids) as id, unnest(f.batch_counts) as events from fresh f where t.is_complete) u
        group by u.id
    ) g
) p;

-- name: save_fan_out
-- Remembers how far a fan-out got: $1 the last transaction it saw, $2 those that were running. Appended, and the rows before it
-- deleted: one row that is updated would leave a version behind each time, all of which the next one reads under a held
-- snapshot. Never back: of two fan-outs at once the later one counts.
with saved as (
    insert into tidemark.fan_outs (seen_tx, in_flight)
    select $1::bigint, $2::bigint[]
    where (select f.seen_tx from tidemark.fan_outs f order by f.id desc limit 1) <= $1::bigint
    returning id
)
delete from tidemark.fan_outs f using saved s where f.id >= s.id - 10 and f.id < s.id;

-- name: begin_sweep
-- The moment a round of the sweep begins: the first transaction yet to come, those that run, and up to which transaction the
-- rounds before have deleted passes.
select c.tx_base + pg_snapshot_xmax(pg_current_snapshot())::text::bigint as next_tx, tidemark.running_transactions() as running,
       (select w.collected_tx from tidemark.sweeps w order by w.id desc limit 1) as collected_tx
from tidemark.cluster c;

-- name: find_pending
/*+ IndexScan(h topic_partitions_pkey) IndexOnlyScan(m record_batch_events_pkey) IndexOnlyScan(v record_batch_events_pkey)
    IndexOnlyScan(e record_batch_events_pkey) */
-- The sweep: the next partitions after id $1, $2 of them at most, with their pending events: how many up to $3, the first
-- transaction beyond the position and the late ones. It ends early when it has counted $4 events in all.
with page as materialized (
    select array(select h.id from tidemark.topic_partitions h where h.id > $1::int order by h.id limit $2::int) as ids
)
-- In this order the limits never hide the first event beyond the position.
select f.partition_id, count(f.tx)::int as events, min(f.tx) filter (where not f.is_late) as first_tx, f.late
from (
    select c.partition_id, c.late, x.tx, x.is_late
    from (select k.* from page p cross join lateral tidemark.cursors(p.ids) k order by k.partition_id) c
    left join lateral (
        select p.tx, p.is_late
        from tidemark.pending_events(c.partition_id, c.seen_tx, c.seen_id, c.last_tx, c.last_id, c.late, $3::int) p
        limit $3::int
    ) x on true
    limit $4::int
) f
group by f.partition_id, f.late
order by f.partition_id;

-- name: collect_passes
-- Deletes the oldest passes from transaction $1 on, $3 at most, up to the first that met a transaction at or above $2. One row:
-- how many, and the last. The next call begins there: under a held snapshot it would read the deleted ones again.
with page as materialized (
    select q.tx, bool_and(q.in_flight[cardinality(q.in_flight)] < $2::bigint) over (order by q.tx) as is_settled
    from (
        select p.tx, p.in_flight
        from tidemark.passes p
        where p.tx > $1::bigint and p.tx < $2::bigint
        order by p.tx
        limit $3::int
    ) q
),
gone as (
    delete from tidemark.passes p using page g where p.tx = g.tx and g.is_settled returning p.tx
)
select count(*)::int as passes, max(d.tx) as last_tx from gone d;

-- name: save_sweep
-- Remembers a full round of the sweep: the transactions below $1 but those of $2 are settled, and passes up to $3 deleted.
-- Appended like a fan-out's row. Never back: of two rounds at once the further one counts.
with saved as (
    insert into tidemark.sweeps (settled_tx, unsettled, collected_tx)
    select $1::bigint, $2::bigint[], $3::bigint
    where (select w.settled_tx from tidemark.sweeps w order by w.id desc limit 1) <= $1::bigint
    returning id
)
delete from tidemark.sweeps w using saved s where w.id >= s.id - 10 and w.id < s.id;
