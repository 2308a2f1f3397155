-- What became of the batches of objects: of each a row, by object and in the order of the request, `batch` counted from 1. Its
-- verdict is what the commit answered. base_offset is the offset of its first record, for a duplicate that of the first
-- one; null while it is pending, for what was not accepted, and where retention has deleted the batch (then nothing tells the
-- partition either). Ids that are not known have no rows. With `moved`, only batches of these partitions that have an offset.
--
-- Costs some descents for each batch, whatever is pending elsewhere. Each run that holds some of them is read once.
create or replace function tidemark.receipts(object_ids bigint[], moved int[] default null)
returns table (object_id bigint, batch int, partition_id int, verdict text, base_offset bigint, is_pending boolean)
language plpgsql stable security definer
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_material = off
set enable_mergejoin = off
-- Without it each call is planned, which takes as long as fifty receipts.
set plan_cache_mode = force_generic_plan
as $$
#variable_conflict use_column
begin
    return query
    with asked as materialized (
        select o.id, o.tx, o.batches, o.partition_ids
        from (select distinct u.id from unnest(receipts.object_ids) u(id)) u
        cross join lateral (select * from tidemark.objects k where k.id = u.id limit 1) o
    ),
    refused as materialized (
        select a.id, r.*
        from asked a
        cross join lateral (select * from tidemark.refused_batches b where b.object_id = a.id offset 0) r
        where moved is null or r.partition_id = any (moved) and r.verdict = 'duplicate'
    ),
    event as materialized (
        select a.id as object_id, (v.id & 65535)::int + 1 as batch, p.id as partition_id, 'accepted' as verdict, v.tx, v.id
        from asked a
        cross join lateral unnest(a.partition_ids) p(id)
        cross join lateral (
            select e.tx, e.id
            from tidemark.record_batch_events e
            where e.partition_id = p.id and e.tx = a.tx and e.id between a.id << 16 and (a.id << 16) + 65535
            -- A probe for each, here and below; as a join it may look for the transaction in all partitions.
            offset 0
        ) v
        where moved is null or p.id = any (moved)
        union all
        select r.id, r.position + 1, r.partition_id, r.verdict, v.tx, v.id
        from refused r
        cross join lateral (
            select e.tx, e.id
            from tidemark.record_batch_events e
            where e.partition_id = r.partition_id and e.tx = r.first_tx and e.id = r.first_id
            offset 0
        ) v
        where r.verdict = 'duplicate'
    ),
    located as materialized (
        select l.*, (l.run).partition_id as run_partition, (l.run).start_offset as run_start
        from (
            select e.*, case when n.is_inside then n.run else r.run end as run
            from event e
            -- Most are pending, or in the newest run, and need no search.
            left join lateral (
                select w as run,
                       (coalesce(w.seen_tx, w.last_tx),
                        coalesce(case when w.seen_tx is null then w.last_id else w.seen_id end, 9223372036854775807))
                           < (e.tx, e.id) as is_pending,
                       w.seen_tx is null and (e.tx, e.id) >= (w.first_tx, coalesce(w.first_id, -9223372036854775808))
                           and (e.tx, e.id) <= (w.last_tx, coalesce(w.last_id, 9223372036854775807))
                           and (w.skipped is null or e.tx <> all (w.skipped)) as is_inside
                from tidemark.newest_run(e.partition_id) w
            ) n on true
            left join lateral (
                select f as run
                from tidemark.run_of(e.partition_id, e.tx, e.id) f
                where not (n.is_pending or n.is_inside)
                -- So that it is not even begun for the others.
                offset 0
            ) r on true
        ) l
    ),
    placed as materialized (
        select b.tx, b.id, b.partition_id, b.start_offset
        from (select distinct on (l.run_partition, l.run_start) l.run from located l where l.run_start is not null) r
        cross join lateral (select (r.run).partition_id, v.* from tidemark.run_events(r.run) v) b
    ),
    answered as (
        select l.object_id, l.batch, l.partition_id, l.verdict, p.start_offset as base_offset, l.run_start is null as is_pending
        from located l
        left join placed p on p.partition_id = l.partition_id and p.tx = l.tx and p.id = l.id
    ),
    told as (
        select * from answered a where moved is null or a.base_offset is not null
        union all
        select r.id, r.position + 1, r.partition_id, r.verdict, null, false
        from refused r
        where moved is null and not exists (select from answered a where a.object_id = r.id and a.batch = r.position + 1)
    )
    select * from told
    union all
    -- Deleted ones: what the commit brought and nothing is left of.
    select a.id, g.batch, null, 'accepted', null, false
    from asked a
    cross join lateral generate_series(1, a.batches + (select count(*)::int from refused r where r.id = a.id)) g(batch)
    where moved is null
      and a.batches > (select count(*) from answered w where w.object_id = a.id and w.verdict = 'accepted')
      and not exists (select from told t where t.object_id = a.id and t.batch = g.batch)
    order by 1, 2;
end
$$;
