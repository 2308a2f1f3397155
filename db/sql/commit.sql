-- name: commit_object
-- $1 object key; one element per batch in: $2 partition ids, $3 numbers of records, $4 byte offsets, $5 byte lengths,
-- $6 greatest timestamps (milliseconds since the epoch).
select tidemark.commit_object($1::text, $2::int[], $3::int[], $4::bigint[], $5::int[], $6::bigint[]);
