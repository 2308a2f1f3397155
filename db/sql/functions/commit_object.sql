-- As tidemark.commit_batches, all or nothing, of batches without producers; returns the object's id.
-- Errors as there, and TM001 for a malformed batch and TM003 for an unknown partition; each leaves nothing behind.
create or replace function tidemark.commit_object(
    object_key text, partition_ids int[], n_records int[], byte_offsets bigint[], byte_lengths int[], max_timestamps bigint[]
) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    done record;
begin
    done := tidemark.commit_batches(object_key, partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps);
    if 'accepted' <> any (done.verdicts) then
        if 'malformed' = any (done.verdicts) then
            perform tidemark.explain_invalid_commit(
                object_key, partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps);
        end if;
        raise exception using
            errcode = 'TM003',
            message = format('object %s: partition id %s does not exist', quote_literal(object_key),
                             (select min(u.id) from unnest(partition_ids, done.verdicts) u(id, verdict)
                              where u.verdict = 'unknown_partition')),
            hint = 'Read the ids of a topic''s partitions with tidemark.partition_ids(topic).';
    end if;
    return done.object_id;
end
$$;
