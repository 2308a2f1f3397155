/*+ IndexScan(p topic_partitions_pkey) */
-- Locks partitions in the order of their ids, the one lock order there is: $1 partition ids. A statement of its own, always:
-- one that waited for a lock and then read events would read them as they were before the wait, and give them offsets
-- twice. NO KEY UPDATE, so that whatever references a partition is not blocked.
--
-- One row: the ids that exist, and the seconds that this took. They are told by the server, for a client that sends the next
-- statement along with this one cannot see the moment between them. That statement reads the ids from the setting.
with locked as materialized (
    select l.id
    from (
        select p.id
        from tidemark.topic_partitions p
        where p.id = any ($1::int[]) and (select tidemark.tx_base() is not null)
        order by p.id
        for no key update of p
    ) l
)
select a.ids, extract(epoch from clock_timestamp() - statement_timestamp())::float8 as seconds,
       set_config('tidemark.locked', a.ids::text, true)
from (select coalesce(array_agg(k.id order by k.id), '{}') as ids from locked k) a
