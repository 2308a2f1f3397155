-- Constraints and indexes of the schema by name, with their table and whether they are valid.
select c.conname::text, t.relname::text, c.convalidated, false as is_index
from pg_constraint c
join pg_class t on t.oid = c.conrelid
where c.connamespace = to_regnamespace('tidemark')
union all
select i.relname::text, t.relname::text, x.indisvalid and x.indisready, true
from pg_index x
join pg_class t on t.oid = x.indrelid
join pg_class i on i.oid = x.indexrelid
where i.relnamespace = to_regnamespace('tidemark')
order by 1, 4
