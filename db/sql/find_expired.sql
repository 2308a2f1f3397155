-- Retention: the $2 partitions of topics with limits that follow partition id $1 in the order of (topic, partition), and whether
-- the oldest batch of each is to go. Takes no locks; what it finds is looked at again under lock. Partitions of topics without
-- limits are never read. The batch at the start offset is found by one index descent, which does not walk over the entries
-- of those deleted before it.
with after as materialized (
    select p.topic_id, p.partition
    from tidemark.topic_partitions p
    where p.id = $1::int
),
page as materialized (
    select p.*, t.retention_bytes,
           (extract(epoch from statement_timestamp()) * 1000)::bigint - t.retention_ms as expires_before
    from tidemark.topics t
    cross join lateral (
        select h.topic_id, h.partition, h.id, h.start_offset, h.end_offset, h.byte_size
        from tidemark.topic_partitions h
        where h.topic_id = t.id
          and h.partition > coalesce((select a.partition from after a where a.topic_id = t.id), -1)
        order by h.partition
        limit $2::int
    ) p
    where (t.retention_ms is not null or t.retention_bytes is not null)
      and t.id >= coalesce((select a.topic_id from after a), '00000000-0000-0000-0000-000000000000')
    order by t.id, p.partition
    limit $2::int
)
select p.id,
       coalesce(o.newest < p.expires_before, false)
           or coalesce(p.byte_size - o.byte_length >= p.retention_bytes, false) as expired
from page p
left join lateral (
    select b.byte_length,
           -- A batch without timestamps is as old as its commit.
           case when b.max_timestamp >= 0 then b.max_timestamp
                else (select (extract(epoch from c.committed_at) * 1000)::bigint
                      from tidemark.objects c where c.id = b.object_id)
           end as newest
    from tidemark.record_batches b
    where b.partition_id = p.id and b.start_offset <= p.start_offset and p.start_offset < p.end_offset
    order by b.start_offset desc
    limit 1
) o on true
order by p.topic_id, p.partition
