-- name: fetch_batches
-- $1 partition id, $2 from offset, $3 bytes at most, $4 batches at most.
select f.start_offset, f.n_records, f.object_key, f.byte_offset, f.byte_length, f.max_timestamp
from tidemark.fetch_batches($1::int, $2::bigint, $3::bigint, $4::int) f;

-- name: read_head
-- The log of one partition: $1 partition id.
select min(l.log_offset) as start_offset, max(l.log_offset) as end_offset
from tidemark.list_offsets(array[$1::int, $1::int], '{-2,-1}') l
having bool_and(l.error is null);

-- name: fetch_partitions
-- One element for each partition: $1 ids, $2 from offsets, $3 bytes at most; in all $4 bytes and $5 batches at most.
select f.*
from tidemark.fetch_partitions($1::int[], $2::bigint[], $3::bigint[], $4::bigint, $5::int) f;

-- name: list_offsets
-- $1 partition ids, $2 times.
select l.partition_id, l.error, l.log_offset, l.max_timestamp
from tidemark.list_offsets($1::int[], $2::bigint[]) l;

-- name: receipts
-- $1 object ids, $2 partitions that moved, or null.
select r.object_id, r.batch, r.partition_id, r.verdict, r.base_offset, r.is_pending
from tidemark.receipts($1::bigint[], $2::int[]) r;
