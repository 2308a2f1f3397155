-- Raises TM001 for the first thing that is wrong with the arguments of commit_object.
create or replace function tidemark.explain_invalid_commit(
    object_key text,
    partition_ids int[],
    n_records int[],
    byte_offsets bigint[],
    byte_lengths int[],
    max_timestamps bigint[]
) returns void
language plpgsql stable
set search_path = pg_catalog, pg_temp
as $$
declare
    named constant text := coalesce(format('object %s', quote_literal(left(object_key, 100))), 'object without a key');
    problem text;
    fix text;
begin
    if object_key is null or object_key = '' then
        problem := 'the object key is empty';
        fix := 'Pass the key under which the object was uploaded.';
    elsif octet_length(object_key) > 1024 then
        problem := format('the object key has %s bytes', octet_length(object_key));
        fix := 'Use a key of at most 1024 bytes.';
    elsif partition_ids is null or n_records is null or byte_offsets is null or byte_lengths is null
        or max_timestamps is null then
        problem := 'an array is NULL';
        fix := 'Pass all five arrays.';
    elsif cardinality(partition_ids) = 0 then
        problem := 'there are no batches in it';
        fix := 'Commit an object only when it holds at least one batch.';
    elsif cardinality(n_records) <> cardinality(partition_ids) or cardinality(byte_offsets) <> cardinality(partition_ids)
        or cardinality(byte_lengths) <> cardinality(partition_ids)
        or cardinality(max_timestamps) <> cardinality(partition_ids) then
        problem := format('the arrays differ in length: %s partition ids, %s n_records, %s byte_offsets, '
                          '%s byte_lengths, %s max_timestamps', cardinality(partition_ids), cardinality(n_records),
                          cardinality(byte_offsets), cardinality(byte_lengths), cardinality(max_timestamps));
        fix := 'Pass one element per batch in every array.';
    elsif greatest(array_ndims(partition_ids), array_ndims(n_records), array_ndims(byte_offsets),
                   array_ndims(byte_lengths), array_ndims(max_timestamps)) <> 1 then
        problem := 'an array has more than one dimension';
        fix := 'Pass arrays of one dimension.';
    else
        select format('batch %s: %s', b.position,
                      case
                          when b.partition_id is null or b.n_records is null or b.byte_offset is null
                              or b.byte_length is null or b.max_timestamp is null then 'a value is NULL'
                          when b.n_records < 1 then format('n_records is %s', b.n_records)
                          when b.max_timestamp > 253402300799999 then
                              format('max_timestamp %s lies beyond the year 9999', b.max_timestamp)
                          else format('the byte range starts at %s with length %s', b.byte_offset, b.byte_length)
                      end)
        into problem
        from unnest(partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps) with ordinality
            as b(partition_id, n_records, byte_offset, byte_length, max_timestamp, position)
        where (b.partition_id is not null and b.n_records >= 1 and b.byte_offset >= 0 and b.byte_length >= 0
               and b.max_timestamp <= 253402300799999) is not true
        order by b.position
        limit 1;
        fix := 'Every batch needs a partition id, at least one record, a byte range without negative numbers and a timestamp '
               'in milliseconds.';
    end if;
    raise exception using errcode = 'TM001', message = format('%s: %s', named, problem), hint = fix;
end
$$;
