/*+ IndexScan(h topic_partitions_pkey) IndexOnlyScan(m record_batch_events_pkey) IndexOnlyScan(v record_batch_events_pkey)
    IndexOnlyScan(e record_batch_events_pkey) */
-- The sweep: the next partitions after id $1, $2 of them at most, with their pending events: how many up to $3, the first
-- transaction beyond the position and the late ones. It ends early when it has counted $4 events in all.
with page as materialized (
    select array(select h.id from tidemark.topic_partitions h where h.id > $1::int order by h.id limit $2::int) as ids
),
cursor as materialized (
    select c.partition_id, c.seen_tx, c.seen_id, c.last_tx, c.last_id, c.late
    from page p
    cross join lateral tidemark.cursors(p.ids) c
)
select f.partition_id, count(f.tx)::int as events, min(f.first_tx) as first_tx, f.late
from (
    select c.partition_id, c.late, n.first_tx, x.tx
    from (select k.* from cursor k order by k.partition_id) c
    left join lateral (
        select m.tx as first_tx
        from tidemark.record_batch_events m
        where m.partition_id = c.partition_id and (m.tx, m.id) > (c.seen_tx, c.seen_id)
        order by m.tx, m.id
        limit 1
    ) n on true
    left join lateral (
        (select l.tx
         from unnest(c.late) u(tx)
         cross join lateral (
             select v.tx
             from tidemark.record_batch_events v
             where v.partition_id = c.partition_id and v.tx = u.tx
               and v.id > case when u.tx = c.last_tx then c.last_id else -9223372036854775808 end
             limit $3::int
         ) l
         where c.late is not null
         limit $3::int)
        union all
        (select e.tx
         from tidemark.record_batch_events e
         where e.partition_id = c.partition_id and (e.tx, e.id) > (c.seen_tx, c.seen_id) and n.first_tx is not null
         limit $3::int)
        limit $3::int
    ) x on true
    limit $4::int
) f
group by f.partition_id, f.late
order by f.partition_id
