-- Remembers that the commits visible in $1 are dispatched. Never back: of two fan-outs at once the later one counts.
update tidemark.fan_out_state s
set seen = $1::pg_snapshot, seen_at = clock_timestamp()
where pg_snapshot_xmax(s.seen) <= pg_snapshot_xmax($1::pg_snapshot)
