-- Gives the cursors a meaning in this cluster after a restore into it. One transaction; nobody commits or materializes
-- meanwhile.
-- Partitions first, as everything else does.
lock table tidemark.topic_partitions, tidemark.objects, tidemark.record_batch_events in access exclusive mode;

-- Consumed events would look pending once the cursors are reset.
delete from tidemark.record_batch_events e
using tidemark.topic_partitions p
where p.id = e.partition_id and (e.xid, e.id) <= (p.seen_xid, p.seen_id) and e.xid <> all (p.in_flight);

-- Pending events keep their order: ids of one low transaction id, below those of every commit to come. The ids are
-- negative, so they meet none that the sequence will give.
with moved as (
    delete from tidemark.record_batch_events returning *
)
insert into tidemark.record_batch_events
    (xid, id, object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
overriding system value
select '3'::xid8, row_number() over (order by m.xid, m.id) - count(*) over () - 1, m.object_id, m.byte_offset,
       m.max_timestamp, m.partition_id, m.n_records, m.byte_length
from moved m;

update tidemark.topic_partitions
set seen_xid = '2', seen_id = 0, in_flight = '{}'
where seen_xid <> '2' or seen_id <> 0 or in_flight <> '{}';

-- Or fan-out would take the old commits for new ones until this cluster's transaction ids pass theirs.
update tidemark.objects set xid = '3' where xid >= pg_snapshot_xmin(pg_current_snapshot());

update tidemark.fan_out_state set seen = pg_current_snapshot(), seen_at = clock_timestamp();

update tidemark.cluster set system_identifier = (select s.system_identifier from pg_control_system() s);
