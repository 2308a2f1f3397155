/*+ IndexScan(p topic_partitions_pkey) IndexScan(c record_batch_events_pkey) TidScan(e) */
-- Trim: deletes at most $2 consumed events of partition $1 that follow ($3, $4), and returns how many and the last one's
-- place, where the next batch goes on: dead rows stay in the index as long as an old snapshot is open, and reading them again
-- would make a run cost the square of its length. Cursor and events are seen in one snapshot: an event at or below the
-- cursor, and of no transaction that the cursor passed while it was running, has its batch.
-- By ctid, so that no plan can read the partition to join it with the batch; events are never updated, so they stay put.
with consumed as materialized (
    select e.ctid as place, e.xid, e.id
    from tidemark.topic_partitions p
    cross join lateral (
        select c.ctid, c.xid, c.id
        from tidemark.record_batch_events c
        where c.partition_id = p.id and (c.xid, c.id) > ($3::xid8, $4::bigint)
            and (c.xid, c.id) <= (p.seen_xid, p.seen_id) and c.xid <> all (p.in_flight)
        order by c.xid, c.id
        limit $2::int
    ) e
    where p.id = $1::int
),
deleted as (
    delete from tidemark.record_batch_events e
    where e.ctid = any (array(select c.place from consumed c))
    returning 1
)
select (select count(*) from deleted)::int as deleted, (select count(*) from consumed)::int as found, l.xid::text, l.id
from (select null) one
left join lateral (select c.xid, c.id from consumed c order by c.xid desc, c.id desc limit 1) l on true
