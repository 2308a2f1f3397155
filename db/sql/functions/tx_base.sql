-- What to add to a transaction's id to get its place in the order of commits (tx). In another cluster than the log's, where ids
-- mean nothing, error TM008. So it is for a snapshot from before a rebase: rebase replaces the row, and the snapshot sees none.
create or replace function tidemark.tx_base() returns bigint
language plpgsql stable parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    own record;
    here bigint;
begin
    select c.system_identifier, c.tx_base into own from tidemark.cluster c;
    select s.system_identifier into here from pg_catalog.pg_control_system() s;
    if own.system_identifier is distinct from here then
        raise exception using
            errcode = 'TM008',
            message = format('database %I belongs to cluster %s but runs in cluster %s: it was restored or moved, '
                             'and its log holds transaction ids of the old cluster',
                             current_database(), coalesce(own.system_identifier::text, 'unknown'), here),
            hint = 'Stop all brokers and workers, then run: celery -A tasks rebase';
    end if;
    return own.tx_base;
end
$$;
