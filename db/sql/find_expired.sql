-- Retention: the last of the $2 partitions that follow partition id $1, and those of them whose oldest run is to go. Takes no
-- locks; what it finds is looked at again under lock. Of a topic without limits it reads no more than that.
with page as materialized (
    select p.id
    from tidemark.topic_partitions p
    where p.id > $1::int
    order by p.id
    limit $2::int
)
select max(g.id) as last_id, coalesce(array_agg(g.id order by g.id) filter (where e.runs > 0), '{}') as expired
from page g
cross join lateral (select count(*) as runs from tidemark.runs_to_delete(g.id, 1)) e
