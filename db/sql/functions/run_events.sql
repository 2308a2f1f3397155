-- The events of a run with their offsets, in order: those between its first and its last, but for transactions it skipped.
--
-- Always the same ones. What the run's pass saw lies below its snapshot's end; so whatever is neither visible in that
-- snapshot nor among the transactions it shows as running was rolled back, and appears to nobody.
create or replace function tidemark.run_events(run tidemark.runs)
returns table (
    start_offset bigint, tx bigint, id bigint, object_id bigint, byte_offset bigint, max_timestamp bigint, n_records int,
    byte_length int
)
language sql stable parallel safe
begin atomic
    select run.start_offset + sum(e.n_records) over (order by e.tx, e.id rows unbounded preceding) - e.n_records,
           e.tx, e.id, e.object_id, e.byte_offset, e.max_timestamp, e.n_records, e.byte_length
    from tidemark.record_batch_events e
    where e.partition_id = run.partition_id
      and (e.tx, e.id) >= (run.first_tx, coalesce(run.first_id, -9223372036854775808))
      and (e.tx, e.id) <= (run.last_tx, coalesce(run.last_id, 9223372036854775807))
      and (run.skipped is null or e.tx <> all (run.skipped));
end;
