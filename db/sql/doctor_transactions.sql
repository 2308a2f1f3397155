-- What holds back vacuum, and with it the cost of every queue: sessions ('session'), prepared transactions ('prepared') and
-- replication slots without a reader ('slot') older than $1 seconds, oldest first. A slot has no age.
select 'session', a.pid::text, a.usename::text, a.datname::text, a.state,
       extract(epoch from clock_timestamp() - a.xact_start)::float8 as age
from pg_stat_activity a
where a.backend_type = 'client backend' and a.pid <> pg_backend_pid()
  and a.xact_start < clock_timestamp() - make_interval(secs => $1::float8)
union all
select 'prepared', x.gid, x.owner::text, x.database::text, 'prepared',
       extract(epoch from clock_timestamp() - x.prepared)::float8
from pg_prepared_xacts x
where x.prepared < clock_timestamp() - make_interval(secs => $1::float8)
union all
select 'slot', s.slot_name::text, null, s.database::text, 'inactive', null
from pg_replication_slots s
where not s.active
order by age desc nulls last
