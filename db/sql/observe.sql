-- name: observe_heads
-- What a watcher sees in one snapshot: offsets of partitions $1, and the objects and records of the batches since the end
-- offset it knew of each, $2, where a run begins. Costs O(new batches).
select p.partition_id, p.start_offset, p.end_offset, n.records, n.object_ids
from unnest($1::int[], $2::bigint[]) known(id, end_offset)
join tidemark.named_partitions p on p.partition_id = known.id
cross join lateral (
    select coalesce(sum(b.n_records), 0)::bigint as records,
           coalesce(array_agg(b.object_id), '{}') as object_ids
    from tidemark.record_batches b
    where b.partition_id = known.id and b.run_start_offset >= known.end_offset
) n;
