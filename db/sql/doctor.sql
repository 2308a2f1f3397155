-- name: doctor_server
-- The server and this database: $1 shards, $2 connections that one process may open.
-- As all statements of the doctor it gives a row for each thing that may be wrong: whether it is, how bad that would be, what
-- is there, why it matters, and the statements or commands that repair it. Where a check looks at many things, the row's item is
-- the one; the row without an item is for the case that nothing is wrong.
select v.*
from (
    select current_setting('server_version_num')::int / 10000 as major, current_setting('server_version') as version,
           pg_is_in_recovery() as standby, pg_encoding_to_char(d.encoding)::text as encoding, d.datname as database,
           current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
               - coalesce(current_setting('reserved_connections', true)::int, 0) as allowed,
           (select count(*) from pg_stat_activity a where a.backend_type = 'client backend') as used,
           -- Only superusers may see which libraries are loaded; everybody sees the settings of those that are. Not by
           -- current_setting, which knows what anybody has set in that name as well.
           (select s.setting::boolean from pg_settings s where s.name = 'pg_hint_plan.enable_hint') as hints,
           array[format('alter system set max_connections = %s;', greatest(200, 2 * ($1::int + $2::int))), 'restart Postgres']
               as more
    from pg_database d
    where d.datname = current_database()
) s
cross join lateral (values
    ('server', 'Postgres', s.major < 15, 'fail', s.version, 'Tidemark needs 15 or later.', array['upgrade to Postgres 18']),
    ('server', 'Postgres', s.major > 18, 'warn', s.version, 'Tidemark was tested up to 18.', array['install a newer tidemark']),
    ('server', 'primary', s.standby, 'fail', case when s.standby then 'no, in recovery' else 'yes' end,
     'A standby takes no commits.', array['let TIDEMARK_DATABASE_URL name the primary']),
    ('server', 'encoding', s.encoding <> 'UTF8', 'fail', s.encoding, 'Object keys are any text; this encoding cannot hold it.',
     array[format('create database %I template template0 encoding ''UTF8'';', s.database)]),
    -- Told, not judged: the settings of the transactions pin the plans with it and without.
    ('server', 'pg_hint_plan', false, 'ok',
     case when s.hints then 'loaded; the statements'' hints are used, beside the settings that pin the plans'
          when not s.hints then 'loaded, but pg_hint_plan.enable_hint is off; settings pin the plans'
          else 'not loaded, nor needed: settings pin the plans' end, '', '{}'),
    ('server', 'connections', s.allowed < $1::int + $2::int, 'warn', format('%s allowed, %s in use', s.allowed, s.used),
     format('%s shards take a connection each, and a process with threads up to TIDEMARK_POOL_OPEN = %s.', $1::int, $2::int),
     s.more),
    ('server', 'connections', s.used > 0.8 * s.allowed, 'warn', format('%s allowed, %s in use', s.allowed, s.used),
     'Nearly all are taken; the next worker may find none.', s.more)
) v(area, "check", bad, level, found, why, repair);

