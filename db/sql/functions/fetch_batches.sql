-- The read path: batches of a partition from an offset on, in order. The first one contains the offset, perhaps in its
-- middle. At most max_batches of them and no more than fit into max_bytes, but always one where there is one; nothing at
-- the end offset. Reads no more rows than it returns and a few.
--
-- Stable: all its statements see the caller's snapshot, so the offsets checked belong to the batches returned.
-- Errors: TM003 unknown partition, TM007 offset outside [start offset, end offset], TM009 limits below 1.
create or replace function tidemark.fetch_batches(
    partition_id int,
    from_offset bigint,
    max_bytes bigint,
    max_batches int
) returns table (
    start_offset bigint,
    n_records int,
    object_key text,
    byte_offset bigint,
    byte_length int,
    max_timestamp bigint
)
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    head record;
    first_offset bigint;
    bytes bigint := 0;
begin
    if (max_bytes >= 1 and max_batches >= 1 and from_offset is not null) is not true then
        raise exception using
            errcode = 'TM009',
            message = format('partition id %s: fetch from %s with at most %s bytes and %s batches', partition_id,
                             coalesce(from_offset::text, 'NULL'), coalesce(max_bytes::text, 'NULL'),
                             coalesce(max_batches::text, 'NULL')),
            hint = 'Pass an offset, and limits of at least 1.';
    end if;
    select p.start_offset, p.end_offset into head
    from tidemark.topic_partitions p where p.id = fetch_batches.partition_id;
    if not found then
        raise exception using
            errcode = 'TM003',
            message = format('partition id %s does not exist', coalesce(partition_id::text, 'NULL')),
            hint = 'Read the ids of a topic''s partitions with tidemark.partition_ids(topic).';
    end if;
    if from_offset < head.start_offset or from_offset > head.end_offset then
        raise exception using
            errcode = 'TM007',
            message = format('partition id %s: offset %s is out of range, the log holds %s to %s', partition_id,
                             from_offset, head.start_offset, head.end_offset),
            hint = 'Go on from the start offset (oldest) or the end offset (newest).';
    end if;
    if from_offset = head.end_offset then
        return;
    end if;

    select b.start_offset into first_offset
    from tidemark.record_batches b
    where b.partition_id = fetch_batches.partition_id and b.start_offset <= from_offset
    order by b.start_offset desc
    limit 1;

    -- A loop stops reading at the byte limit; a window over max_batches rows would read them all.
    for start_offset, n_records, object_key, byte_offset, byte_length, max_timestamp in
        select b.start_offset, b.n_records,
               (select o.key from tidemark.objects o where o.id = b.object_id),
               b.byte_offset, b.byte_length, b.max_timestamp
        from tidemark.record_batches b
        where b.partition_id = fetch_batches.partition_id and b.start_offset >= first_offset
        order by b.start_offset
        limit max_batches
    loop
        bytes := bytes + byte_length;
        exit when bytes > max_bytes and start_offset > first_offset;
        return next;
        exit when bytes >= max_bytes;
    end loop;
end
$$;

-- The same by topic name and partition number. Error: TM004 unknown topic, TM003 unknown partition of it.
create or replace function tidemark.fetch_batches(
    topic text,
    partition int,
    from_offset bigint,
    max_bytes bigint,
    max_batches int
) returns table (
    start_offset bigint,
    n_records int,
    object_key text,
    byte_offset bigint,
    byte_length int,
    max_timestamp bigint
)
language plpgsql stable
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
