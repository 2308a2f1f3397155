-- A producer role may commit, ask what became of it, and look up topics, and nothing else. Grant it to the brokers' login roles:
-- grant tidemark_producer to my_broker;
do $$
begin
    begin
        if to_regrole('tidemark_producer') is null then
            create role tidemark_producer nologin;
        end if;
    exception
        -- Another database of this cluster is being migrated at this moment.
        when duplicate_object or unique_violation then null;
        -- Managed servers may not let us; `celery -A tasks doctor` says so.
        when insufficient_privilege then
            raise warning 'role tidemark_producer does not exist and % may not create it', current_user;
    end;
    revoke execute on all functions in schema tidemark from public;
    if to_regrole('tidemark_producer') is not null then
        grant usage on schema tidemark to tidemark_producer;
        grant execute on function
            tidemark.partition_ids(text),
            tidemark.list_topics(text[], uuid[], text, int),
            tidemark.commit_object(text, int[], int[], bigint[], int[], bigint[]),
            tidemark.commit_batches(text, int[], int[], bigint[], int[], bigint[], bigint[], int[], int[]),
            tidemark.condemn(text[]),
            tidemark.init_producer(bigint, int),
            tidemark.receipts(bigint[], int[])
        to tidemark_producer;
    end if;
end
$$;
