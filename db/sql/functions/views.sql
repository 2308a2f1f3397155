-- For people in psql: names in place of ids, times in place of milliseconds. Programs call the functions.

-- Each batch with its offset. Its own offsets are added up when a run is read, so a condition on them alone reads the whole
-- partition. Cheap: where partition_id = … and run_end_offset > from and run_start_offset <= to.
create or replace view tidemark.record_batches as
select t.name as topic, p.partition, p.id as partition_id, e.start_offset, e.start_offset + e.n_records as end_offset,
       e.n_records, o.key as object_key, e.byte_offset, e.byte_length, e.max_timestamp as max_timestamp_ms,
       -- What no calendar holds is null.
       case when e.max_timestamp between -62135596800000 and 253402300799999
           then to_timestamp(e.max_timestamp / 1000.0) end as max_timestamp,
       o.committed_at, e.object_id, r.start_offset as run_start_offset, r.end_offset as run_end_offset
from tidemark.topic_partitions p
join tidemark.topics t on t.id = p.topic_id
join tidemark.runs r on r.partition_id = p.id
cross join lateral tidemark.run_events(r) e
-- No row only where an invariant is broken: the batch is shown all the same.
left join tidemark.objects o on o.id = e.object_id
left join lateral tidemark.log_start(p.id) s on true
-- What lies before the start is deleted, though it may still be there.
where (s.start_offset >= e.start_offset + e.n_records) is not true;

create or replace view tidemark.named_partitions as
select t.name as topic, p.partition, p.id as partition_id, coalesce(s.start_offset, 0) as start_offset,
       coalesce(r.end_offset, 0) as end_offset, coalesce(r.end_bytes, 0) - coalesce(s.start_bytes, 0) as byte_size
from tidemark.topic_partitions p
join tidemark.topics t on t.id = p.topic_id
left join lateral (
    select n.end_offset, n.end_bytes
    from tidemark.runs n
    where n.partition_id = p.id
    order by n.start_offset desc
    limit 1
) r on true
left join lateral (
    select l.start_offset, l.start_bytes
    from tidemark.log_starts l
    where l.partition_id = p.id
    order by l.start_offset desc
    limit 1
) s on true;

create or replace view tidemark.named_record_batch_events as
select t.name as topic, p.partition, e.tx, e.id,
       (e.tx, e.id) > (coalesce(c.seen_tx, 0), coalesce(c.seen_id, 9223372036854775807))
           or (coalesce(e.tx = any (c.late), false) and not (e.tx = c.last_tx and e.id <= c.last_id)) as pending,
       e.n_records, o.key as object_key, e.byte_offset, e.byte_length,
       case when e.max_timestamp between -62135596800000 and 253402300799999
           then to_timestamp(e.max_timestamp / 1000.0) end as max_timestamp,
       o.committed_at
from tidemark.record_batch_events e
join tidemark.topic_partitions p on p.id = e.partition_id
join tidemark.topics t on t.id = p.topic_id
cross join lateral tidemark.cursors(array[p.id]) c
join tidemark.objects o on o.id = e.id >> 16;
