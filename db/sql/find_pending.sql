/*+ IndexScan(h topic_partitions_pkey) IndexOnlyScan(e record_batch_events_pkey) */
-- The sweep: partitions with pending events among the $2 that follow partition id $1, with their number up to $3. Finds
-- what a lost message left behind; probes the index once or twice for each partition.
select p.id, p.last_id, n.events
from (
    -- The limit is in a query of its own: a window beside it would be computed over all that follow.
    select g.*, max(g.id) over () as last_id
    from (
        select h.id, h.seen_xid, h.seen_id, h.in_flight
        from tidemark.topic_partitions h
        where h.id > $1::int
        order by h.id
        limit $2::int
    ) g
) p
cross join lateral (
    select least(count(*), $3::int)::int as events
    from (
        (select from tidemark.record_batch_events e
         where e.partition_id = p.id and e.xid = any (p.in_flight)
         limit $3::int)
        union all
        (select from tidemark.record_batch_events e
         where e.partition_id = p.id and (e.xid, e.id) > (p.seen_xid, p.seen_id)
         limit $3::int)
    ) x
) n
