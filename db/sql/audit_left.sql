-- Records an audit has yet to read, for a progress bar: $1 topic name, null for all.
select coalesce(sum(p.end_offset - greatest(p.start_offset, coalesce(a.audited_to, 0))), 0)::numeric
from tidemark.topic_partitions p
join tidemark.topics t on t.id = p.topic_id
left join tidemark.audit_progress a on a.partition_id = p.id
where $1::text is null or t.name = $1::text
