/*+ IndexScan(o objects_xid_idx) */
-- Partitions touched by commits that the last fan-out did not see, with the events each brought: $1 first transaction that was
-- yet to come then, $2 those that were running, $3 commits to read at most. The rows carry the snapshot they were read in,
-- for save_fan_out_state. Costs O(commits since), whatever the number of partitions.
with fresh as materialized (
    (select o.partition_ids, o.batch_counts
     from tidemark.objects o
     where o.xid = any ($2::xid8[]))
    union all
    (select o.partition_ids, o.batch_counts
     from tidemark.objects o
     where o.xid >= $1::xid8
     order by o.xid
     limit $3::int)
)
select pg_current_snapshot()::text as snapshot,
       (select count(*) from fresh) as commits,
       coalesce(array_agg(t.id), '{}') as partition_ids,
       coalesce(array_agg(t.events), '{}') as events
from (
    select u.id, sum(u.events)::int as events
    -- In the list of columns, row by row; as a table, unnest would first store what each object has. The arrays are as long as
    -- each other by constraint.
    from (select unnest(f.partition_ids) as id, unnest(f.batch_counts) as events from fresh f) u
    group by u.id
) t
