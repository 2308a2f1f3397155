-- Locks a partition against whoever places or deletes its batches, before anything is read; what commits is not held up.
-- Errors: TM003 unknown partition, 25001 in another isolation level than read committed: there the caller would go on to read
-- what was there before the wait.
create or replace function tidemark.lock_partition(partition_id int) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception using
            errcode = '25001',
            message = 'a change to the start of a log has to see what is there after its wait for the lock',
            hint = 'Call it in a transaction with the isolation level read committed.';
    end if;
    perform from tidemark.topic_partitions p where p.id = lock_partition.partition_id for no key update;
    if not found then
        raise exception using
            errcode = 'TM003',
            message = format('partition id %s does not exist', coalesce(partition_id::text, 'NULL')),
            hint = 'Read the ids of a topic''s partitions with tidemark.partition_ids(topic).';
    end if;
end
$$;
