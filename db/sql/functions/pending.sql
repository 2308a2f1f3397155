-- What waits in partitions, for those where something does: how many events (counted up to `most` in each partition and `in_all`
-- altogether, null for no limit, but at least 1), and when the oldest of them was committed.
-- One or two descents for each partition, and what is counted.
create or replace function tidemark.pending(partition_ids int[], most int, in_all int)
returns table (partition_id int, events bigint, committed_at timestamptz)
language sql stable parallel safe
begin atomic
    with waiting as materialized (
        select c.*, f.committed_at
        from tidemark.cursors(pending.partition_ids) c
        cross join lateral (
            select count(*) as found, min(o.committed_at) as committed_at
            from tidemark.pending_events(c.partition_id, c.seen_tx, c.seen_id, c.last_tx, c.last_id, c.late, 1) p
            left join tidemark.objects o on o.id = p.object_id
        ) f
        where f.found > 0
    ),
    counted as (
        select a.partition_id, count(*) as events
        from (
            select w.partition_id
            from waiting w
            cross join lateral (
                select
                from tidemark.pending_events(w.partition_id, w.seen_tx, w.seen_id, w.last_tx, w.last_id, w.late, most) p
                limit most
            ) e
            limit in_all
        ) a
        group by a.partition_id
    )
    select w.partition_id, greatest(n.events, 1), w.committed_at
    from waiting w
    left join counted n on n.partition_id = w.partition_id;
end;
