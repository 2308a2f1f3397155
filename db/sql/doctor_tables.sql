-- Tables of the schema with their storage parameters, what vacuum left to do in them, and whether it is at it.
select c.relname::text, c.relpersistence = 'p', coalesce(c.reloptions, '{}'), coalesce(s.n_live_tup, 0),
       coalesce(s.n_dead_tup, 0), extract(epoch from clock_timestamp() - greatest(s.last_autovacuum, s.last_vacuum))::float8,
       v.phase
from pg_class c
left join pg_stat_all_tables s on s.relid = c.oid
left join pg_stat_progress_vacuum v on v.relid = c.oid
where c.relnamespace = to_regnamespace('tidemark') and c.relkind = 'r'
order by c.relname
