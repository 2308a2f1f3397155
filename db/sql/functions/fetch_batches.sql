-- The read path: batches of a partition from an offset on, in order. The first one contains the offset, perhaps in its
-- middle. At most max_batches of them and no more than fit into max_bytes, but at_least_one where there is one; nothing at
-- the end offset. Reads no more than the events it returns, those before them in the first run, and their runs.
--
-- Stable: all its statements see the caller's snapshot, so the offsets checked belong to the batches returned.
-- Errors: TM003 unknown partition, TM007 offset outside [start offset, end offset], TM009 limits below 1, TM011 (on a standby)
-- offset beyond what has arrived here.
--
-- Security definer, as all that readers call: a consumer role needs no right to any table. It costs nothing, for the settings
-- below keep the function from becoming a part of the query that calls it anyway.
create or replace function tidemark.fetch_batches(
    partition_id int, from_offset bigint, max_bytes bigint, max_batches int, at_least_one boolean default true
) returns table (start_offset bigint, n_records int, object_key text, byte_offset bigint, byte_length int, max_timestamp bigint)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
-- A session keeps its plans: one made for an empty table must not read a full one.
set enable_seqscan = off
set enable_bitmapscan = off
-- Without it each call plans for its own arrays, which takes as long as reading twenty batches.
set plan_cache_mode = force_generic_plan
as $$
declare
    head record;
    run record;
    skipped_tx bigint;
    -- Ranges of the key whose events follow each other in the log.
    n int := 0;
    first_txs bigint[];
    first_ids bigint[];
    last_txs bigint[];
    last_ids bigint[];
    -- Where the ranges at hand begin.
    base bigint;
    run_by_run boolean;
    was_late boolean := true;
    first_bytes bigint;
    fetched int := 0;
    bytes bigint := 0;
    code text;
    named text;
