-- name: create_topic
-- $1 name, $2 number of partitions.
select tidemark.create_topic($1::text, $2::int);

-- name: partition_ids
-- $1 topic name.
select tidemark.partition_ids($1::text);

-- name: highest_partition_id
-- The partition id given last, 0 for none.
select coalesce(max(p.id), 0)
from tidemark.topic_partitions p;

-- name: name_partitions
-- Topic name and number of partitions $1.
select p.id, t.name, p.partition
from tidemark.topic_partitions p
join tidemark.topics t on t.id = p.topic_id
where p.id = any ($1::int[]);

-- name: set_retention
-- Sets both limits of topic $1, null for none: $2 milliseconds, $3 bytes.
update tidemark.topics
set retention_ms = $2::bigint, retention_bytes = $3::bigint
where name = $1::text;
