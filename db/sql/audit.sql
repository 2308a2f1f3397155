-- name: audit_partitions
-- The $3 partitions, of topic $4 or of all, that follow partition id $1 up to $2; and up to where each is audited.
select p.id as partition_id, a.audited_to as "offset", a.audited_to as saved
from tidemark.topic_partitions p
left join tidemark.audit_progress a on a.partition_id = p.id
where p.id > $1::int and p.id <= $2::int
  and ($4::text is null or p.topic_id = (select t.id from tidemark.topics t where t.name = $4::text))
order by p.id
limit $3::int;

-- name: audit_heads
-- Audit: what is wrong with the ends of the logs of partitions $1, and with their cursors. Some index descents each.
select i.id as partition_id, v.invariant, v.at as "offset", v.detail
from unnest($1::int[]) i(id)
left join tidemark.audit_progress a on a.partition_id = i.id
left join lateral tidemark.newest_run(i.id) n on true
cross join lateral (select coalesce(n.seen_tx, n.last_tx) - tidemark.tx_base() as seen_xid offset 0) x
left join tidemark.passes p on p.tx = n.pass_tx
left join lateral tidemark.log_start(i.id) l on true
cross join lateral (select coalesce(l.start_offset, 0) as start_offset, coalesce(n.end_offset, 0) as end_offset) h
left join lateral tidemark.run_at(i.id, h.start_offset) f on true
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
    ('cursor', x.seen_xid >= 1 and not pg_visible_in_snapshot(x.seen_xid::text::xid8, pg_current_snapshot()), n.start_offset,
     format('transaction %s of the cursor is not over in snapshot %s', x.seen_xid, pg_current_snapshot())),
    ('in_flight', p.in_flight <> array(select distinct x.tx from unnest(p.in_flight) x(tx) order by x.tx), n.start_offset,
     format('in_flight %s of pass %s is not ascending', p.in_flight, p.tx))
) v(invariant, violated, at, detail)
where v.violated
order by i.id;

