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
) p
