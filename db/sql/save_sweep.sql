-- Remembers a full round of the sweep: the transactions below $1 but those of $2 are settled, and passes up to $3 deleted.
-- Appended like a fan-out's row. Never back: of two rounds at once the further one counts.
with saved as (
    insert into tidemark.sweeps (settled_tx, unsettled, collected_tx)
    select $1::bigint, $2::bigint[], $3::bigint
    where (select w.settled_tx from tidemark.sweeps w order by w.id desc limit 1) <= $1::bigint
    returning id
)
delete from tidemark.sweeps w using saved s where w.id >= s.id - 10 and w.id < s.id
