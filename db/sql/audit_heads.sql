-- Audit: what is wrong with the ends of the logs of partitions $1, and with their cursors. Some index descents each.
select i.id, v.invariant, v.at, v.detail
from unnest($1::int[]) i(id)
left join tidemark.audit_progress a on a.partition_id = i.id
left join lateral (
    select n.*, coalesce(n.seen_tx, n.last_tx) - tidemark.tx_base() as seen_xid
    from tidemark.runs n
    where n.partition_id = i.id
    order by n.start_offset desc
    limit 1
) n on true
left join tidemark.passes p on p.tx = n.pass_tx
left join lateral (
    select l.start_offset, l.start_bytes
    from tidemark.log_starts l
    where l.partition_id = i.id
    order by l.start_offset desc
    limit 1
) l on true
cross join lateral (select coalesce(l.start_offset, 0) as start_offset, coalesce(n.end_offset, 0) as end_offset) h
left join lateral (
    select f.start_offset, f.end_offset
    from tidemark.runs f
    where f.partition_id = i.id and f.start_offset <= h.start_offset
    order by f.start_offset desc
    limit 1
) f on true
cross join lateral (values
    ('start_offset', h.start_offset > h.end_offset, h.start_offset,
     format('the start offset %s lies beyond the end offset %s', h.start_offset, h.end_offset)),
    ('start_offset', h.start_offset < h.end_offset and (f.end_offset > h.start_offset) is not true, h.start_offset,
     format('no run holds the start offset %s, though the log ends at %s', h.start_offset, h.end_offset)),
    ('byte_size', l.start_bytes not between 0 and n.end_bytes, h.start_offset,
     format('%s bytes lie before the start offset %s, but %s before the end', l.start_bytes, h.start_offset, n.end_bytes)),
    ('end_offset', a.audited_to > h.end_offset, h.end_offset,
     format('the end offset %s went back: batches up to %s were audited at %s', h.end_offset, a.audited_to, a.audited_at)),
    -- The last event that was materialized was committed, so its transaction is over. Ids below 1 are from before a rebase.
    ('cursor', n.seen_xid >= 1 and not pg_visible_in_snapshot(n.seen_xid::text::xid8, pg_current_snapshot()), n.start_offset,
     format('transaction %s of the cursor is not over in snapshot %s', n.seen_xid, pg_current_snapshot())),
    ('in_flight', p.in_flight <> array(select distinct x.tx from unnest(p.in_flight) x(tx) order by x.tx), n.start_offset,
     format('in_flight %s of pass %s is not ascending', p.in_flight, p.tx))
) v(invariant, violated, at, detail)
where v.violated
order by i.id