-- name: audit_runs
-- Audit: a stretch of partitions $1: whole runs from offsets $2 on (null, or deleted meanwhile: from the first one), until $3
-- batches of each are read. A row without invariant for each partition: up to where it is read, how many batches, whether
-- there is more. The others are offences: the first of a kind in a partition, and how many there are.
with cursor as materialized (
    select c.* from tidemark.cursors($1::int[]) c
),
place as materialized (
    select q.*, case when not q.is_whole then f end as before,
           case when not q.is_whole then q.asked
                when f.end_offset > q.log_start then f.start_offset
                else q.log_start end as from_offset
    from (
        select i.id, i.asked, coalesce(l.deleted_to, 0) as log_start,
               case when (l.start_offset > l.deleted_to) is not true then coalesce(l.start_bytes, 0) end as start_bytes,
               (i.asked > coalesce(l.deleted_to, 0)) is not true as is_whole
        from unnest($1::int[], $2::bigint[]) i(id, asked)
        left join lateral tidemark.log_start(i.id) l on true
    ) q
    -- The first run, or the one before the stretch. One descent: below the log's start there may be many that are deleted.
    left join lateral tidemark.run_at(q.id, case when q.is_whole then q.log_start else q.asked - 1 end) f on true
),
-- Each run, and what the one before it says about where it begins: unknown, for the first one of a log that was deleted from.
sequence as materialized (
    select x.partition_id, x.run, (x.run).start_offset, (x.run).end_offset, (x.run).seen_tx is not null as is_late,
           (x.run).first_tx, coalesce((x.run).first_id, -9223372036854775808) as first_id,
           (x.run).last_tx, coalesce((x.run).last_id, 9223372036854775807) as last_id,
           coalesce((x.before).end_offset, (x.run).start_offset) as previous_end,
           coalesce((x.before).end_bytes, case when (x.run).start_offset = x.log_start then x.start_bytes end)
               as previous_bytes,
           (x.before).max_timestamp as previous_timestamp,
           coalesce((x.before).seen_tx, (x.before).last_tx, case when (x.run).start_offset = 0 then 0 end) as seen_tx,
           coalesce(case when (x.before).seen_tx is null then (x.before).last_id else (x.before).seen_id end,
                    9223372036854775807) as seen_id
    from (
        select p.id as partition_id, p.log_start, p.start_bytes, m.run,
               coalesce(lag(m.run) over (partition by p.id order by (m.run).start_offset), p.before) as before
        from place p
        cross join lateral (
            select o.run, sum((o.run).batches) over (order by (o.run).start_offset) - (o.run).batches as read
            from (
                select r as run
                from tidemark.runs r
                where r.partition_id = p.id and r.start_offset >= p.from_offset
                order by r.start_offset
                limit $3::int
            ) o
        ) m
        where m.read < $3::int
    ) x
),
-- One scan for each run; for one that is not late, from the position before it. Whatever there is not the run's must
-- be of a late transaction.
counted as materialized (
    select s.*, e.*
    from sequence s
    cross join lateral (
        select (not s.is_late and (s.seen_tx, s.seen_id) < (s.first_tx, s.first_id)) is true as is_known
    ) u
    cross join lateral (
        select count(*) filter (where k.is_inside) as batches,
               coalesce(sum(v.n_records) filter (where k.is_inside), 0) as records,
               coalesce(sum(v.byte_length) filter (where k.is_inside), 0) as bytes,
               max(v.max_timestamp) filter (where k.is_inside) as newest,
               array_agg(v.id >> 16) filter (where k.is_inside) as object_ids,
               array_agg(distinct v.tx) filter (
                   where not k.is_inside and ((v.tx, v.id) > (s.seen_tx, s.seen_id)) is not false) as passed
        from tidemark.record_batch_events v
        cross join lateral (
            select (v.tx, v.id) >= (s.first_tx, s.first_id) and ((s.run).skipped is null or v.tx <> all ((s.run).skipped))
                       as is_inside
        ) k
        where v.partition_id = s.partition_id
          and (v.tx, v.id) >= (case when u.is_known then s.seen_tx else s.first_tx end,
                               case when u.is_known then s.seen_id else s.first_id end)
          and (v.tx, v.id) <= (s.last_tx, s.last_id)
    ) e
),
stretch as materialized (
    select n.partition_id, max(n.end_offset) as next_offset, sum(n.batches)::bigint as batches
    from counted n
    group by n.partition_id
),
progress as materialized (
    select p.id, p.is_whole, m.*,
           -- At the end of the log, what is pending.
           case when not m.has_more then array(
               select w.object_id
               from tidemark.pending_events(c.partition_id, c.seen_tx, c.seen_id, c.last_tx, c.last_id, c.late, $3::int) w
               limit $3::int
           ) end as pending
    from place p
    join cursor c on c.partition_id = p.id
    left join stretch h on h.partition_id = p.id
    cross join lateral (
        select coalesce(h.next_offset, p.from_offset) as next_offset, coalesce(h.batches, 0) as batches,
               coalesce(c.end_offset > h.next_offset, false) as has_more
    ) m
),
passed as materialized (
    select n.partition_id, n.start_offset, x.tx from counted n cross join lateral unnest(n.passed) x(tx)
),
-- Of a late transaction that has ended, all batches lie in runs of its own, one behind the other; or they are pending. In each
-- partition the first one that is neither: looking for a run that does not exist reads the rest of the log.
unplaced as (
    select c.partition_id, u.*
    from cursor c
    cross join lateral (
        select l.start_offset, l.tx, t.events, w.placed
        from passed l
        cross join lateral (
            select count(*) as events, sum(v.n_records) as records
            from tidemark.record_batch_events v
            where v.partition_id = l.partition_id and v.tx = l.tx
        ) t
        left join lateral (
            select r.start_offset
            from tidemark.runs r
            where r.partition_id = l.partition_id and r.start_offset > l.start_offset and r.first_tx = l.tx
              and r.seen_tx is not null
            order by r.start_offset
            limit 1
        ) f on true
        cross join lateral (
            select coalesce(sum(r.batches), 0) as placed
            from tidemark.runs r
            where r.partition_id = l.partition_id and r.first_tx = l.tx
              and r.start_offset >= f.start_offset and r.start_offset < f.start_offset + t.records
        ) w
        where l.partition_id = c.partition_id and (l.tx = any (c.late)) is not true and w.placed <> t.events
        limit 1
    ) u
),
touched as materialized (
    select t.*, sum(t.batches + t.waiting) over (partition by t.object_id) as found
    from (
        select b.partition_id, b.object_id, count(b.start_offset) as batches, count(*) - count(b.start_offset) as waiting,
               min(b.start_offset) as first_start
        from (
            select n.partition_id, x.object_id, n.start_offset from counted n cross join lateral unnest(n.object_ids) x(object_id)
            union all
            select g.id, x.object_id, null from progress g cross join lateral unnest(g.pending) x(object_id)
        ) b
        group by b.partition_id, b.object_id
    ) t
),
offence as (
    select s.partition_id, s.start_offset as at, v.invariant,
           format('run [%s, %s) ', s.start_offset, s.end_offset) || v.detail as detail
    from counted s
    cross join lateral (values
        ('gap', s.start_offset > s.previous_end, format('starts after %s, the end of the one before', s.previous_end)),
        ('overlap', s.start_offset < s.previous_end, format('starts before %s, the end of the one before', s.previous_end)),
        ('batches', (s.run).batches <> s.batches, format('has %s batches, and events %s', (s.run).batches, s.batches)),
        ('records', s.end_offset - s.start_offset <> s.records, format('has events with %s records', s.records)),
        ('byte_size', s.start_offset = s.previous_end and (s.run).end_bytes <> s.previous_bytes + s.bytes,
         format('ends at byte %s, but its events have %s after %s', (s.run).end_bytes, s.bytes, s.previous_bytes)),
        ('max_timestamp',
         s.start_offset = s.previous_end and case
             when s.seen_tx is null then (s.run).max_timestamp < s.newest
             else (s.run).max_timestamp <> greatest(s.previous_timestamp, s.newest) end,
         format('has max_timestamp %s, but its events have %s after %s', (s.run).max_timestamp, s.newest, s.previous_timestamp)),
        ('position',
         s.start_offset = s.previous_end and s.seen_tx is not null and case
             when s.is_late then ((s.run).seen_tx, (s.run).seen_id) <> (s.seen_tx, s.seen_id)
                                 or s.first_tx <> s.last_tx or s.first_tx > s.seen_tx
             else (s.first_tx, s.first_id) <= (s.seen_tx, s.seen_id) end,
         format('with events (%s, %s) to (%s, %s) does not go on from the position (%s, %s)',
                s.first_tx, s.first_id, s.last_tx, s.last_id, s.seen_tx, s.seen_id))
    ) v(invariant, violated, detail)
    where v.violated
    union all
    select p.id, (p.before).start_offset, 'overlap',
           format('run [%s, %s) ends beyond %s, where it was audited', (p.before).start_offset, (p.before).end_offset, p.asked)
    from place p
    where (p.before).end_offset > p.asked
    union all
    select u.partition_id, u.start_offset, 'unplaced',
           format('transaction %s has %s batches below the end of the run at offset %s, %s are placed and none is pending',
                  u.tx, u.events, u.start_offset, u.placed)
    from unplaced u
    union all
    select t.partition_id, t.first_start, v.invariant, v.detail
    from touched t
    left join tidemark.objects o on o.id = t.object_id
    -- Partitions all of whose batches were read, from the first to the last that is pending.
    cross join (
        select coalesce(array_agg(g.id), '{}') as ids from progress g where g.is_whole and cardinality(g.pending) < $3::int
    ) a
    cross join lateral (
        select coalesce(sum(d.batches), 0) as deleted from tidemark.deleted_batches d where d.object_id = t.object_id
    ) d
    cross join lateral (
        select format('object %s (%L), ', o.id, o.key)
               || coalesce(format('first in the run at offset %s, ', t.first_start), 'which is pending, ') as which,
               o.batch_counts[array_position(o.partition_ids, t.partition_id)] as committed
    ) k
    cross join lateral (values
        ('object', o.id is null,
         format(case when t.first_start is null then 'a pending event' else 'a batch of the run at offset %2$s' end
                || ' refers to object %1$s, which does not exist', t.object_id, t.first_start)),
        ('batch_count', t.batches > coalesce(k.committed, 0),
         format('%sbrought %s batches here, there are %s', k.which, coalesce(k.committed, 0), t.batches)),
        ('dead_object', exists (select from tidemark.dead_objects d where d.object_id = o.id), k.which || 'is in dead_objects'),
        ('object_count', d.deleted + t.found > o.batches
                         or (d.deleted + t.found < o.batches and o.partition_ids <@ a.ids),
         format('%sbrought %s batches, %s are deleted and %s here', k.which, o.batches, d.deleted, t.found))
    ) v(invariant, violated, detail)
    where v.violated and (o.id is not null or v.invariant = 'object')
)
select g.id as partition_id, null as invariant, g.next_offset as "offset", null as detail, g.batches as times, g.has_more
from progress g
union all
(select distinct on (f.partition_id, f.invariant)
        f.partition_id, f.invariant, f.at, f.detail, count(*) over (partition by f.partition_id, f.invariant), false
 from offence f
 order by f.partition_id, f.invariant, f.at);

