-- How far fan-out got: seconds since it last had something to do, seconds since the oldest commit it has not seen (null for
-- none), and whether the database is in the cluster its cursors speak of.
select greatest(extract(epoch from clock_timestamp() - s.seen_at), 0)::float8,
       case when u.committed_at is not null then
           greatest(extract(epoch from clock_timestamp() - u.committed_at), 0)::float8
       end,
       c.system_identifier = k.system_identifier
from tidemark.fan_out_state s
cross join tidemark.cluster c
cross join pg_control_system() k
cross join lateral (
    select least(
        (select o.committed_at
         from tidemark.objects o
         where o.xid >= pg_snapshot_xmax(s.seen)
         order by o.xid
         limit 1),
        (select min(o.committed_at)
         from tidemark.objects o
         where o.xid = any (array(select pg_snapshot_xip(s.seen))))
    ) as committed_at
) u
