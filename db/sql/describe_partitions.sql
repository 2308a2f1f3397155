-- Partitions with their backlog: $1 topic names, null for all; $2 count a partition's events up to this number; $3 only those
-- with a backlog. `lag` is how many seconds ago the oldest pending event was committed.
with backlog as materialized (
    select b.partition_id, b.events, b.committed_at
    from (
        select array_agg(p.id) as ids
        from tidemark.topic_partitions p
        join tidemark.topics t on t.id = p.topic_id
        where $1::text[] is null or t.name = any ($1::text[])
    ) a
    cross join lateral tidemark.pending(a.ids, $2::int, null) b
)
select n.topic, n.partition, n.partition_id, n.start_offset, n.end_offset, n.byte_size, coalesce(b.events, 0),
       case when b.committed_at is not null then
           greatest(extract(epoch from clock_timestamp() - b.committed_at), 0)::float8
       end as lag
from tidemark.named_partitions n
left join backlog b on b.partition_id = n.partition_id
where ($1::text[] is null or n.topic = any ($1::text[])) and (b.events > 0 or not $3::boolean)
order by n.topic, n.partition
