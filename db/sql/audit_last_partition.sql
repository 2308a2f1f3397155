-- The partition whose progress was saved last: where the audit before this one was. Reads audit_progress only.
select a.partition_id
from tidemark.audit_progress a
order by a.audited_at desc, a.partition_id desc
limit 1
