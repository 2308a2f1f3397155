-- For people in psql: names in place of ids, times in place of milliseconds. Programs call the functions.
create or replace view tidemark.named_record_batches as
select t.name as topic, p.partition, b.start_offset, b.start_offset + b.n_records as end_offset, b.n_records,
       o.key as object_key, b.byte_offset, b.byte_length, -- What no calendar holds is null.
       case when b.max_timestamp between -62135596800000 and 253402300799999
           then to_timestamp(b.max_timestamp / 1000.0) end as max_timestamp,
       o.committed_at
from tidemark.record_batches b
join tidemark.topic_partitions p on p.id = b.partition_id
join tidemark.topics t on t.id = p.topic_id
join tidemark.objects o on o.id = b.object_id;

create or replace view tidemark.named_record_batch_events as
select t.name as topic, p.partition, e.xid, e.id,
       (e.xid, e.id) > (p.seen_xid, p.seen_id) or e.xid = any (p.in_flight) as pending, e.n_records,
       o.key as object_key, e.byte_offset, e.byte_length, -- What no calendar holds is null.
       case when e.max_timestamp between -62135596800000 and 253402300799999
           then to_timestamp(e.max_timestamp / 1000.0) end as max_timestamp,
       o.committed_at
from tidemark.record_batch_events e
join tidemark.topic_partitions p on p.id = e.partition_id
join tidemark.topics t on t.id = p.topic_id
join tidemark.objects o on o.id = e.object_id;

create or replace view tidemark.named_partitions as
select t.name as topic, p.partition, p.id as partition_id, p.start_offset, p.end_offset, p.byte_size, p.seen_xid,
       p.seen_id, p.in_flight
from tidemark.topic_partitions p
join tidemark.topics t on t.id = p.topic_id;