-- name: doctor_settings
-- Server settings as this session has them: $1 whether it is the embedded server, which may be small. config/postgresql.conf
-- has the reasons at length. A value is one of those in `good`, or lies within the bounds.
with rule(name, wanted, good, least, most, level, size, why) as (values
    ('fsync', 'on', 'on', null, null, 'fail', false, 'A crash of the machine corrupts the database.'),
    ('full_page_writes', 'on', 'on', null, null, 'fail', false, 'A crash in the middle of a page''s write corrupts it.'),
    ('autovacuum', 'on', 'on', null, null, 'fail', false,
     'Rows are not frozen, so Postgres stops one day; what retention deletes stays; statistics get old.'),
    ('default_transaction_isolation', 'read committed', 'read committed', null, null, 'warn', false,
     'Repeated commits end in serialization errors where they would return the first result.'),
    ('default_transaction_read_only', 'off', 'off', null, null, 'fail', false, 'Nothing can be committed.'),
    ('shared_buffers', '1GB', null, '256MB', null, 'warn', true,
     'Pending events, partitions and the newest runs should fit; a quarter of memory.'),
    ('effective_cache_size', '4GB', null, current_setting('shared_buffers'), null, 'warn', false,
     'Below shared_buffers the planner thinks index scans dearer than they are.'),
    ('work_mem', '64MB', null, '8MB', null, 'warn', true,
     'The largest sort of the cold path takes 4 MB, an audit''s more; beyond work_mem they go to disk.'),
    ('max_wal_size', '4GB', null, '2GB', null, 'warn', true,
     'Checkpoints forced by volume write every page whole again (checkpoint_segments was the name before 9.5).'),
    ('checkpoint_timeout', '15min', null, '5min', null, 'warn', false,
     'Frequent checkpoints write every changed page whole, again and again.'),
    ('checkpoint_completion_target', '0.9', null, '0.8', null, 'warn', false,
     'A checkpoint that hurries makes commits wait for the disk.'),
    ('wal_compression', 'off', 'off,lz4,zstd', null, null, 'warn', false,
     'pglz takes 40 % of the throughput after a checkpoint; lz4, where the build has it, a tenth.'),
    ('jit', 'off', 'off', null, null, 'warn', false, 'Compiling a short statement takes longer than running it.'),
    ('random_page_cost', '1.1', null, null, '2', 'warn', false,
     'Made for disks with arms: on solid-state ones it keeps the planner from the indexes.'),
    ('idle_in_transaction_session_timeout', '60s', null, '1ms', null, 'warn', false,
     'A forgotten transaction keeps its row locks and holds vacuum back. Tidemark''s own connections set it.'),
    ('idle_session_timeout', '0', null, null, '0', 'warn', false, 'Postgres closes connections that the pool keeps for later.'),
    ('client_connection_check_interval', '5s', null, '1ms', null, 'warn', false,
     'A worker killed in the middle of a statement keeps its partitions locked until that ends.'),
    ('track_activities', 'on', 'on', null, null, 'warn', false, 'status and top cannot say what a partition waits for.'),
    ('track_counts', 'on', 'on', null, null, 'fail', false, 'Autovacuum does not know what to do.')
),
judged as (
    select r.*, s.source, s.context, s.pending_restart, s.value,
           (s.value <> all (string_to_array(r.good, ',')) or n.v[1] < n.v[2] or n.v[1] > n.v[3]) and not (r.size and $1::boolean)
               as bad
    from rule r
    join (select p.*, current_setting(p.name) as value from pg_settings p) s on s.name = r.name
    -- The value and its bounds in bytes, seconds, or as they are.
    cross join lateral (
        select array_agg(case when s.unit ~ 'B$' then pg_size_bytes(t.v)::float8
                              when s.unit is not null then extract(epoch from t.v::interval)::float8
                              when r.good is null then t.v::float8 end order by t.i) as v
        from unnest(array[s.value, r.least, r.most]) with ordinality t(v, i)
    ) n
)
select 'settings' as area, j.name as "check", v.*
from judged j
left join (values
    ('database', ', the database''s default', format('alter database %I reset {};', current_database())),
    ('user', ', the role''s default', format('alter role %I reset {};', session_user)),
    ('database user', ', the role''s default in this database',
     format('alter role %I in database %I reset {};', session_user, current_database())),
    ('client', ', set by the connection', 'take {} out of TIDEMARK_DATABASE_URL and PGOPTIONS'),
    ('environment variable', ', set by the environment', null),
    ('command line', ', set on the server''s command line', 'take {} off the server''s command line, restart Postgres')
) o(source, whose, repair) on o.source = j.source
cross join lateral (values
    (coalesce(j.bad, false), j.level, j.value || case when j.bad then coalesce(o.whose, '') else '' end, j.why,
     case when o.repair is not null then array[replace(o.repair, '{}', j.name)] else
         array[format('alter system set %I = %L;', j.name, j.wanted),
               case j.context when 'postmaster' then 'restart Postgres' else 'select pg_reload_conf();' end] end),
    (j.pending_restart, 'warn', j.value || ', changed in the file', 'The new value waits for a restart of Postgres.',
     array['restart Postgres'])
) v(bad, level, found, why, repair);

-- name: doctor_defaults
-- What a role or a database must not bring along, whoever connects.
select 'settings' as area, 'role and database defaults' as "check", true as bad, 'warn' as level,
       format('%s = %s for %s', h.name, g.value,
              concat_ws(' in ', coalesce('role ' || r.rolname, 'all roles'), 'database ' || d.datname)) as found,
       h.why,
       array[format('alter %s reset %I;',
                    case when s.setrole = 0 and s.setdatabase <> 0 then 'database ' || quote_ident(d.datname)
                         else concat_ws(' in ', 'role ' || coalesce(quote_ident(r.rolname), 'all'),
                                        'database ' || quote_ident(d.datname)) end, h.name)] as repair
