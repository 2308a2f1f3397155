-- Sums over the logs of topics: the $1 oldest by name, all others together under null. Reads topics and topic_partitions.
select l.name, count(distinct l.id), count(p.id), coalesce(sum(p.end_offset), 0)::numeric,
       coalesce(sum(p.end_offset - p.start_offset), 0)::numeric, coalesce(sum(p.byte_size), 0)::numeric
from (
    select t.id, case when row_number() over (order by t.created_at, t.id) <= $1::int then t.name end as name
    from tidemark.topics t
) l
left join tidemark.topic_partitions p on p.topic_id = l.id
group by l.name
