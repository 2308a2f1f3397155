-- All batches of partition $1 as its runs have them, also where they break the rules that a fetch relies on.
select b.start_offset, b.n_records, coalesce(b.object_key, format('(no object %s)', b.object_id)), b.byte_offset, b.byte_length,
       b.max_timestamp_ms
from tidemark.record_batches b
where b.partition_id = $1::int
order by b.start_offset
