-- How far fan-out got: seconds since it last had something to do, seconds since the oldest commit it has not seen (null for
-- none), and whether the database is in the cluster its log speaks of.
select greatest(extract(epoch from clock_timestamp() - f.seen_at), 0)::float8,
       case when u.committed_at is not null then
           greatest(extract(epoch from clock_timestamp() - u.committed_at), 0)::float8
       end,
       coalesce((select c.system_identifier from tidemark.cluster c) = k.system_identifier, false)
from (select n.* from tidemark.fan_outs n order by n.id desc limit 1) f
cross join pg_control_system() k
cross join lateral (
    select least(
        (select o.committed_at
         from tidemark.objects o
         where o.tx > f.seen_tx
         order by o.tx
         limit 1),
        (select min(o.committed_at)
         from tidemark.objects o
         where o.tx = any (f.in_flight))
    ) as committed_at
) u
