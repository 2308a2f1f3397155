-- True in the cluster whose transaction ids the cursors speak of; in any other one, error TM008.
create or replace function tidemark.require_own_cluster() returns boolean
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    own bigint;
    here bigint;
begin
    select c.system_identifier into own from tidemark.cluster c;
    select s.system_identifier into here from pg_catalog.pg_control_system() s;
    if own is distinct from here then
        raise exception using
            errcode = 'TM008',
            message = format('database %I belongs to cluster %s but runs in cluster %s: it was restored or moved, '
                             'and its cursors hold transaction ids of the old cluster',
                             current_database(), own, here),
            hint = 'Stop all brokers and workers, then run: celery -A tasks rebase';
    end if;
    return true;
end
$$;
