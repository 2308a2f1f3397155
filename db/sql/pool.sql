-- name: session_settings
-- Sets what every session of ours has: $1 names and $2 values of settings.
select set_config(s.name, s.value, false)
from unnest($1::text[], $2::text[]) s(name, value);
