-- The log of one partition: $1 partition id.
select p.start_offset, p.end_offset
from tidemark.topic_partitions p
where p.id = $1::int
