-- Five group roles, for logins to be members of: grant tidemark_producer to my_broker;

-- What each of them may do. Here alone it stands: below it is granted, and `celery -A tasks doctor` compares it with what is.
-- Letters are those of Postgres: r select, a insert, w update, d delete, D truncate, X execute. Postgres asks for `update` of
-- whoever locks a row, so k, to lock rows without changing them, is update of the id alone: it is always generated, and takes
-- no number.
--
-- What is read and written for a producer or a consumer, functions do with the owner's rights. What such functions call is
-- nobody's.
create or replace function tidemark.group_rights() returns table (role text, object text, "right" text)
language sql stable
set search_path = pg_catalog, pg_temp
as $$
    select g.role, m.cells[1],
           case l.letter when 'r' then 'select' when 'a' then 'insert' when 'w' then 'update' when 'k' then 'update (id)'
                         when 'd' then 'delete' when 'D' then 'truncate' when 'X' then 'execute' end
    from regexp_matches($rights$
        --                           producer  consumer  worker  monitor  admin
        commit_object                X         -         -       -        X
        commit_batches               X         -         -       -        X
        init_producer                X         -         -       -        X
        condemn                      X         -         X       -        X
        receipts                     X         X         -       X        X
        partition_ids                X         X         X       X        X
        list_topics                  X         X         X       X        X
        fetch_batches                -         X         -       X        X
        fetch_partitions             -         X         -       X        X
        list_offsets                 -         X         -       X        X
        producer_states              -         -         -       X        X
        create_topic                 -         -         -       -        X
        add_partitions               -         -         -       -        X
        set_retention                -         -         -       -        X
        delete_topic                 -         -         -       -        X
        delete_records               -         -         -       -        X
        begin_at                     -         -         -       -        X
        check_topic                  -         -         -       -        X
        lock_topic                   -         -         -       -        X
        lock_partition               -         -         -       -        X
        tx_base                      -         -         X       X        X
        running_transactions         -         -         X       X        X
        newest_run                   -         -         X       X        X
        log_start                    -         -         X       X        X
        run_at                       -         -         X       X        X
        run_events                   -         -         X       X        X
        cursors                      -         -         X       X        X
        pending_events               -         -         X       X        X
        pending                      -         -         X       X        X
        runs_to_delete               -         -         X       X        X
        group_rights                 -         -         X       X        X
        check_request                -         -         -       -        -
        claim_sequences              -         -         -       -        -
        explain_invalid_commit       -         -         -       -        -
        find_run                     -         -         -       -        -
        judge_batches                -         -         -       -        -
        raise_sequence_race          -         -         -       -        -
        run_of                       -         -         -       -        -
        topics                       -         -         r       r        rawd
        topic_partitions             -         -         rk      r        radk
        objects                      -         -         rdk     r        radk
        record_batch_events          -         -         rd      r        rad
        refused_batches              -         -         rd      r        rd
        producer_batches             -         -         rd      r        rd
        producers                    -         -         rd      r        rd
        runs                         -         -         rad     r        rad
        passes                       -         -         rad     r        rad
        log_starts                   -         -         rad     r        rad
        deleted_partitions           -         -         rwd     r        rawd
        deleted_batches              -         -         rad     r        rad
        dead_objects                 -         -         ra      r        ra
        fan_outs                     -         -         rad     r        rad
        sweeps                       -         -         rad     r        rad
        collections                  -         -         radk    r        radk
        reconciliations              -         -         rad     r        rad
        audit_progress               -         -         rawd    r        rawd
        adopted_partitions           -         -         -       r        rawd
        cluster                      -         -         r       r        raD
        alembic_version              -         -         r       r        r
        named_partitions             -         -         r       r        r
        record_batches               -         -         -       r        r
        named_record_batch_events    -         -         -       r        r
        objects_id_seq               -         -         -       -        rw
        topic_partitions_id_seq      -         -         -       -        rw
        producers_id_seq             -         -         -       -        rw
        fan_outs_id_seq              -         -         -       -        rw
        sweeps_id_seq                -         -         -       -        rw
        collections_id_seq           -         -         -       -        rw
        $rights$, '^ +(\w+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$', 'gn') m(cells)
    cross join unnest(array['tidemark_producer', 'tidemark_consumer', 'tidemark_worker', 'tidemark_monitor', 'tidemark_admin'])
        with ordinality g(role, n)
    cross join regexp_split_to_table(m.cells[g.n + 1], '') l(letter)
    where l.letter <> '-'
$$;

do $$
declare
    names text[] := array(select distinct r.role from tidemark.group_rights() r order by r.role);
    name text;
    statement text;
    needed text[] := '{}';
begin
    foreach name in array names loop
        begin
            if to_regrole(name) is null then
                execute format('create role %I nologin', name);
            end if;
        exception
            -- Another database of this cluster is being migrated at this moment.
            when duplicate_object or unique_violation then null;
            when insufficient_privilege then
                needed := needed || format('create role %I nologin;', name);
        end;
    end loop;
    begin
        if to_regrole('tidemark_monitor') is null or not pg_has_role('tidemark_monitor', 'pg_monitor', 'usage') then
            grant pg_monitor to tidemark_monitor;
        end if;
    exception
        when unique_violation then null;
        when insufficient_privilege or undefined_object then
            needed := needed || 'grant pg_monitor to tidemark_monitor;'::text;
    end;
    if needed <> '{}' then
        -- Managed servers may not let us. `celery -A tasks migrate` prints it.
        raise warning using
            message = format('%s may not create or grant all of Tidemark''s roles', current_user),
            hint = array_to_string(needed, E'\n');
    end if;

    -- What a file granted before this one, or somebody's hand.
    names := array(select n from unnest(names) n where to_regrole(n) is not null);
    execute 'revoke execute on all functions in schema tidemark from public';
    foreach name in array names loop
        execute format('revoke all on all tables in schema tidemark from %1$I; revoke all on all sequences in schema tidemark '
                       'from %1$I; revoke all on all functions in schema tidemark from %1$I; '
                       'grant usage on schema tidemark to %1$I', name);
    end loop;
    for statement in
        select format('grant %s on %s %s to %I', r."right", case r."right" when 'execute' then 'function' else 'table' end,
                      string_agg(o.name, ', ' order by o.name), r.role)
        from tidemark.group_rights() r
        cross join lateral (
            select p.oid::regprocedure::text as name
            from pg_proc p
            where r."right" = 'execute' and p.pronamespace = 'tidemark'::regnamespace and p.proname = r.object
            union all
            select format('tidemark.%I', r.object) where r."right" <> 'execute'
        ) o
        where r.role = any (names)
        group by r.role, r."right"
    loop
        execute statement;
    end loop;
end
$$;