begin
    -- A descent each: the newest run, the log's start, the run that has the offset, and the first one behind it that is apart:
    -- its events, or those before it, do not follow the others in the key.
    select e.end_offset, coalesce(e.seen_tx, e.last_tx) as end_tx,
           case when e.seen_tx is null then e.last_id else e.seen_id end as end_id,
           coalesce(s.start_offset, 0) as log_start, r.*, a.start_offset as apart
    into head
    from (
        select w.end_offset, w.last_tx, w.last_id, w.seen_tx, w.seen_id
        from tidemark.runs w
        -- The runs of a deleted partition go little by little.
        where w.partition_id = fetch_batches.partition_id
          and (select true from tidemark.topic_partitions p where p.id = fetch_batches.partition_id)
        order by w.start_offset desc
        limit 1
    ) e
    left join lateral (
        select l.start_offset
        from tidemark.log_starts l
        where l.partition_id = fetch_batches.partition_id
        order by l.start_offset desc
        limit 1
    ) s on true
    left join lateral (
        select c.start_offset, c.first_tx, c.first_id, c.seen_tx is not null or coalesce(c.skipped <> '{}', false) as is_apart
        from tidemark.runs c
        where c.partition_id = fetch_batches.partition_id and c.start_offset <= from_offset
        order by c.start_offset desc
        limit 1
    ) r on true
    left join lateral (
        select d.start_offset
        from tidemark.runs d
        where d.partition_id = fetch_batches.partition_id and d.start_offset > from_offset
          and (d.seen_tx is not null or d.skipped is not null)
        order by d.start_offset
        limit 1
    ) a on true;
    if not found then
        if not exists (select from tidemark.topic_partitions p where p.id = fetch_batches.partition_id) then
            raise exception using
                errcode = 'TM003',
                message = format('partition id %s does not exist', coalesce(partition_id::text, 'NULL')),
                hint = 'Read the ids of a topic''s partitions with tidemark.partition_ids(topic).';
        end if;
        head.end_offset := 0;
        head.log_start := 0;
    end if;
    code := case
        when (max_bytes >= 1 and max_batches >= 1 and from_offset is not null) is not true then 'TM009'
        when from_offset > head.end_offset and pg_is_in_recovery() then 'TM011'
        when from_offset < head.log_start or from_offset > head.end_offset then 'TM007'
    end;
    if code is not null then
        select format('%s/%s', t.name, p.partition) into named
        from tidemark.topic_partitions p
        join tidemark.topics t on t.id = p.topic_id
        where p.id = fetch_batches.partition_id;
        raise exception using
            errcode = code,
            message = format('%s: ', coalesce(named, format('partition id %s', partition_id))) || case code
                when 'TM009' then format('fetch from %s with at most %s bytes and %s batches',
                                         coalesce(from_offset::text, 'NULL'), coalesce(max_bytes::text, 'NULL'),
                                         coalesce(max_batches::text, 'NULL'))
                when 'TM011' then format('offset %s has not arrived at this standby, which holds %s to %s', from_offset,
                                         head.log_start, head.end_offset)
                else format('offset %s is out of range, the log holds %s to %s', from_offset, head.log_start, head.end_offset)
            end,
            hint = case code
                when 'TM009' then 'Pass an offset, and limits of at least 1.'
                when 'TM011' then 'Ask again in a moment, or ask the primary.'
                else 'Go on from the start offset (oldest) or the end offset (newest).'
            end;
    end if;
    if from_offset = head.end_offset then
        return;
    end if;

    -- Up to the first run that is apart the events follow each other in the key, however many runs they are in: one range. From
    -- there on, if that is not enough, run by run.
    run_by_run := head.is_apart;
    base := head.start_offset;
    loop
        if not run_by_run then
            if head.apart is not null then
                select r.last_tx, r.last_id into head.end_tx, head.end_id
                from tidemark.runs r
                where r.partition_id = fetch_batches.partition_id and r.start_offset < head.apart
                order by r.start_offset desc
                limit 1;
            end if;
            first_txs[1] := head.first_tx;
            first_ids[1] := coalesce(head.first_id, -9223372036854775808);
            last_txs[1] := head.end_tx;
            last_ids[1] := coalesce(head.end_id, 9223372036854775807);
        else
            -- Each has a batch at least, so these are enough.
            for run in
                select r.first_tx, r.first_id, r.last_tx, r.last_id, r.seen_tx is not null as late, r.skipped, r.end_bytes
                from tidemark.runs r
                where r.partition_id = fetch_batches.partition_id and r.start_offset >= base
                order by r.start_offset
                limit max_batches - fetched
            loop
                if run.late or was_late or run.skipped is not null then
                    n := n + 1;
                    first_txs[n] := run.first_tx;
                    first_ids[n] := coalesce(run.first_id, -9223372036854775808);
                end if;
                was_late := run.late;
                -- Divided at what it skips and has events here: to read and drop them would cost as much as there are.
                if run.skipped <> '{}' then
                    for skipped_tx in
                        select x.tx
                        from unnest(run.skipped) x(tx)
                        -- As an "exists" it would be hashed: all events of the partition.
                        cross join lateral (
                            select
                            from tidemark.record_batch_events v
                            where v.partition_id = fetch_batches.partition_id and v.tx = x.tx
                            limit 1
                        ) v
                        order by x.tx
                    loop
                        last_txs[n] := skipped_tx;
                        last_ids[n] := -9223372036854775808;
                        n := n + 1;
                        first_txs[n] := skipped_tx;
                        first_ids[n] := 9223372036854775807;
                    end loop;
                end if;
                last_txs[n] := run.last_tx;
                last_ids[n] := coalesce(run.last_id, 9223372036854775807);
                -- Of the first one it is not known what lies before the offset.
                first_bytes := coalesce(first_bytes, run.end_bytes);
                exit when run.end_bytes - first_bytes >= max_bytes - bytes;
            end loop;
        end if;
        -- A lateral join can only be a nested loop, so the batches come, and are added up, in the order of the ranges. A loop
        -- stops reading at the byte limit; a window over max_batches rows would read them all.
        for start_offset, n_records, object_key, byte_offset, byte_length, max_timestamp in
            select e.start_offset, e.n_records, (select o.key from tidemark.objects o where o.id = e.id >> 16),
                   e.byte_offset, e.byte_length, e.max_timestamp
            from (
                select m.*, base - m.n_records + sum(m.n_records) over (rows unbounded preceding) as start_offset
                from generate_subscripts(first_txs, 1) i
                cross join lateral (
                    select b.id, b.byte_offset, b.byte_length, b.max_timestamp, b.n_records
                    from tidemark.record_batch_events b
                    where b.partition_id = fetch_batches.partition_id
                      and (b.tx, b.id) >= (first_txs[i], first_ids[i]) and (b.tx, b.id) <= (last_txs[i], last_ids[i])
                    order by b.tx, b.id
                ) m
            ) e
            where e.start_offset + e.n_records > from_offset
            limit max_batches - fetched
        loop
            bytes := bytes + byte_length;
            exit when bytes > max_bytes and (fetched > 0 or not at_least_one);
            return next;
            fetched := fetched + 1;
            exit when bytes >= max_bytes;
        end loop;
        exit when run_by_run or head.apart is null or bytes >= max_bytes or fetched = max_batches;
        run_by_run := true;
        base := head.apart;
    end loop;
