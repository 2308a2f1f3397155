-- name: doctor_server
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
where d.datname = current_database();

-- name: doctor_settings
-- Server settings as this session has them, and where they come from: $1 names.
select s.name, s.setting, s.unit, s.source, s.context, s.pending_restart
from pg_settings s
where s.name = any ($1::text[]);

-- name: doctor_defaults
-- Settings that a role or a database brings along, for this database: $1 names of settings.
select r.rolname::text, d.datname::text, split_part(c.setting, '=', 1), substr(c.setting, strpos(c.setting, '=') + 1)
from pg_db_role_setting s
left join pg_roles r on r.oid = s.setrole
left join pg_database d on d.oid = s.setdatabase
cross join unnest(s.setconfig) c(setting)
where (s.setdatabase = 0 or d.datname = current_database()) and split_part(c.setting, '=', 1) = any ($1::text[])
order by 1 nulls first, 2 nulls first, 3;

-- name: doctor_rules
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
order by 1, 4;

-- name: doctor_privileges
-- Tables of the schema: what this role may not do with them, and what the producer role may; null without that role.
select c.relname::text,
       array(select u.right from unnest(array['select', 'insert', 'update', 'delete']) u("right")
             where not has_table_privilege(c.oid, u.right)),
       case when to_regrole('tidemark_producer') is not null then
           array(select u.right from unnest(array['select', 'insert', 'update', 'delete', 'truncate']) u("right")
                 where has_table_privilege(to_regrole('tidemark_producer'), c.oid, u.right))
       end
from pg_class c
where c.relnamespace = to_regnamespace('tidemark') and c.relkind = 'r' and c.relname <> 'alembic_version'
order by c.relname;

-- name: doctor_tables
-- Tables of the schema with their storage parameters, what vacuum left to do in them, and whether it is at it.
select c.relname::text, c.relpersistence = 'p', coalesce(c.reloptions, '{}'), coalesce(s.n_live_tup, 0),
       coalesce(s.n_dead_tup, 0), extract(epoch from clock_timestamp() - greatest(s.last_autovacuum, s.last_vacuum))::float8,
       v.phase
from pg_class c
left join pg_stat_all_tables s on s.relid = c.oid
left join pg_stat_progress_vacuum v on v.relid = c.oid
where c.relnamespace = to_regnamespace('tidemark') and c.relkind = 'r'
order by c.relname;

-- name: doctor_functions
-- Functions of the schema: name, signature, and whether this role, everybody, and the producer role may execute it.
select p.proname::text,
       format('tidemark.%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)),
       has_function_privilege(p.oid, 'execute'),
       exists (select from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where a.grantee = 0),
       coalesce(has_function_privilege(to_regrole('tidemark_producer'), p.oid, 'execute'), false)
from pg_proc p
where p.pronamespace = to_regnamespace('tidemark')
order by 2;

-- name: doctor_clock
-- The server's clock, in seconds since the epoch.
select extract(epoch from clock_timestamp())::float8;
