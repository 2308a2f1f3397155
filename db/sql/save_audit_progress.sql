-- Remembers that the batches of partitions $1 are audited up to offsets $2. Never back: of two audits at once the further one
-- counts.
insert into tidemark.audit_progress as a (partition_id, audited_to)
select r.id, r.audited_to
from unnest($1::int[], $2::bigint[]) r(id, audited_to)
order by r.id
on conflict on constraint audit_progress_pkey do update
set audited_to = greatest(a.audited_to, excluded.audited_to), audited_at = clock_timestamp()
