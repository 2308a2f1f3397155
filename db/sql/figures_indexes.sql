-- Tidemark's indexes and their bytes on disk.
select s.relname::text, s.indexrelname::text, pg_relation_size(s.indexrelid)
from pg_stat_user_indexes s
where s.schemaname = 'tidemark'
order by s.relname, s.indexrelname
