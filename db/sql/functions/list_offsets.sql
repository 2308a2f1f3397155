-- Offsets by time, as Kafka's ListOffsets: a row for each element, in the order of the arrays. What is asked for is a time in
-- milliseconds since the epoch, or -1: the end offset, -2: the start offset, -3: the batch with the greatest timestamp.
--
-- For a time: the first offset from the log's start on whose batch may hold a record of that time or later, and the greatest
-- timestamp of that batch; both null where there is none. Batches without times (-1) never match. Times need not rise along the
-- log. But where a batch that is deleted had that time or a later one, it is only known that the rest may have it, too. Then the
-- first runs are read, and if none of them has it, the answer is the start offset: never too late.
--
-- Error by element: unknown_partition, malformed. TM009 for arrays that differ or have more than 10,000 elements.
create or replace function tidemark.list_offsets(partition_ids int[], timestamps bigint[])
returns table (partition_id int, error text, log_offset bigint, max_timestamp bigint)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
-- Without it each call is planned for its own arrays, which takes most of a small one's time.
set plan_cache_mode = force_generic_plan
as $$
begin
    perform tidemark.check_request(partition_ids, cardinality(timestamps));
    return query
    select i.id, e.error,
           case when e.error is not null then null
                when i.wanted = -1 then h.end_offset
                when i.wanted = -2 then h.start_offset
                -- Greatest passes over what is null.
                when f.start_offset is not null then greatest(f.start_offset, h.start_offset) end,
           case when e.error is null and i.wanted not in (-1, -2) then f.max_timestamp end
    from unnest(partition_ids, timestamps) with ordinality i(id, wanted, n)
    left join tidemark.topic_partitions p on p.id = i.id
    left join lateral tidemark.newest_run(i.id) w on true
    left join lateral tidemark.log_start(i.id) s on true
    cross join lateral (
        select coalesce(s.start_offset, 0) as start_offset, coalesce(w.end_offset, 0) as end_offset,
               case when i.wanted = -3 then nullif(w.max_timestamp, -1) else i.wanted end as wanted
    ) h
    cross join lateral (
        select case when (i.wanted >= -3) is not true then 'malformed' when p.id is null then 'unknown_partition' end as error
    ) e
    left join lateral (
        select b.*
        from tidemark.find_run(i.id, null, null, h.wanted) r
        -- The run that holds the start: of what lies before it only the greatest time is left.
        left join lateral tidemark.run_at(i.id, h.start_offset) g on true
        cross join lateral (
            (select v.start_offset, v.max_timestamp, 1 as rank
             from (
                 select c as run
                 from tidemark.runs c
                 where c.partition_id = i.id and c.start_offset >= greatest(r.start_offset, g.start_offset)
                 order by c.start_offset
                 limit 8
             ) m
             cross join lateral tidemark.run_events(m.run) v
             where v.max_timestamp >= h.wanted and v.start_offset + v.n_records > h.start_offset
             -- In order without a sort, which would read all of them: a lateral join can only be a nested loop.
             limit 1)
            union all
            (select h.start_offset, v.max_timestamp, 2
             from tidemark.run_events(g) v
             where v.start_offset + v.n_records > h.start_offset
             limit 1)
        ) b
        where h.start_offset < h.end_offset
        order by b.rank
        limit 1
    ) f on e.error is null and i.wanted not in (-1, -2)
    order by i.n;
end
$$;

-- Raises TM009 unless a request of several partitions has arrays of the same length, and no more than 10,000 elements.
create or replace function tidemark.check_request(partition_ids int[], variadic sizes int[]) returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if (cardinality(partition_ids) <= 10000 and cardinality(partition_ids) = all (sizes)) is not true then
        raise exception using
            errcode = 'TM009',
            message = format('a request with %s partitions and %s', coalesce(cardinality(partition_ids)::text, 'no array of'),
                             array_to_string(sizes, ', ', 'NULL')),
            hint = 'Pass arrays of the same length, and at most 10000 partitions in one request.';
    end if;
end
$$;
