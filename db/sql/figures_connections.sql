-- Sessions of this database by state, Tidemark's and others', and how many the server admits in all.
select a.application_name = 'tidemark', coalesce(a.state, 'unknown'), count(*),
       current_setting('max_connections')::int
from pg_stat_activity a
where a.datname = current_database() and a.backend_type = 'client backend'
group by 1, 2
