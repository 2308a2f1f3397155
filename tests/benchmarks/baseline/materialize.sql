-- The six steps in one statement: $1 events at most.
with locked_events as materialized (
    select e.id, e.topic_id, e.partition, e.n_records, e.s3_key, e.created_at
    from seed.record_batch_events e
    where not e.processed
    order by e.created_at
    limit $1::int
    for update skip locked
),
locked_partitions as materialized (
    select p.id, p.topic_id, p.partition, p.end_offset
    from seed.topic_partitions p
    where (p.topic_id, p.partition) in (select e.topic_id, e.partition from locked_events e)
    order by p.topic_id, p.partition
    for update of p
),
offsets as materialized (
    select e.id, e.topic_id, e.partition, e.n_records, e.s3_key,
           p.end_offset + sum(e.n_records) over (
               partition by e.topic_id, e.partition order by e.created_at, e.id rows unbounded preceding
           ) as end_offset
    from locked_events e
    join locked_partitions p on p.topic_id = e.topic_id and p.partition = e.partition
),
inserted as (
    insert into seed.record_batches (topic_id, partition, start_offset, end_offset, s3_key)
    select o.topic_id, o.partition, o.end_offset - o.n_records, o.end_offset, o.s3_key
    from offsets o
),
ends as (
    select o.topic_id, o.partition, max(o.end_offset) as end_offset from offsets o group by o.topic_id, o.partition
),
moved as (
    update seed.topic_partitions p
    set end_offset = e.end_offset
    from ends e
    where p.topic_id = e.topic_id and p.partition = e.partition
)
update seed.record_batch_events e
set processed = true
from offsets o
where o.id = e.id
