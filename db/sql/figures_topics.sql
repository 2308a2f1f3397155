-- Figures by topic, the $1 oldest topics by name and all others together under null: topics and partitions; every record that
-- got an offset, records and bytes kept; partitions and events that wait (counted up to $2 in all), age of the oldest in
-- seconds, partitions whose oldest is older than $3 seconds; records that no audit has read, and when one last read some, in
-- seconds since the epoch. Some descents for each partition, and what is counted.
with backlog as materialized (
    select b.partition_id, b.events, extract(epoch from clock_timestamp() - b.committed_at)::float8 as age
    from (select array_agg(p.id) as ids from tidemark.topic_partitions p) a
    cross join lateral tidemark.pending(a.ids, $2::int, $2::int) b
)
select l.name, count(distinct l.id), count(p.partition_id), coalesce(sum(p.end_offset), 0)::numeric,
       coalesce(sum(p.end_offset - p.start_offset), 0)::numeric, coalesce(sum(p.byte_size), 0)::numeric,
       count(b.events), coalesce(sum(b.events), 0)::bigint, greatest(max(b.age), 0)::float8,
       count(*) filter (where b.age > $3::float8),
       coalesce(sum(greatest(p.end_offset - greatest(d.audited_to, p.start_offset), 0)), 0)::numeric,
       extract(epoch from max(d.audited_at))::float8
from (
    select t.id, t.name as topic, case when row_number() over (order by t.created_at, t.id) <= $1::int then t.name end as name
    from tidemark.topics t
) l
left join tidemark.named_partitions p on p.topic = l.topic
left join backlog b on b.partition_id = p.partition_id
left join tidemark.audit_progress d on d.partition_id = p.partition_id
group by l.name
