-- Objects whose last batch was deleted at least $3 seconds ago: $1 object id to start after, $2 objects at most.
select o.id, o.key, d.dead_at
from tidemark.dead_objects d
join tidemark.objects o on o.id = d.object_id
where d.object_id > $1::bigint and d.dead_at <= statement_timestamp() - make_interval(secs => $3::double precision)
order by d.object_id
limit $2::int
