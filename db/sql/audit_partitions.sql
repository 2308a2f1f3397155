-- The $2 partitions that follow partition id $1, and up to where each is audited.
select p.id, a.audited_to
from tidemark.topic_partitions p
left join tidemark.audit_progress a on a.partition_id = p.id
where p.id > $1::int
order by p.id
limit $2::int
