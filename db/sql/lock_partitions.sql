-- Locks partitions in the order of their ids, the one lock order there is: $1 partition ids. A statement of its own, always:
-- one that waited for a lock and then read events would read them as they were before the wait, and give them offsets
-- twice. NO KEY UPDATE, so that whatever references a partition is not blocked.
-- The subquery runs once.
select p.id
from tidemark.topic_partitions p
where p.id = any ($1::int[]) and (select tidemark.require_own_cluster())
order by p.id
for no key update of p
