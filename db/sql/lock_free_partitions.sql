/*+ IndexScan(p topic_partitions_pkey) */
-- As lock_partitions, for those that nobody else has locked; waits for none. The ids that are missing are locked or do not exist.
with locked as materialized (
    select l.id
    from (
        select p.id
        from tidemark.topic_partitions p
        where p.id = any ($1::int[]) and (select tidemark.tx_base() is not null)
        order by p.id
        for no key update of p skip locked
    ) l
)
select a.ids, extract(epoch from clock_timestamp() - statement_timestamp())::float8 as seconds,
       set_config('tidemark.locked', a.ids::text, true)
from (select coalesce(array_agg(k.id order by k.id), '{}') as ids from locked k) a
