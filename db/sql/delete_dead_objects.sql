-- Forgets objects that are dead: $1 object ids. An id that is not, or has batches left, stays. Rows are locked in the order of
-- their ids, as retention does; the row of dead_objects goes by its foreign key. live_batches never rises, so what was zero
-- before a wait is zero after it.
with dead as materialized (
    select o.id
    from tidemark.objects o
    where o.id = any ($1::bigint[]) and o.live_batches = 0
      and exists (select from tidemark.dead_objects d where d.object_id = o.id)
    order by o.id
    for update of o
)
delete from tidemark.objects o
using dead
where o.id = dead.id and o.live_batches = 0
