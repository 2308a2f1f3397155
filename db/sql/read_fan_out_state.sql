-- The snapshot up to which commits are dispatched: its first transaction yet to come, and those that were running.
select pg_snapshot_xmax(s.seen)::text, array(select pg_snapshot_xip(s.seen))::text[]
from tidemark.fan_out_state s
