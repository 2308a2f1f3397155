-- Raises TM001 for the first thing that is wrong with the arguments of a commit.
create or replace function tidemark.explain_invalid_commit(
    object_key text, partition_ids int[], n_records int[], byte_offsets bigint[], byte_lengths int[], max_timestamps bigint[],
    producer_ids bigint[] default null, producer_epochs int[] default null, base_sequences int[] default null
) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    named constant text := coalesce(format('object %s', quote_literal(left(object_key, 100))), 'object without a key');
    sizes constant int[] := array[cardinality(partition_ids), cardinality(n_records), cardinality(byte_offsets),
                                  cardinality(byte_lengths), cardinality(max_timestamps)];
    problem text;
    fix text;
begin
    select r.problem, r.fix into problem, fix
    from (
        values
        (1, coalesce(object_key, '') = '', 'the object key is empty', 'Pass the key under which the object was uploaded.'),
        (2, octet_length(object_key) > 1024, format('the object key has %s bytes', octet_length(object_key)),
         'Use a key of at most 1024 bytes.'),
        (3, array_position(sizes, null) is not null, 'an array is NULL', 'Pass all five arrays.'),
        (4, sizes[1] = 0, 'there are no batches in it', 'Commit an object only when it holds at least one batch.'),
        (5, sizes[1] <> any (sizes),
         format('the arrays differ in length: %s partition ids, %s n_records, %s byte_offsets, %s byte_lengths, '
                '%s max_timestamps', variadic sizes),
         'Pass one element per batch in every array.'),
        (6, greatest(array_ndims(partition_ids), array_ndims(n_records), array_ndims(byte_offsets),
                     array_ndims(byte_lengths), array_ndims(max_timestamps)) <> 1,
         'an array has more than one dimension', 'Pass arrays of one dimension.'),
        (7, num_nulls(producer_ids, producer_epochs, base_sequences) < 3
            and (array_ndims(producer_ids) = 1 and array_ndims(producer_epochs) = 1 and array_ndims(base_sequences) = 1
                 and cardinality(producer_ids) = sizes[1] and cardinality(producer_epochs) = sizes[1]
                 and cardinality(base_sequences) = sizes[1]) is not true,
         format('the producers'' arrays do not have one element for each of the %s batches', sizes[1]),
         'Pass producer ids, epochs and sequences for all batches, null where a batch has none, or none of the three arrays.')
        union all
        select 7 + b.position,
               (b.partition_id is not null and b.n_records >= 1 and b.byte_offset >= 0 and b.byte_length >= 0
                and b.max_timestamp <= 253402300799999) is not true,
               format('batch %s: %s', b.position, case
                   when num_nulls(b.partition_id, b.n_records, b.byte_offset, b.byte_length, b.max_timestamp) > 0
                       then 'a value is NULL'
                   when b.n_records < 1 then format('n_records is %s', b.n_records)
                   when b.max_timestamp > 253402300799999 then
                       format('max_timestamp %s lies beyond the year 9999', b.max_timestamp)
                   else format('the byte range starts at %s with length %s', b.byte_offset, b.byte_length)
               end),
               'Every batch needs a partition id, at least one record, a byte range without negative numbers and a timestamp '
               'in milliseconds.'
        from unnest(partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps) with ordinality
            as b(partition_id, n_records, byte_offset, byte_length, max_timestamp, position)
    ) r(number, wrong, problem, fix)
    where r.wrong
    order by r.number
    limit 1;
    raise exception using errcode = 'TM001', message = format('%s: %s', named, problem), hint = fix;
end
$$;
