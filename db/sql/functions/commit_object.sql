-- The hot path: commits the record batches of one uploaded object, in one round trip, and returns the object's id.
--
-- One array element per batch; the order of the arrays is the order of offsets within a partition. max_timestamps are
-- milliseconds since the epoch. The same key with the same content is the same commit: it returns the first id and
-- writes nothing, also when both run at the same moment (the second waits for the first on objects_key_key).
--
-- Errors, each of which leaves nothing behind: TM001 malformed arguments, TM002 key committed with other content,
-- TM003 unknown partition, TM008 restored into another cluster.
--
-- Security definer: a producer role needs no right to any table.
create or replace function tidemark.commit_object(
    object_key text,
    partition_ids int[],
    n_records int[],
    byte_offsets bigint[],
    byte_lengths int[],
    max_timestamps bigint[]
) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    batches constant int := cardinality(partition_ids);
    digest bytea;
    touched int[];
    counts int[];
    new_id bigint;
    known bytea;
begin
    perform tidemark.require_own_cluster();

    -- Comparison with all() is one loop in C for each array, and null for an array that holds a null; anything but true is
    -- looked into, for a message that names the element.
    if object_key is null or octet_length(object_key) not between 1 and 1024
        or (batches >= 1 and array_ndims(partition_ids) = 1 and array_ndims(n_records) = 1 and array_ndims(byte_offsets) = 1
            and array_ndims(byte_lengths) = 1 and array_ndims(max_timestamps) = 1
            and cardinality(n_records) = batches and cardinality(byte_offsets) = batches
            and cardinality(byte_lengths) = batches and cardinality(max_timestamps) = batches
            and 0 < all (n_records) and 0 <= all (byte_offsets) and 0 <= all (byte_lengths)
            and array_position(partition_ids, null) is null
            and array_position(max_timestamps, null) is null) is not true
    then
        perform tidemark.explain_invalid_commit(
            object_key, partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps);
    end if;

    digest := sha256(record_send(row(partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps)));

    select array_agg(t.id order by t.id), array_agg(t.batches order by t.id)
    into touched, counts
    from (select u.id, count(*)::int as batches from (select unnest(partition_ids) as id) u group by u.id) t;

    -- No foreign key and no row lock: either would make commits write to the head rows that materialization updates.
    if (select count(*) from tidemark.topic_partitions p where p.id = any (touched)) <> cardinality(touched) then
        raise exception using
            errcode = 'TM003',
            message = format('object %s: partition id %s does not exist', quote_literal(object_key),
                             (select min(u.id) from unnest(touched) u(id)
                              where not exists (select from tidemark.topic_partitions p where p.id = u.id))),
            hint = 'Read the ids of a topic''s partitions with tidemark.partition_ids(topic).';
    end if;

    loop
        insert into tidemark.objects (key, content_hash, live_batches, partition_ids, batch_counts)
        values (object_key, digest, batches, touched, counts)
        on conflict on constraint objects_key_key do nothing
        returning id into new_id;
        exit when new_id is not null;

        -- A statement of its own, so that its snapshot sees the commit that the insert waited for.
        select o.id, o.content_hash into new_id, known from tidemark.objects o where o.key = object_key;
        -- Forgotten since the insert met it: the key is free now.
        continue when not found;
        if known <> digest then
            raise exception using
                errcode = 'TM002',
                message = format('object %s is committed already (id %s) with other batches',
                                 quote_literal(object_key), new_id),
                hint = 'Give every upload a key of its own; repeat a commit with exactly the arguments of the first.';
        end if;
        return new_id;
    end loop;

    insert into tidemark.record_batch_events
        (object_id, partition_id, n_records, byte_offset, byte_length, max_timestamp)
    -- In the list of columns, all in step, for the arrays are of one length; as a table, unnest would store the rows first.
    select new_id, unnest(partition_ids), unnest(n_records), unnest(byte_offsets), unnest(byte_lengths),
           unnest(max_timestamps);
    return new_id;
end
$$;
