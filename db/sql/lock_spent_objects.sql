-- Retention: locks the objects whose batches it deleted, in the order of their ids. A statement of its own, before they are
-- counted: of two transactions that delete the last batches of an object at one moment the second waits here, and counts
-- with the first one's. Otherwise each would miss the other's. A lock leaves no version of the row behind.
select count(*)
from (
    select o.id
    from tidemark.objects o
    where o.id = any (current_setting('tidemark.spent')::bigint[])
    order by o.id
    for no key update of o
) l
