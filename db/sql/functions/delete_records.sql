-- Deletes the records of a partition before an offset, which may lie inside of a batch; -1 is the end offset. Returns the start
-- offset of the log, which never goes back: an offset below it changes nothing, one beyond the end means the end. Readers see
-- it at once; retention deletes what lies before it.
-- Errors: TM003 unknown partition, TM007 an offset below -1, 25001 in another isolation level than read committed.
create or replace function tidemark.delete_records(partition_id int, before_offset bigint) returns bigint
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    ends record;
    start tidemark.log_starts;
    target bigint;
begin
    perform tidemark.lock_partition(delete_records.partition_id);
    select coalesce(max(n.end_offset), 0) as end_offset, coalesce(max(n.end_bytes), 0) as end_bytes
    into ends
    from tidemark.newest_run(delete_records.partition_id) n;
    select * into start from tidemark.log_start(delete_records.partition_id);
    if (before_offset >= -1) is not true then
        raise exception using
            errcode = 'TM007',
            message = format('partition id %s: no records lie before offset %s', partition_id,
                             coalesce(before_offset::text, 'NULL')),
            hint = 'Pass an offset of at least 0, or -1 for the end of the log.';
    end if;
    target := case when before_offset = -1 then ends.end_offset else least(before_offset, ends.end_offset) end;
    if target <= coalesce(start.start_offset, 0) then
        return coalesce(start.start_offset, 0);
    end if;
    insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, stale_run, partition_id)
    select target, coalesce(start.deleted_to, 0),
           coalesce((select r.end_bytes - (select sum(e.byte_length) from tidemark.run_events(r) e
                                           where e.start_offset + e.n_records > target)
                     from tidemark.run_at(delete_records.partition_id, target) r
                     where r.end_offset > target), ends.end_bytes),
           start.stale_run, delete_records.partition_id;
    delete from tidemark.log_starts l
    where l.partition_id = delete_records.partition_id and l.start_offset = start.start_offset
      and l.deleted_to = start.deleted_to;
    return target;
end
$$;
