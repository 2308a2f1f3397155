-- Server settings as this session has them, and where they come from: $1 names.
select s.name, s.setting, s.unit, s.source, s.context, s.pending_restart
from pg_settings s
where s.name = any ($1::text[])
