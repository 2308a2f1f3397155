-- Retention: puts those of the locked objects that have no batch left into dead_objects; returns how many.
with dead as (
    insert into tidemark.dead_objects (object_id)
    select o.id
    from tidemark.objects o
    where o.id = any (current_setting('tidemark.spent')::bigint[])
      and o.batches = (select sum(d.batches) from tidemark.deleted_batches d where d.object_id = o.id)
    on conflict on constraint dead_objects_pkey do nothing
    returning object_id
)
select count(*) from dead
