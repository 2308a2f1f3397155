-- The server and this database: version, recovery, encoding, age in transactions, connections, who asks, pg_hint_plan.
select current_setting('server_version_num')::int,
       current_setting('server_version'),
       pg_is_in_recovery(),
       pg_encoding_to_char(d.encoding)::text,
       age(d.datfrozenxid),
       current_setting('max_connections')::int
           - current_setting('superuser_reserved_connections')::int
           - coalesce(current_setting('reserved_connections', true)::int, 0),
       (select count(*) from pg_stat_activity a where a.backend_type = 'client backend'),
       current_user::text,
       d.datname::text,
       pg_has_role('pg_monitor', 'usage'),
       -- Only superusers may see which libraries are loaded; everybody sees the settings of those that are. Not by
       -- current_setting, which knows what anybody has set in that name as well.
       (select s.setting::boolean from pg_settings s where s.name = 'pg_hint_plan.enable_hint')
from pg_database d
where d.datname = current_database()
