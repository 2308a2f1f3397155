-- The moment a round of the sweep begins: the first transaction yet to come, those that run, and up to which transaction the
-- rounds before have deleted passes.
select c.tx_base + pg_snapshot_xmax(pg_current_snapshot())::text::bigint, tidemark.running_transactions(),
       (select w.collected_tx from tidemark.sweeps w order by w.id desc limit 1)
from tidemark.cluster c
