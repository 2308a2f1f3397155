-- Partitions with their backlog: $1 topic names, null for all; $2 count a partition's events up to this number; $3 only those
-- with a backlog. `lag` is how many seconds ago the first pending event was committed. Two probes for each partition, and what
-- is counted; consumed events and their remains lie before the cursor and cost nothing.
select t.name, p.partition, p.id, p.start_offset, p.end_offset, p.byte_size, n.events,
       case when n.events > 0 then greatest(extract(epoch from clock_timestamp() - f.committed_at), 0)::float8 end as lag
from tidemark.topics t
join tidemark.topic_partitions p on p.topic_id = t.id
cross join lateral (
    select count(*) as events
    from (
        (select from tidemark.record_batch_events e
         where e.partition_id = p.id and e.xid = any (p.in_flight)
         limit $2::int)
        union all
        (select from tidemark.record_batch_events e
         where e.partition_id = p.id and (e.xid, e.id) > (p.seen_xid, p.seen_id)
         limit $2::int)
        limit $2::int
    ) x
) n
left join lateral (
    select min(o.committed_at) as committed_at
    from (
        (select l.object_id
         from unnest(p.in_flight) late(xid)
         cross join lateral (
             select e.object_id
             from tidemark.record_batch_events e
             where e.partition_id = p.id and e.xid = late.xid
             order by e.id
             limit 1
         ) l)
        union all
        (select e.object_id
         from tidemark.record_batch_events e
         where e.partition_id = p.id and (e.xid, e.id) > (p.seen_xid, p.seen_id)
         order by e.xid, e.id
         limit 1)
    ) first
    join tidemark.objects o on o.id = first.object_id
) f on n.events > 0
where ($1::text[] is null or t.name = any ($1::text[])) and (n.events > 0 or not $3::boolean)
order by t.name, p.partition
