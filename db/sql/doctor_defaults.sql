-- Settings that a role or a database brings along, for this database: $1 names of settings.
select r.rolname::text, d.datname::text, split_part(c.setting, '=', 1), substr(c.setting, strpos(c.setting, '=') + 1)
from pg_db_role_setting s
left join pg_roles r on r.oid = s.setrole
left join pg_database d on d.oid = s.setdatabase
cross join unnest(s.setconfig) c(setting)
where (s.setdatabase = 0 or d.datname = current_database()) and split_part(c.setting, '=', 1) = any ($1::text[])
order by 1 nulls first, 2 nulls first, 3