from pg_db_role_setting s
left join pg_roles r on r.oid = s.setrole
left join pg_database d on d.oid = s.setdatabase
cross join unnest(s.setconfig) c(setting)
cross join lateral (select split_part(c.setting, '=', 1), substr(c.setting, strpos(c.setting, '=') + 1)) g(name, value)
join (values
    ('default_transaction_read_only', '^(on|true|1|yes)$', 'Nothing can be committed.'),
    ('default_transaction_isolation', '^(serializable|repeatable read)$',
     'Repeated commits end in serialization errors where they would return the first result.')
) h(name, harmful, why) on h.name = g.name and trim(g.value, '''"') ~* h.harmful
where s.setdatabase = 0 or d.datname = current_database()
union all
select 'settings', 'role and database defaults', false, 'ok', 'nothing harmful', '', '{}';

-- name: doctor_tables
-- Tables: $1 those that should be there, $2 their storage parameters, null for none.
select 'schema' as area, 'tables' as "check", 'table ' || w.name as item, v.*
from unnest($1::text[], $2::text[]) w(name, options)
left join pg_class c on c.relnamespace = to_regnamespace('tidemark') and c.relname = w.name and c.relkind = 'r'
cross join lateral (values
    (c.oid is null, 'fail', 'missing', 'Part of the schema was dropped.',
     array['restore a backup, then: celery -A tasks rebase']),
    (c.relpersistence <> 'p', 'fail', 'unlogged', 'A crash empties it.',
     array[format('alter table tidemark.%I set logged;', w.name)]),
    (c.oid is not null and not coalesce(c.reloptions, '{}') @> string_to_array(w.options, ', '), 'warn',
     coalesce(array_to_string(c.reloptions, ', '), 'no storage parameters'),
     format('It should have %s, which leaves room for updates in place.', w.options),
     array[format('alter table tidemark.%I set (%s);', w.name, w.options)]),
    (exists (select from unnest(c.reloptions) x where x ~* '^autovacuum_enabled=(false|off|no|0)$'), 'fail',
     'autovacuum is switched off', 'Dead rows pile up, and every read gets slower.',
     array[format('alter table tidemark.%I reset (autovacuum_enabled);', w.name)])
) v(bad, level, found, why, repair)
where v.bad
union all
select 'schema', 'tables', null, false, 'ok', format('all %s, as defined', cardinality($1::text[])), '', '{}';

-- name: doctor_rules
-- Constraints and indexes. Those that should be there: $1 names, $2 their tables, $3 what makes them.
with has as (
    select c.conname::text as name, c.conrelid as tbl, c.convalidated as valid, false as is_index, false as of_constraint
    from pg_constraint c
    where c.connamespace = to_regnamespace('tidemark')
    union all
    select i.relname::text, x.indrelid, x.indisvalid and x.indisready, true,
           exists (select from pg_constraint c where c.conindid = x.indexrelid)
    from pg_index x
    join pg_class i on i.oid = x.indexrelid
    where i.relnamespace = to_regnamespace('tidemark')
)
select 'schema' as area, 'constraints and indexes' as "check",
       case when b.is_index then 'index ' else 'constraint ' end || b.name as item, v.*
from (
    select coalesce(w.name, h.name) as name, coalesce(w.tbl, h.tbl) as tbl, coalesce(w.is_index, h.is_index) as is_index,
           w.ddl, w.name is not null as ours, h.name is null as missing, h.valid, h.of_constraint
    from (select u.name, to_regclass(u.tbl)::oid as tbl, u.ddl, u.ddl ~ '^create (unique )?index ' as is_index
          from unnest($1::text[], $2::text[], $3::text[]) u(name, tbl, ddl)
          where to_regclass(u.tbl) is not null) w
    full join has h on h.name = w.name and h.is_index = w.is_index
) b
cross join lateral (values
    (b.missing, 'fail', 'missing', 'An invariant is not enforced, or statements read whole tables.', array[b.ddl]),
    (b.ours and not b.valid, 'fail', 'not valid', 'It does not cover the rows that were there before it.',
     array[case when b.is_index then format('reindex index concurrently tidemark.%I;', b.name)
                else format('alter table %s validate constraint %I;', b.tbl::regclass, b.name) end]),
    (b.of_constraint and not b.valid, 'fail', 'not valid',
     'It is not kept up or not used, so what its constraint says may not hold.',
     array[format('reindex index concurrently tidemark.%I;', b.name)]),
    -- Each further index costs commits or materialization a fifth of their throughput and more.
    (b.is_index and not b.ours and not b.of_constraint
     and b.tbl in (to_regclass('tidemark.record_batch_events'), to_regclass('tidemark.runs')), 'warn',
     format('an index too many on %s', b.tbl::regclass),
     'Each further one costs 15 to 40 per cent of throughput, and may lure the planner off the key.',
     array[format('drop index concurrently tidemark.%I;', b.name)])
) v(bad, level, found, why, repair)
where v.bad
union all
select 'schema', 'constraints and indexes', null, false, 'ok', format('all %s, valid', cardinality($1::text[])), '', '{}'
order by 3;

-- name: doctor_functions
-- Functions, and whether everybody may execute them: $1 names of those that should be there.
with has as (
    select p.proname::text as name, p.oid,
           format('tidemark.%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) as signature,
           exists (select from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where a.grantee = 0) as public
    from pg_proc p
    where p.pronamespace = to_regnamespace('tidemark')
)
select 'schema' as area, 'functions' as "check", 'function ' || coalesce(h.name, w.name) as item, v.*
from unnest($1::text[]) w(name)
full join has h on h.name = w.name
cross join lateral (values
    (h.name is null, 'fail', 'missing', 'Every statement that uses it fails.', array['celery -A tasks migrate']),
    (h.public, 'warn', 'every role may execute it', 'Only members of Tidemark''s roles should.',
     array[format('revoke execute on function %s from public;', h.signature)])
) v(bad, level, found, why, repair)
where v.bad
union all
select 'schema', 'functions', null, false, 'ok', format('all %s', count(*)), '', '{}'
from has
order by 3;

-- name: doctor_privileges
-- Whether this role may work as one of the group roles, and sees others' sessions; and whether each of them may do what
-- tidemark.group_rights() says, and no more: by its own grants, as a member of another role, or because everybody may.
with place as (
    select p.proname::text as object, p.oid, 'f' as kind,
           format('function tidemark.%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)) as name
    from pg_proc p
    where p.pronamespace = to_regnamespace('tidemark')
    union all
    select c.relname::text, c.oid, c.relkind::text, format('tidemark.%I', c.relname)
    from pg_class c
    where c.relnamespace = to_regnamespace('tidemark') and c.relkind in ('r', 'v', 'S')
),
wanted as (
    select r.role, r."right", p.name, p.oid, p.kind
    from tidemark.group_rights() r
    join place p on p.object = r.object
),
role as (
    select r.role, to_regrole(r.role) as oid
    from tidemark.group_rights() r
    group by r.role
),
held as (
    select g.role, x."right", p.name
    from role g
    cross join place p
    cross join unnest(array['execute', 'select', 'insert', 'update', 'delete', 'truncate', 'references', 'trigger', 'usage'])
        x("right")
    where case when (p.kind = 'f') <> (x."right" = 'execute') then false
               when p.kind = 'f' then has_function_privilege(g.oid, p.oid, x."right")
               when p.kind = 'S' then
                   x."right" in ('select', 'update', 'usage') and has_sequence_privilege(g.oid, p.oid, x."right")
               else x."right" <> 'usage' and has_table_privilege(g.oid, p.oid, x."right") end
    union all
    select g.role, format('%s (%I)', x."right", a.attname), p.name
    from role g
    cross join place p
    join pg_attribute a on a.attrelid = p.oid and a.attacl is not null
    cross join unnest(array['select', 'insert', 'update', 'references']) x("right")
    where p.kind in ('r', 'v') and has_column_privilege(g.oid, p.oid, a.attnum, x."right")
      and not has_table_privilege(g.oid, p.oid, x."right")
),
difference as (
    select d.role, d.is_lacking, count(*) as n,
           (array_agg(format('%s on %s', d."right", d.name) order by d.name, d."right"))[1] as first,
           array_agg(case when d.is_lacking then format('grant %s on %s to %I;', d."right", d.name, d.role)
                          else format('revoke %s on %s from public, %I;', d."right", d.name, d.role) end
                     order by d.name, d."right") as repair
    from (
        select w.role, w."right", w.name, true as is_lacking
        from (select w.role, w."right", w.name from wanted w except select h.role, h."right", h.name from held h) w
        union all
        select h.role, h."right", h.name, false
        from (select h.role, h."right", h.name from held h except select w.role, w."right", w.name from wanted w) h
    ) d
    group by d.role, d.is_lacking
),
own as (
    select (select string_agg(g.role, ', ' order by g.role) from role g where pg_has_role(g.oid, 'usage')) as groups,
           -- The owner need not be a member.
           count(*) as lacking, min(format('%s on %s', w."right", w.name)) as first
    from wanted w
    where w.role = 'tidemark_worker'
      and not case w.kind when 'f' then has_function_privilege(w.oid, w."right")
              else has_table_privilege(w.oid, split_part(w."right", ' ', 1))
                   or w."right" like '% (id)' and has_column_privilege(w.oid, 'id', split_part(w."right", ' ', 1)) end
)
select 'privileges' as area, v.*
from own s
cross join lateral (values
    ('own', s.lacking > 0 and s.groups is null, 'fail',
     current_user || case when s.lacking = 0 then ' may do what workers do'
                          when s.groups is not null then ' is a member of ' || s.groups
                          else format(' may not %s%s', s.first, ' and ' || nullif(s.lacking - 1, 0) || ' more') end,
     'Workers and commands of this role fail.', array[format('grant tidemark_worker to %I;', current_user)]),
    ('pg_monitor', not pg_has_role('pg_monitor', 'usage'), 'warn',
     current_user || ' sees ' || case when pg_has_role('pg_monitor', 'usage') then 'all' else 'only its own' end || ' sessions',
     'status and top cannot show what a partition waits for.', array[format('grant pg_monitor to %I;', current_user)])
) v("check", bad, level, found, why, repair)
union all
select 'privileges', g.role, v.*
from role g
left join difference l on l.role = g.role and l.is_lacking
left join difference m on m.role = g.role and not m.is_lacking
cross join lateral (values
    (g.oid is null, 'warn', 'the role does not exist', 'No login can be given just what its work needs.',
     array[format('create role %I nologin;', g.role), 'celery -A tasks migrate']),
    (g.oid is not null and l.n > 0, 'fail',
     format('it may not %s%s', l.first, ' and ' || nullif(l.n - 1, 0) || ' more'), 'What its members do fails.',
     case when l.n > 5 then array['celery -A tasks migrate'] else l.repair end),
    (m.n > 0, 'warn', format('it may %s%s', m.first, ' and ' || nullif(m.n - 1, 0) || ' more'),
     'Its members should do their work and nothing else.',
     case when m.n > 5 then array['celery -A tasks migrate'] else m.repair end),
    (false, 'ok', 'may do its work, and nothing else', '', '{}')
) v(bad, level, found, why, repair)
where v.bad or v.level = 'ok'
order by 2, 3;

-- name: doctor_vacuum
-- Dead rows by table, whether vacuum is at it, and how old the oldest transaction id is: $1 that many dead rows are too many.
with t as (
    select c.relname, s.n_live_tup as live, s.n_dead_tup as dead, v.phase,
           extract(epoch from clock_timestamp() - greatest(s.last_autovacuum, s.last_vacuum))::bigint as seconds
    from pg_class c
    join pg_stat_all_tables s on s.relid = c.oid
    left join pg_stat_progress_vacuum v on v.relid = c.oid
    where c.relnamespace = to_regnamespace('tidemark') and c.relkind = 'r'
)
select 'activity' as area, 'dead rows' as "check", 'dead rows in ' || t.relname as item, true as bad, 'warn' as level,
       concat(to_char(t.dead, 'FM999,999,999,999'), ' beside ', to_char(t.live, 'FM999,999,999,999'), ', vacuumed ',
              coalesce(t.seconds || ' s ago', 'never'), ', vacuum is at it (' || t.phase || ')') as found,
       'Vacuum does not keep up, or an old transaction holds it back.' as why,
       array[format('vacuum (analyze) tidemark.%I;', t.relname)] as repair
from t
where t.dead >= $1::bigint and t.dead >= t.live / 2
union all
select 'activity', 'dead rows', null, false, 'ok',
       concat('few', '; vacuum runs on ' || string_agg(format('%s (%s)', t.relname, t.phase), ', ')), '', '{}'
from t
where t.phase is not null
union all
-- Postgres forces a vacuum at 200 million and stops at two thousand million.
select 'activity', 'transaction ids', null, x.age >= 1000000000, case when x.age >= 1800000000 then 'fail' else 'warn' end,
       format('oldest is %s back', to_char(x.age, 'FM999,999,999,999')), 'At 2,000,000,000 Postgres takes no more writes.',
       array['vacuum (freeze);']
from (select age(d.datfrozenxid) from pg_database d where d.datname = current_database()) x;

-- name: doctor_clock
-- The server's clock, in seconds since the epoch.
select extract(epoch from clock_timestamp())::float8;

-- name: doctor_has_schema
-- Whether there is a table of Tidemark's: a database that was never migrated has none.
select exists (select from pg_class c where c.relnamespace = to_regnamespace('tidemark') and c.relkind = 'r');
