-- Lets an empty partition begin at an offset: its first batch gets first_offset, and the log starts and ends there until then.
-- Batches that are committed and have no offset yet get theirs from first_offset on. 0, where a log begins anyway, changes
-- nothing.
--
-- It writes what retention leaves behind in a partition all of whose batches are deleted: the start of the log, and the run
-- before it, without events, as the cursor. So whoever reads a log needs to know nothing of this. The cursor stands before
-- every transaction there is or will be, so nothing that is committed is passed over.
-- Errors: TM003 unknown partition, TM007 an offset below 0 or beyond 2^62, TM015 a batch of the partition has, or had, an offset;
-- 25001 in another isolation level than read committed.
create or replace function tidemark.begin_at(partition_id int, first_offset bigint) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    end_offset bigint;
begin
    perform tidemark.lock_partition(begin_at.partition_id);
    -- The upper half of what a bigint holds is left for the batches: a partition at its end could take none.
    if (first_offset between 0 and 4611686018427387904) is not true then
        raise exception using
            errcode = 'TM007',
            message = format('partition id %s cannot begin at offset %s', partition_id, coalesce(first_offset::text, 'NULL')),
            hint = 'Pass an offset of 0 to 4611686018427387904.';
    end if;
    select n.end_offset into end_offset from tidemark.newest_run(begin_at.partition_id) n;
    if found then
        raise exception using
            errcode = 'TM015',
            message = format('partition id %s has had offsets up to %s already', partition_id, end_offset),
            hint = 'Choose where a log begins before its first batch has an offset, and once; or create another topic.';
    end if;
    if first_offset = 0 then
        return;
    end if;
    insert into tidemark.runs
        (start_offset, end_offset, end_bytes, max_timestamp, first_tx, last_tx, partition_id, batches)
    values (0, first_offset, 0, -1, 0, 0, begin_at.partition_id, 0);
    insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, stale_run, partition_id)
    values (first_offset, first_offset, 0, 0, begin_at.partition_id);
end
$$;
