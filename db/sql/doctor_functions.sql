-- Functions of the schema: name, signature, and whether this role, everybody, and the producer role may execute it.
select p.proname::text,
       format('tidemark.%I(%s)', p.proname, pg_get_function_identity_arguments(p.oid)),
       has_function_privilege(p.oid, 'execute'),
       exists (select from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a where a.grantee = 0),
       coalesce(has_function_privilege(to_regrole('tidemark_producer'), p.oid, 'execute'), false)
from pg_proc p
where p.pronamespace = to_regnamespace('tidemark')
order by 2
