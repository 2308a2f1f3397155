-- name: find_dead_objects
-- Objects whose last batch was deleted at least $3 seconds ago: $1 object id to start after, $2 objects at most.
select o.id, o.key, d.dead_at
from tidemark.dead_objects d
join tidemark.objects o on o.id = d.object_id
where d.object_id > $1::bigint and d.dead_at <= statement_timestamp() - make_interval(secs => $3::double precision)
order by d.object_id
limit $2::int;

-- name: delete_dead_objects
-- Forgets objects that are dead: $1 object ids. An id that is not, or has batches left, stays. Rows are locked in the order of
-- their ids, as retention does; the row of dead_objects goes by its foreign key. What is deleted is never less than before, so
-- an object without batches before a wait has none after it.
with dead as materialized (
    select o.id
    from tidemark.objects o
    where o.id = any ($1::bigint[])
      and exists (select from tidemark.dead_objects d where d.object_id = o.id)
      and o.batches = (select sum(s.batches) from tidemark.deleted_batches s where s.object_id = o.id)
    order by o.id
    for update of o
),
counts as (
    delete from tidemark.deleted_batches b using dead g where b.object_id = g.id
)
delete from tidemark.objects k
using dead g
where k.id = g.id;
