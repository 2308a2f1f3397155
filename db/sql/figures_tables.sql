-- Tidemark's tables: bytes on disk without indexes, live and dead rows as the statistics estimate them.
select s.relname::text, pg_table_size(s.relid), s.n_live_tup, s.n_dead_tup
from pg_stat_user_tables s
where s.schemaname = 'tidemark'
order by s.relname
