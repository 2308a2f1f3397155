-- Remembers how far a fan-out got: $1 the last transaction it saw, $2 those that were running. Appended, and the rows before it
-- deleted: one row that is updated would leave a version behind each time, all of which the next one reads under a held
-- snapshot. Never back: of two fan-outs at once the later one counts.
with saved as (
    insert into tidemark.fan_outs (seen_tx, in_flight)
    select $1::bigint, $2::bigint[]
    where (select f.seen_tx from tidemark.fan_outs f order by f.id desc limit 1) <= $1::bigint
    returning id
)
delete from tidemark.fan_outs f using saved s where f.id >= s.id - 10 and f.id < s.id
