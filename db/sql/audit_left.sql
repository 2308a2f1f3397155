-- Records an audit has yet to read, for a progress bar: $1 topic name, null for all.
select coalesce(sum(p.end_offset - greatest(p.start_offset, a.audited_to)), 0)::numeric
from tidemark.named_partitions p
left join tidemark.audit_progress a on a.partition_id = p.partition_id
where $1::text is null or p.topic = $1::text
