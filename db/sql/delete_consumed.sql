/*+ Leading((g p)) NestLoop(g p) IndexOnlyScan(n record_batch_events_pkey) IndexScan(p topic_partitions_pkey)
    IndexScan(c record_batch_events_pkey) TidScan(e) */
-- Trim: deletes at most $2 consumed events from ($1, $3, $4) on, which is a partition and a place in it, of at most $5
-- partitions: that one and the next that have event rows. Many with few events each share a transaction. Returns how many it
-- deleted, in how many partitions besides the one it resumed, and where the next batch begins; no partition at the end.
--
-- It begins behind the batch before, for dead rows stay in the index as long as an old snapshot is open, and reading them again
-- would make a run cost the square of its length. Cursor and events are seen in one snapshot: an event at or below the
-- cursor, and of no transaction that the cursor passed while it was running, has its batch.
-- By ctid, so that no plan can read the partition to join it with the batch; events are never updated, so they stay put.
with recursive present as (
    -- Not looked up: what has been deleted of it would be passed again.
    select $1::int as id
    union all
    -- By an index descent each; reading all events to tell their partitions would take as long as deleting them.
    select (select min(n.partition_id) from tidemark.record_batch_events n where n.partition_id > b.id)
    from present b
    where b.id is not null
),
page as materialized (
    select b.id from present b where b.id is not null limit $5::int
),
consumed as materialized (
    select x.place, p.id as partition_id, x.xid, x.id
    from page g
    join tidemark.topic_partitions p on p.id = g.id
    cross join lateral (
        select c.ctid as place, c.xid, c.id
        from tidemark.record_batch_events c
        where c.partition_id = p.id
            and (c.xid, c.id) > (case when p.id = $1::int then $3::xid8 else '0' end,
                                 case when p.id = $1::int then $4::bigint else -9223372036854775808 end)
            and (c.xid, c.id) <= (p.seen_xid, p.seen_id) and c.xid <> all (p.in_flight)
        order by c.xid, c.id
        limit $2::int
    ) x
    limit $2::int
),
deleted as (
    delete from tidemark.record_batch_events e
    where e.ctid = any (array(select d.place from consumed d))
    returning 1
),
counted as (
    select count(*)::int as events,
           count(distinct d.partition_id) filter (where d.partition_id <> $1::int or $3::xid8 = '0')::int as partitions
    from consumed d
)
select (select count(*) from deleted)::int as deleted, t.partitions, l.partition_id, l.xid::text, l.id
from counted t
left join lateral (
    (select d.partition_id, d.xid, d.id
     from consumed d
     where t.events = $2::int
     order by d.partition_id desc, d.xid desc, d.id desc
     limit 1)
    union all
    (select max(g.id) + 1, '0', -9223372036854775808
     from page g
     where t.events < $2::int
     having count(*) = $5::int)
) l on true
