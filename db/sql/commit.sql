-- name: commit_object
-- $1 object key; one element per batch in: $2 partition ids, $3 numbers of records, $4 byte offsets, $5 byte lengths,
-- $6 greatest timestamps (milliseconds since the epoch).
select tidemark.commit_object($1::text, $2::int[], $3::int[], $4::bigint[], $5::int[], $6::bigint[]);

-- name: commit_batches
-- The same, with a verdict for each batch: $7 producer ids, $8 epochs, $9 sequences of the first records, or three nulls.
select c.object_id, c.verdicts
from tidemark.commit_batches(
    $1::text, $2::int[], $3::int[], $4::bigint[], $5::int[], $6::bigint[], $7::bigint[], $8::int[], $9::int[]) c;
