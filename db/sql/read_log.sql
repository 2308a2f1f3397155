-- All batches of partition $1 as they lie in the table, also where they break the rules that a fetch relies on.
select b.start_offset, b.n_records, coalesce(o.key, format('(no object %s)', b.object_id)), b.byte_offset, b.byte_length,
       b.max_timestamp
from tidemark.record_batches b
left join tidemark.objects o on o.id = b.object_id
where b.partition_id = $1::int
order by b.start_offset