-- name: save_audit_progress
-- Remembers that the batches of partitions $1 are audited up to offsets $2. Never back: of two audits at once the further one
-- counts.
insert into tidemark.audit_progress as a (partition_id, audited_to)
select r.id, r.audited_to
from unnest($1::int[], $2::bigint[]) r(id, audited_to)
order by r.id
on conflict on constraint audit_progress_pkey do update
set audited_to = greatest(a.audited_to, excluded.audited_to), audited_at = clock_timestamp();

-- name: forget_audit_progress
-- Makes the next audit read partitions $1 from their first batch on; all partitions, where $1 is null.
delete from tidemark.audit_progress a
where $1::int[] is null or a.partition_id = any ($1::int[]);

-- name: audit_left
-- Records an audit has yet to read, for a progress bar: $1 topic name, null for all.
select coalesce(sum(p.end_offset - greatest(p.start_offset, a.audited_to)), 0)::numeric
from tidemark.named_partitions p
left join tidemark.audit_progress a on a.partition_id = p.partition_id
where $1::text is null or p.topic = $1::text;

-- name: audit_last_partition
-- The partition whose progress was saved last: where the audit before this one was. Reads audit_progress only.
select a.partition_id
from tidemark.audit_progress a
order by a.audited_at desc, a.partition_id desc
limit 1;
