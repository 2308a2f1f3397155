-- The log of one partition: $1 partition id.
select p.start_offset, p.end_offset
from tidemark.named_partitions p
where p.partition_id = $1::int
