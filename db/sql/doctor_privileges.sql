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
order by c.relname