end
$$;

-- The same by topic name and partition number. Error: TM004 unknown topic, TM003 unknown partition of it.
create or replace function tidemark.fetch_batches(
    topic text, partition int, from_offset bigint, max_bytes bigint, max_batches int
) returns table (start_offset bigint, n_records int, object_key text, byte_offset bigint, byte_length int, max_timestamp bigint)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    found_id int;
begin
    select p.id into found_id
    from tidemark.topics t
    join tidemark.topic_partitions p on p.topic_id = t.id
    where t.name = topic and p.partition = fetch_batches.partition;
    if found_id is null then
        raise exception using
            errcode = 'TM003',
            message = format('topic %s has no partition %s', quote_literal(topic), coalesce(partition::text, 'NULL')),
            -- Raises TM004 where there is no such topic.
            hint = format('It has partitions 0 to %s.', cardinality(tidemark.partition_ids(topic)) - 1);
    end if;
    return query select * from tidemark.fetch_batches(found_id, from_offset, max_bytes, max_batches);
end
$$;

-- The same for many partitions, in the order of the request, and all in one snapshot, as Kafka's Fetch: at most max_bytes and
-- max_batches in all and partition_max_bytes of each partition. The first batch of the request comes whatever its size; any other
-- one only where it fits.
--
-- `request` counts the elements from 1. Each has a row with its start and end offset at least, the batch's columns null where
-- there is none. Errors by element, as they are called in Kafka: unknown_partition, offset_out_of_range, malformed (an offset
-- or limit that is null or out of range), and offset_not_available (on a standby). Error of the request: TM009 for limits in all
-- below 1, for arrays that differ, for more than 10,000 elements.
create or replace function tidemark.fetch_partitions(
    partition_ids int[], from_offsets bigint[], partition_max_bytes bigint[], max_bytes bigint, max_batches int
)
returns table (
    request int, partition_id int, error text, log_start bigint, log_end bigint,
    start_offset bigint, n_records int, object_key text, byte_offset bigint, byte_length int, max_timestamp bigint
)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
-- Without it each call is planned for its own arrays, which takes most of a small one's time.
set plan_cache_mode = force_generic_plan
as $$
declare
    head record;
    batches int := 0;
    bytes bigint := 0;
begin
    perform tidemark.check_request(partition_ids, cardinality(from_offsets), cardinality(partition_max_bytes));
    if (max_bytes >= 1 and max_batches >= 1) is not true then
        raise exception using
            errcode = 'TM009',
            message = format('a fetch of at most %s bytes and %s batches', coalesce(max_bytes::text, 'NULL'),
                             coalesce(max_batches::text, 'NULL')),
            hint = 'Pass limits of at least 1.';
    end if;
    for head in
        select i.n::int as request, i.id, i.from_offset, i.most, h.*,
               case
                   when (i.from_offset >= 0 and i.most >= 1) is not true then 'malformed'
                   when p.id is null then 'unknown_partition'
                   when i.from_offset > h.log_end and pg_is_in_recovery() then 'offset_not_available'
                   when i.from_offset not between h.log_start and h.log_end then 'offset_out_of_range'
               end as error
        from unnest(partition_ids, from_offsets, partition_max_bytes) with ordinality i(id, from_offset, most, n)
        left join tidemark.topic_partitions p on p.id = i.id
        left join lateral tidemark.newest_run(p.id) r on true
        left join lateral tidemark.log_start(p.id) s on true
        cross join lateral (
            select case when p.id is not null then coalesce(s.start_offset, 0) end as log_start,
                   case when p.id is not null then coalesce(r.end_offset, 0) end as log_end
        ) h
        order by i.n
    loop
        request := head.request;
        partition_id := head.id;
        error := head.error;
        log_start := head.log_start;
        log_end := head.log_end;
        start_offset := null;
        if error is null and head.from_offset < log_end and batches < max_batches and (bytes < max_bytes or batches = 0) then
            for start_offset, n_records, object_key, byte_offset, byte_length, max_timestamp in
                select f.*
                from tidemark.fetch_batches(
                    head.id, head.from_offset, least(head.most, max_bytes - bytes), max_batches - batches, batches = 0) f
            loop
                return next;
                batches := batches + 1;
                bytes := bytes + byte_length;
            end loop;
        end if;
        if start_offset is null then
            n_records := null;
            object_key := null;
            byte_offset := null;
            byte_length := null;
            max_timestamp := null;
            return next;
        end if;
    end loop;
end
$$;
