-- The hot path: commits the record batches of one uploaded object, in one round trip. Returns the object's id and a verdict for
-- each batch, in the order of the request. What is accepted is committed; a batch that is not harms none of the others.
--
-- One array element per batch; the order of the arrays is the order of offsets within a partition. max_timestamps are
-- milliseconds since the epoch, up to the year 9999, and -1 for none. The same key with the same content is the same commit:
-- it returns the first id and the first verdicts and writes nothing, also when both run at the same moment (the second waits
-- for the first on objects_key_key). A key none of whose batches was accepted is listed for deletion.
--
-- Verdicts are called as Kafka's errors: accepted, malformed, unknown_partition; and of the batches of idempotent producers
-- duplicate, out_of_order_sequence, fenced_epoch. Such a batch has a producer id (null or -1: none), an epoch and the sequence
-- of its first record. Sequences count by producer and partition, from 0 to 2147483647 and then from 0. A new epoch
-- begins at 0, and so does a producer that the partition does not know. One of the last five batches once more is a duplicate:
-- it appends nothing, and tidemark.receipts has the offset of the first one. An epoch older than the newest is fenced.
--
-- Order: if this returned (in a transaction block: if that was committed) before another transaction was given its id, its
-- offsets are lower. A transaction has its id from its first write on. Inside a block that has written before, the call's
-- own beginning counts for nothing.
--
-- Errors, each of which leaves nothing behind: TM001 malformed arguments, TM002 key committed with other content,
-- TM008 restored into another cluster, TM010 more than 65,536 batches, TM012 key condemned; 40001 where another session
-- committed batches of the same producer to the same partition meanwhile, and repeating the call settles it.
--
-- Security definer: a producer role needs no right to any table.
create or replace function tidemark.commit_batches(
    object_key text, partition_ids int[], n_records int[], byte_offsets bigint[], byte_lengths int[], max_timestamps bigint[],
    producer_ids bigint[] default null, producer_epochs int[] default null, base_sequences int[] default null,
    out object_id bigint, out verdicts text[]
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
-- A session keeps its plans: one made for an empty table must not read a full one.
set enable_seqscan = off
-- Without it each call plans for its own arrays, which takes half of a small commit's time.
set plan_cache_mode = force_generic_plan
as $$
declare
    batches constant int := cardinality(partition_ids);
    base bigint;
    tx bigint;
    digest bytea;
    touched int[];
    counts int[];
    all_sound boolean;
    all_accepted boolean;
    -- Of duplicates: the events of the first ones.
    first_txs bigint[];
    first_ids bigint[];
    -- The commit that has the key already.
    met boolean := false;
    known tidemark.objects;
    refused record;
begin
    -- What is acknowledged must survive a crash (invariant 4), whatever the role's or a pooler's default. A stronger setting than
    -- `on` stays.
    if current_setting('synchronous_commit') in ('off', 'local') then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    base := tidemark.tx_base();

    if (octet_length(object_key) between 1 and 1024
        and batches >= 1 and array_ndims(partition_ids) = 1 and array_ndims(n_records) = 1 and array_ndims(byte_offsets) = 1
        and array_ndims(byte_lengths) = 1 and array_ndims(max_timestamps) = 1
        and cardinality(n_records) = batches and cardinality(byte_offsets) = batches
        and cardinality(byte_lengths) = batches and cardinality(max_timestamps) = batches
        and (num_nulls(producer_ids, producer_epochs, base_sequences) = 3
             or array_ndims(producer_ids) = 1 and array_ndims(producer_epochs) = 1 and array_ndims(base_sequences) = 1
                and cardinality(producer_ids) = batches and cardinality(producer_epochs) = batches
                and cardinality(base_sequences) = batches)) is not true
    then
        perform tidemark.explain_invalid_commit(object_key, partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps,
                                                producer_ids, producer_epochs, base_sequences);
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
        or array_lower(byte_lengths, 1) <> 1 or array_lower(max_timestamps, 1) <> 1 or array_lower(producer_ids, 1) <> 1
        or array_lower(producer_epochs, 1) <> 1 or array_lower(base_sequences, 1) <> 1 then
        partition_ids := partition_ids[:];
        n_records := n_records[:];
        byte_offsets := byte_offsets[:];
        byte_lengths := byte_lengths[:];
        max_timestamps := max_timestamps[:];
        producer_ids := producer_ids[:];
        producer_epochs := producer_epochs[:];
        base_sequences := base_sequences[:];
    end if;
    digest := record_send(row(partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps));
    if producer_ids is not null then
        digest := digest || record_send(row(producer_ids, producer_epochs, base_sequences));
    end if;
    digest := sha256(digest);

    -- The transaction gets its id before the partitions are looked up. So whoever deletes a partition, and then sees that no
    -- older transaction runs, knows that nothing more is committed to it.
    tx := base + pg_current_xact_id()::text::bigint;
    object_id := nextval('tidemark.objects_id_seq');

    select array_agg(t.id order by t.id), array_agg(t.batches order by t.id)
    into touched, counts
    from (select u.id, count(*)::int as batches from (select unnest(partition_ids) as id) u group by u.id) t;

    -- Comparison with all() is one loop in C for each array, and null for an array that holds a null. No foreign key and no row
    -- lock for the partitions: either would make commits write to the rows that materializing locks.
    all_sound := (
        0 < all (n_records) and 0 <= all (byte_offsets) and 0 <= all (byte_lengths)
        -- The end of the year 9999: what is later was not given in milliseconds.
        and 253402300799999 >= all (max_timestamps) and array_position(partition_ids, null) is null
        and (select count(*) from tidemark.topic_partitions p where p.id = any (touched)) = cardinality(touched)
    ) is true;

    loop
        -- Before sequences are claimed: of a commit that is repeated they are its own.
        if met or producer_ids is not null then
            select * into known from tidemark.objects o where o.key = object_key;
            exit when found;
        end if;
        all_accepted := all_sound and (producer_ids is null or tidemark.claim_sequences(
            tx, object_id << 16, partition_ids, n_records, producer_ids, producer_epochs, base_sequences));
        if all_accepted then
            verdicts := array_fill('accepted'::text, array[batches]);
        else
            select j.verdicts, j.first_txs, j.first_ids
            into verdicts, first_txs, first_ids
            from tidemark.judge_batches(tx, object_id << 16, partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps,
                                        producer_ids, producer_epochs, base_sequences) j;
            select coalesce(array_agg(t.id order by t.id), '{}'), coalesce(array_agg(t.batches order by t.id), '{}')
            into touched, counts
            from (
                select u.id, count(*)::int as batches
                from unnest(partition_ids, verdicts) u(id, verdict)
                where u.verdict = 'accepted'
                group by u.id
            ) t;
        end if;
        insert into tidemark.objects (id, tx, key, content_hash, batches, partition_ids, batch_counts)
        overriding system value
        values (object_id, tx, object_key, digest, case when all_accepted then batches
                else cardinality(array_positions(verdicts, 'accepted')) end, touched, counts)
        on conflict on constraint objects_key_key do nothing;
        exit when found;
        -- Another session has committed the key. The next look sees that, or that it is forgotten since.
        met := true;
        if producer_ids is not null and 'accepted' = any (verdicts) then
            perform tidemark.raise_sequence_race();
        end if;
    end loop;

    if known.id is not null then
        if known.content_hash <> digest then
            raise exception using
                errcode = case when known.content_hash = '' then 'TM012' else 'TM002' end,
                message = format(case when known.content_hash = '' then 'object %s is condemned: it is deleted from storage'
                                      else 'object %s is committed already (id %s) with other batches' end,
                                 quote_literal(object_key), known.id),
                hint = 'Give every upload a key of its own; repeat a commit with exactly the arguments of the first.';
        end if;
        object_id := known.id;
        verdicts := array_fill('accepted'::text, array[batches]);
        for refused in select r.position, r.verdict from tidemark.refused_batches r where r.object_id = known.id loop
            verdicts[refused.position + 1] := refused.verdict;
        end loop;
        -- Nothing was written, so committing would wait for nothing, and this be acknowledged before the first commit is
        -- durable: it may have been asynchronous, or its session ended while it waited for a standby. A record in the log
        -- makes this transaction wait for all that was logged before.
        perform pg_logical_emit_message(true, 'tidemark', '');
        return;
    end if;

    if all_accepted then
        insert into tidemark.record_batch_events
            (tx, id, partition_id, n_records, byte_offset, byte_length, max_timestamp)
        -- In the list of columns, all in step, for the arrays are of one length; as a table, unnest would store the rows first.
        select tx, (object_id << 16) + generate_series(0, batches - 1), unnest(partition_ids), unnest(n_records),
               unnest(byte_offsets), unnest(byte_lengths), unnest(max_timestamps);
        return;
    end if;
    insert into tidemark.record_batch_events
        (tx, id, partition_id, n_records, byte_offset, byte_length, max_timestamp)
    select tx, (object_id << 16) + b.n - 1, b.partition_id, b.n_records, b.byte_offset, b.byte_length, b.max_timestamp
    from unnest(partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps, verdicts) with ordinality
        as b(partition_id, n_records, byte_offset, byte_length, max_timestamp, verdict, n)
    where b.verdict = 'accepted'
    order by b.n;
    insert into tidemark.refused_batches (object_id, position, partition_id, verdict, first_tx, first_id)
    select object_id, b.n - 1, b.partition_id, b.verdict, b.first_tx, b.first_id
    from unnest(partition_ids, verdicts, first_txs, first_ids) with ordinality as b(partition_id, verdict, first_tx, first_id, n)
    where b.verdict <> 'accepted';
    if touched = '{}' then
        insert into tidemark.dead_objects (object_id) values (object_id);
    end if;
end
$$;
