-- Backlog by topic, the $1 oldest topics by name and all others under null: partitions and events that wait (counted up to $2 in
-- all), age of the oldest in seconds, partitions whose oldest is older than $3 seconds, and whether the count stopped at $2.
-- Skips from one partition with events to the next, so it costs O(partitions with events) + O($2), however many others there are.
with recursive busy(id) as (
    select min(e.partition_id) from tidemark.record_batch_events e
    union all
    select (select min(e.partition_id) from tidemark.record_batch_events e where e.partition_id > b.id)
    from busy b
    where b.id is not null
),
waiting as materialized (
    select p.id, p.topic_id, p.seen_xid, p.seen_id, p.in_flight,
           greatest(extract(epoch from clock_timestamp() - f.committed_at), 0)::float8 as age
    from busy b
    join tidemark.topic_partitions p on p.id = b.id
    cross join lateral (
        select count(*) as found, min(o.committed_at) as committed_at
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
        left join tidemark.objects o on o.id = first.object_id
    ) f
    where f.found > 0
),
counted as (
    select c.id, count(*) as events
    from (
        select w.id
        from waiting w
        cross join lateral (
            select from tidemark.record_batch_events e
            where e.partition_id = w.id and e.xid = any (w.in_flight)
            union all
            select from tidemark.record_batch_events e
            where e.partition_id = w.id and (e.xid, e.id) > (w.seen_xid, w.seen_id)
        ) x
        limit $2::int
    ) c
    group by c.id
)
select l.name, count(*), sum(greatest(c.events, 1))::bigint, max(w.age), count(*) filter (where w.age > $3::float8),
       sum(sum(coalesce(c.events, 0))) over () >= $2::int
from waiting w
left join counted c on c.id = w.id
join (
    select t.id, case when row_number() over (order by t.created_at, t.id) <= $1::int then t.name end as name
    from tidemark.topics t
) l on l.id = w.topic_id
group by l.name
