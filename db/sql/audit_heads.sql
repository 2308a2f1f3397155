-- Audit: what is wrong with the heads of partitions $1, seen beside their first and last batch. Three index descents each.
select p.id, v.invariant, v.at, v.detail
from tidemark.topic_partitions p
left join tidemark.audit_progress a on a.partition_id = p.id
left join lateral (
    select b.start_offset, b.start_offset + b.n_records as end_offset
    from tidemark.record_batches b
    where b.partition_id = p.id
    order by b.start_offset
    limit 1
) f on true
left join lateral (
    select b.start_offset, b.start_offset + b.n_records as end_offset
    from tidemark.record_batches b
    where b.partition_id = p.id
    order by b.start_offset desc
    limit 1
) l on true
cross join lateral (values
    ('start_offset', p.start_offset < p.end_offset and f.start_offset is null, p.start_offset,
     format('there is no batch, though the log is [%s, %s)', p.start_offset, p.end_offset)),
    ('start_offset', p.start_offset < p.end_offset and f.start_offset > p.start_offset, p.start_offset,
     format('the first batch is [%s, %s), after the start offset %s', f.start_offset, f.end_offset, p.start_offset)),
    ('start_offset', f.end_offset <= p.start_offset, p.start_offset,
     format('the first batch is [%s, %s), before the start offset %s', f.start_offset, f.end_offset, p.start_offset)),
    ('end_offset', l.end_offset <> p.end_offset, p.end_offset,
     format('the last batch is [%s, %s), the end offset %s', l.start_offset, l.end_offset, p.end_offset)),
    ('end_offset', a.audited_to > p.end_offset, p.end_offset,
     format('the end offset %s went back: batches up to %s were audited at %s', p.end_offset, a.audited_to, a.audited_at)),
    -- The last event that was materialized was committed, so its transaction is over.
    ('cursor', not pg_visible_in_snapshot(p.seen_xid, pg_current_snapshot()), null,
     format('seen_xid %s is not over in snapshot %s', p.seen_xid, pg_current_snapshot())),
    ('in_flight', (select coalesce(bool_or(x.xid is null or x.xid >= p.seen_xid), false) from unnest(p.in_flight) x(xid)),
     null, format('in_flight %s is not all below seen_xid %s', p.in_flight, p.seen_xid))
) v(invariant, violated, at, detail)
where p.id = any ($1::int[]) and v.violated
order by p.id
