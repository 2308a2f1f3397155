-- Topics with the sums over their partitions, by name: $1 names, null for all of them.
select t.name, t.id, t.created_at, t.retention_ms, t.retention_bytes, t.partitions,
       coalesce(sum(p.start_offset), 0)::numeric, coalesce(sum(p.end_offset), 0)::numeric,
       coalesce(min(p.end_offset), 0), coalesce(max(p.end_offset), 0), coalesce(sum(p.byte_size), 0)::numeric
from tidemark.topics t
left join tidemark.named_partitions p on p.topic = t.name
where $1::text[] is null or t.name = any ($1::text[])
group by t.id
order by t.name
