-- Trim: deletes at most $2 consumed events of partition $1. Cursor and events are seen in one snapshot: an event at or
-- below the cursor, and of no transaction that the cursor passed while it was running, has its batch.
with consumed as materialized (
    select e.xid, e.id
    from tidemark.topic_partitions p
    cross join lateral (
        select c.xid, c.id
        from tidemark.record_batch_events c
        where c.partition_id = p.id and (c.xid, c.id) <= (p.seen_xid, p.seen_id) and c.xid <> all (p.in_flight)
        order by c.xid, c.id
        limit $2::int
    ) e
    where p.id = $1::int
)
delete from tidemark.record_batch_events e
using consumed c
where e.partition_id = $1::int and e.xid = c.xid and e.id = c.id
