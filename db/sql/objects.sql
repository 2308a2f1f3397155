-- name: condemn
-- Condemns the keys $1; a row for each that is condemned now.
select c.key
from tidemark.condemn($1::text[]) c(key);

-- name: find_dead_objects
-- Objects that died at least $3 seconds ago: $1 object id to start after, $2 objects at most.
select o.id, o.key, d.dead_at
from tidemark.dead_objects d
join tidemark.objects o on o.id = d.object_id
where d.object_id > $1::bigint and d.dead_at <= statement_timestamp() - make_interval(secs => $3::double precision)
order by d.object_id
limit $2::int;

-- name: lock_collections
-- Locks the position of collecting, in a statement of its own: the next one sees what is there after the wait. A lock leaves no
-- version of the row behind.
select
from tidemark.collections c
where c.id = 1
for no key update;

-- name: take_dead_objects
-- The next $1 objects that died at least $2 seconds ago; moves the locked position behind them, so nobody else takes them in this
-- round. $3: whether a new round may begin, from the first one; it does so when the last one began $2 seconds ago.
with last as materialized (
    select c.begun_at, c.dead_at, c.object_id
    from tidemark.collections c
    order by c.id desc
    limit 1
),
round as materialized (
    select x.due_to, case when n.is_new then statement_timestamp() else l.begun_at end as begun_at,
           case when n.is_new then '-infinity' else l.dead_at end as dead_at,
           case when n.is_new then 0 else l.object_id end as object_id
    from last l
    cross join lateral (select statement_timestamp() - make_interval(secs => $2::double precision) as due_to) x
    cross join lateral (select $3::boolean and l.begun_at <= x.due_to as is_new) n
),
page as materialized (
    select p.object_id, p.dead_at
    from round r
    cross join lateral (
        select d.object_id, d.dead_at
        from tidemark.dead_objects d
        where (d.dead_at, d.object_id) > (r.dead_at, r.object_id) and d.dead_at <= r.due_to
        order by d.dead_at, d.object_id
        limit $1::int
    ) p
),
moved as (
    -- Where there is no more, up to the time that was looked at. So what was deleted before that is not passed over again.
    insert into tidemark.collections (begun_at, dead_at, object_id)
    select r.begun_at, case when e.is_full then e.dead_at else greatest(r.dead_at, r.due_to) end,
           case when e.is_full then e.object_id else 9223372036854775807 end
    from round r
    cross join (
        select count(*) = $1::int as is_full, max(p.dead_at) as dead_at,
               (array_agg(p.object_id order by p.dead_at desc, p.object_id desc))[1] as object_id
        from page p
    ) e
    returning id
),
behind as (
    delete from tidemark.collections c using moved m where c.id >= m.id - 10 and c.id < m.id and c.id > 1
)
select o.id, o.key, p.dead_at
from page p
join tidemark.objects o on o.id = p.object_id
order by p.dead_at, p.object_id;

-- name: give_back_dead_objects
-- Moves the locked position back before the object $2, dead since $1: it could not be deleted, and neither could those after it.
with moved as (
    insert into tidemark.collections (begun_at, dead_at, object_id)
    select l.begun_at, $1::timestamptz, $2::bigint - 1
    from (select c.* from tidemark.collections c order by c.id desc limit 1) l
    where (l.dead_at, l.object_id) >= ($1::timestamptz, $2::bigint)
    returning id
)
delete from tidemark.collections c using moved m where c.id >= m.id - 10 and c.id < m.id and c.id > 1;

-- name: delete_dead_objects
-- Forgets objects that are dead: $1 object ids. An id that is not, or has batches left, stays. Rows are locked in the order of
-- their ids, as retention does; the row of dead_objects goes by its foreign key. What is deleted is never less than before, so
-- an object without batches before a wait has none after it.
with dead as materialized (
    select o.id
    from tidemark.objects o
    where o.id = any ($1::bigint[])
      and exists (select from tidemark.dead_objects d where d.object_id = o.id)
      and o.batches = (select coalesce(sum(s.batches), 0) from tidemark.deleted_batches s where s.object_id = o.id)
    order by o.id
    for update of o
),
counts as (
    delete from tidemark.deleted_batches b using dead g where b.object_id = g.id
),
refused as (
    delete from tidemark.refused_batches r using dead g where r.object_id = g.id
)
delete from tidemark.objects k
using dead g
where k.id = g.id;

-- name: find_objects
-- The next $2 objects after the key $1, by key; is_live where batches of it are to be read.
select p.id, p.key, d.object_id is null as is_live
from (
    select o.id, o.key
    from tidemark.objects o
    where o.key > $1::text
    order by o.key
    limit $2::int
) p
-- One descent for each. As a condition in the list of columns it may be a table of all that are dead, made for each page.
left join tidemark.dead_objects d on d.object_id = p.id
order by p.key;

-- name: find_live_objects
-- Those of the keys $1 that are committed and not dead.
select o.id, o.key, true as is_live
from tidemark.objects o
where o.key = any ($1::text[]) and not exists (select from tidemark.dead_objects d where d.object_id = o.id);

-- name: read_reconciliation
-- How far bucket and table are compared: the key, and a committed object that was in the store.
select r.id, r.key, r.found_key
from tidemark.reconciliations r
order by r.id desc
limit 1;

-- name: save_reconciliation
-- Remembers that bucket and table are compared up to the key $2, and that the committed object $3 was in the store. $1 is the row
-- that the turn began with: of two at once the first one counts.
with saved as (
    insert into tidemark.reconciliations (id, key, found_key)
    values ($1::bigint + 1, $2::text, $3::text)
    on conflict on constraint reconciliations_pkey do nothing
    returning id
)
delete from tidemark.reconciliations r using saved s where r.id >= s.id - 10 and r.id < s.id;
