-- The hot path: commits the record batches of one uploaded object, in one round trip, and returns the object's id.
--
-- One array element per batch; the order of the arrays is the order of offsets within a partition. max_timestamps are
-- milliseconds since the epoch, up to the year 9999, and -1 for none. The same key with the same content is the same commit:
-- it returns the first id and writes no batches, also when both run at the same moment (the second waits for the first on
-- objects_key_key).
--
-- Order: if this returned (in a transaction block: if that was committed) before another transaction was given its id, its
-- offsets are lower. A transaction has its id from its first write on. Inside a block that has written before, the call's
-- own beginning counts for nothing.
--
-- Errors, each of which leaves nothing behind: TM001 malformed arguments, TM002 key committed with other content,
-- TM003 unknown partition, TM008 restored into another cluster, TM010 more than 65,536 batches.
--
-- Security definer: a producer role needs no right to any table.
create or replace function tidemark.commit_object(
    object_key text, partition_ids int[], n_records int[], byte_offsets bigint[], byte_lengths int[], max_timestamps bigint[]
) returns bigint
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    batches constant int := cardinality(partition_ids);
    digest bytea;
    base bigint;
    tx bigint;
    touched int[];
    counts int[];
    new_id bigint;
    known bytea;
begin
    -- What is acknowledged must survive a crash (invariant 4), whatever the role's or a pooler's default. A stronger setting than
    -- `on` stays.
    if current_setting('synchronous_commit') in ('off', 'local') then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    base := tidemark.tx_base();

    -- Comparison with all() is one loop in C for each array, and null for an array that holds a null; anything but true is
    -- looked into, for a message that names the element.
    if object_key is null or octet_length(object_key) not between 1 and 1024
        or (batches >= 1 and array_ndims(partition_ids) = 1 and array_ndims(n_records) = 1 and array_ndims(byte_offsets) = 1
            and array_ndims(byte_lengths) = 1 and array_ndims(max_timestamps) = 1
            and cardinality(n_records) = batches and cardinality(byte_offsets) = batches
            and cardinality(byte_lengths) = batches and cardinality(max_timestamps) = batches
            and 0 < all (n_records) and 0 <= all (byte_offsets) and 0 <= all (byte_lengths)
            -- The end of the year 9999: what is later was not given in milliseconds.
            and 253402300799999 >= all (max_timestamps)
            and array_position(partition_ids, null) is null) is not true
    then
        perform tidemark.explain_invalid_commit(
            object_key, partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps);
    end if;

    -- Before anything is done for each batch: a commit holds the log for as long as it takes to place it.
    if batches > 65536 then
        raise exception using
            errcode = 'TM010',
            message = format('object %s has %s batches', quote_literal(object_key), batches),
            hint = 'Commit at most 65536 batches in one call; divide the object.';
    end if;

    -- The same content is the same commit, whatever the arrays' lower bounds.
    if array_lower(partition_ids, 1) <> 1 or array_lower(n_records, 1) <> 1 or array_lower(byte_offsets, 1) <> 1
        or array_lower(byte_lengths, 1) <> 1 or array_lower(max_timestamps, 1) <> 1 then
        partition_ids := partition_ids[:];
        n_records := n_records[:];
        byte_offsets := byte_offsets[:];
        byte_lengths := byte_lengths[:];
        max_timestamps := max_timestamps[:];
    end if;
    digest := sha256(record_send(row(partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps)));

    select array_agg(t.id order by t.id), array_agg(t.batches order by t.id)
    into touched, counts
    from (select u.id, count(*)::int as batches from (select unnest(partition_ids) as id) u group by u.id) t;

    -- No foreign key and no row lock: either would make commits write to the rows that materializing locks.
    if (select count(*) from tidemark.topic_partitions p where p.id = any (touched)) <> cardinality(touched) then
        raise exception using
            errcode = 'TM003',
            message = format('object %s: partition id %s does not exist', quote_literal(object_key),
                             (select min(u.id) from unnest(touched) u(id)
                              where not exists (select from tidemark.topic_partitions p where p.id = u.id))),
            hint = 'Read the ids of a topic''s partitions with tidemark.partition_ids(topic).';
    end if;

    tx := base + pg_current_xact_id()::text::bigint;
    loop
        insert into tidemark.objects (tx, key, content_hash, batches, partition_ids, batch_counts)
        values (tx, object_key, digest, batches, touched, counts)
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
        -- Nothing was written, so committing would wait for nothing, and this be acknowledged before the first commit is
        -- durable: it may have been asynchronous, or its session ended while it waited for a standby. A record in the log
        -- makes this transaction wait for all that was logged before.
        perform pg_logical_emit_message(true, 'tidemark', '');
        return new_id;
    end loop;

    insert into tidemark.record_batch_events
        (tx, object_id, partition_id, n_records, byte_offset, byte_length, max_timestamp)
    -- In the list of columns, all in step, for the arrays are of one length; as a table, unnest would store the rows first.
    select tx, new_id, unnest(partition_ids), unnest(n_records), unnest(byte_offsets), unnest(byte_lengths),
           unnest(max_timestamps);
    return new_id;
end
$$;
