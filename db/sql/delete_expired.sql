/*+ IndexScan(p topic_partitions_pkey) IndexScan(t topics_pkey) IndexScan(c record_batches_pkey) Set(enable_material off)
    IndexOnlyScan(f record_batches_pkey) IndexScan(b record_batches_pkey) IndexScan(o objects_pkey)
    Leading((p t)) NestLoop(p t) Leading((g b)) NestLoop(g b) Leading((g p)) NestLoop(g p) Leading((s o)) NestLoop(s o) */
-- Retention: deletes the expired batches of locked partitions: $1 partition ids, $2 batches of each at most. Which ones they are
-- is decided here, in a snapshot from after the lock was waited for. They are a prefix of the log: up to the first batch that
-- is young enough, or further, for as long as what is left still has retention_bytes.
with head as materialized (
    select p.id, p.start_offset, p.end_offset, p.byte_size, t.retention_bytes,
           (extract(epoch from statement_timestamp()) * 1000)::bigint - t.retention_ms as expires_before
    from tidemark.topic_partitions p
    join tidemark.topics t on t.id = p.topic_id
    where p.id = any ($1::int[]) and (t.retention_ms is not null or t.retention_bytes is not null)
),
expired as materialized (
    select h.id as partition_id, e.start_offset, e.n_records, e.byte_length, e.object_id
    from head h
    cross join lateral (
        select b.start_offset, b.n_records, b.byte_length, b.object_id,
               sum(b.byte_length) over prefix as bytes,
               -- A batch without timestamps is as old as its commit. What cannot be dated stays.
               bool_and(coalesce(
                   case when b.max_timestamp >= 0 then b.max_timestamp
                        else (select (extract(epoch from o.committed_at) * 1000)::bigint
                              from tidemark.objects o where o.id = b.object_id)
                   end < h.expires_before, false)) over prefix as too_old
        from (
            select c.start_offset, c.n_records, c.byte_length, c.object_id, c.max_timestamp
            from tidemark.record_batches c
            where c.partition_id = h.id and c.start_offset < h.end_offset
              and c.start_offset >= (
                  select f.start_offset
                  from tidemark.record_batches f
                  where f.partition_id = h.id and f.start_offset <= h.start_offset
                  order by f.start_offset desc
                  limit 1
              )
            order by c.start_offset
            limit $2::int
        ) b
        window prefix as (order by b.start_offset rows unbounded preceding)
    ) e
    where e.too_old or h.byte_size - e.bytes >= h.retention_bytes
),
gone as materialized (
    select e.partition_id, count(*) as batches, sum(e.byte_length) as bytes, min(e.start_offset) as first_start,
           max(e.start_offset) as last_start, max(e.start_offset + e.n_records) as end_offset
    from expired e
    group by e.partition_id
),
deleted as (
    delete from tidemark.record_batches b
    using gone g
    where b.partition_id = g.partition_id and b.start_offset between g.first_start and g.last_start
),
moved as (
    update tidemark.topic_partitions p
    set start_offset = greatest(p.start_offset, g.end_offset), byte_size = p.byte_size - g.bytes
    from gone g
    where p.id = g.partition_id and p.id = any ($1::int[])
    returning p.id, g.batches, g.bytes
),
-- Other partitions' retention counts the same objects down: whoever does locks them in the order of their ids.
spent as materialized (
    select o.id, s.batches
    from (select e.object_id, count(*)::int as batches from expired e group by e.object_id) s
    join tidemark.objects o on o.id = s.object_id
    order by o.id
    for no key update of o
),
counted as (
    update tidemark.objects o
    set live_batches = o.live_batches - s.batches
    from spent s
    where o.id = s.id
    returning o.id, o.live_batches
),
dead as (
    insert into tidemark.dead_objects (object_id)
    select c.id from counted c where c.live_batches = 0
    on conflict on constraint dead_objects_pkey do nothing
    returning object_id
)
select m.id, m.batches, m.bytes, (select count(*) from dead) as objects_freed
from moved m
