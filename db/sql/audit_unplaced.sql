-- Audit: those of the consumed events (xid $2, id $3) of partition $1 that have no batch anywhere in the log. Reads all of it,
-- once, so it is asked only about events that audit_events.sql suspects.
-- "Is true" keeps the planner from turning the lookups into joins: they stay hash tables, however wrong its estimates.
with suspect as materialized (
    select e.xid, e.id, e.object_id, e.byte_offset, e.byte_length, e.n_records
    from unnest($2::text[], $3::bigint[]) s(xid, id)
    join tidemark.record_batch_events e on e.partition_id = $1::int and e.xid = s.xid::xid8 and e.id = s.id
),
placed as materialized (
    select b.object_id, b.byte_offset, b.byte_length, b.n_records
    from tidemark.record_batches b
    where b.partition_id = $1::int
      and (b.object_id in (select s.object_id from suspect s)) is true
)
select s.xid::text, s.id, s.object_id, s.n_records, count(*) over () as events
from suspect s
where ((s.object_id, s.byte_offset, s.byte_length, s.n_records)
       in (select t.object_id, t.byte_offset, t.byte_length, t.n_records from placed t)) is not true
order by s.xid, s.id
limit 1
