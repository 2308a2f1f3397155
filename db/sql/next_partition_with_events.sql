/*+ IndexOnlyScan(e record_batch_events_pkey) */
-- The first partition after $1 that has event rows, pending or consumed; none is null. One index descent.
select min(e.partition_id)
from tidemark.record_batch_events e
where e.partition_id > $1::int
