-- Audit: a stretch of partitions $1, from offsets $2 on (null, or deleted meanwhile: from the first batch), at most $3 batches of
-- each. One row a partition. The arrays describe the first offending batch: start, end, end of the one before, object.
select p.id, p.start_offset, p.end_offset, p.byte_size, w.from_offset, w.whole, s.batches, s.bytes, s.next_offset,
       s.gaps, s.gap, s.overlaps, s.overlap, s.empties, s.empty
from unnest($1::int[], $2::bigint[]) r(id, from_offset)
join tidemark.topic_partitions p on p.id = r.id
cross join lateral (
    select case when r.from_offset >= p.start_offset then r.from_offset
                else coalesce((select min(b.start_offset) from tidemark.record_batches b where b.partition_id = p.id),
                              p.start_offset)
           end as from_offset,
           (r.from_offset >= p.start_offset) is not true as whole
) w
cross join lateral (
    select count(*) as batches, coalesce(sum(c.byte_length), 0)::bigint as bytes,
           coalesce(max(c.end_offset), w.from_offset) as next_offset,
           count(*) filter (where c.start_offset > c.previous_end) as gaps,
           min(array[c.start_offset, c.end_offset, c.previous_end, c.object_id])
               filter (where c.start_offset > c.previous_end) as gap,
           count(*) filter (where c.start_offset < c.previous_end) as overlaps,
           min(array[c.start_offset, c.end_offset, c.previous_end, c.object_id])
               filter (where c.start_offset < c.previous_end) as overlap,
           count(*) filter (where c.start_offset >= c.end_offset) as empties,
           min(array[c.start_offset, c.end_offset, c.previous_end, c.object_id])
               filter (where c.start_offset >= c.end_offset) as empty
    from (
        select b.start_offset, b.start_offset + b.n_records as end_offset, b.byte_length, b.object_id,
               lag(b.start_offset + b.n_records, 1, w.from_offset) over (order by b.start_offset) as previous_end
        from (
            select x.start_offset, x.n_records, x.byte_length, x.object_id
            from tidemark.record_batches x
            where x.partition_id = p.id and x.start_offset >= w.from_offset
            order by x.start_offset
            limit $3::int
        ) b
    ) c
) s
order by p.id
