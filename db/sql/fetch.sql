-- name: fetch_batches
-- $1 partition id, $2 from offset, $3 bytes at most, $4 batches at most.
select f.start_offset, f.n_records, f.object_key, f.byte_offset, f.byte_length, f.max_timestamp
from tidemark.fetch_batches($1::int, $2::bigint, $3::bigint, $4::int) f;

-- name: read_head
-- The log of one partition: $1 partition id.
select p.start_offset, p.end_offset
from tidemark.named_partitions p
where p.partition_id = $1::int;
