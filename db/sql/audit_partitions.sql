-- The $2 partitions, of topic $3 or of all, that follow partition id $1; and up to where each is audited.
select p.id, a.audited_to
from tidemark.topic_partitions p
left join tidemark.audit_progress a on a.partition_id = p.id
where p.id > $1::int and ($3::text is null or p.topic_id = (select t.id from tidemark.topics t where t.name = $3::text))
order by p.id
limit $2::int
