-- Condemns uploads that nobody has committed: what lies under these keys will be deleted from the store, and a commit of one is
-- refused from now on (TM012). Returns the keys that are condemned now, those condemned before among them. A key that is left
-- out is committed.
--
-- It meets a commit of the same key on objects_key_key: the first one wins, and the second waits until it is known. The row stays
-- for the grace time at least, and is forgotten after the upload is deleted (db/objects.py).
--
-- Errors: TM001 for no array, for more than 10,000 keys and for one that no object can have; TM008 restored into another cluster.
-- Each leaves nothing behind. Security definer: a producer role needs no right to any table.
create or replace function tidemark.condemn(keys text[]) returns setof text
language plpgsql security definer
set search_path = pg_catalog, pg_temp
-- A plan that was made for an empty table would read all of a full one for its keys.
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    tx bigint;
    wrong text;
    condemned text[];
    fresh bigint;
begin
    if keys is null or cardinality(keys) > 10000 then
        raise exception using
            errcode = 'TM001',
            message = case when keys is null then 'keys to condemn are NULL'
                           else format('%s keys to condemn at once', cardinality(keys)) end,
            hint = 'Pass an array of at most 10000 object keys.';
    end if;
    select coalesce(quote_literal(left(k.key, 100)), 'NULL') into wrong
    from unnest(keys) k(key)
    where (octet_length(k.key) between 1 and 1024) is not true
    limit 1;
    if found then
        raise exception using
            errcode = 'TM001',
            message = format('no object can have the key %s', wrong),
            hint = 'A key has 1 to 1024 bytes.';
    end if;
    -- Who was told that a key is condemned may upload under the next one: it must be so after a crash as well.
    if current_setting('synchronous_commit') in ('off', 'local') then
        perform set_config('synchronous_commit', 'on', true);
    end if;

    tx := tidemark.tx_base() + pg_current_xact_id()::text::bigint;
    -- In the order of the keys, so that no two calls wait for each other.
    with condemned_now as (
        insert into tidemark.objects (tx, key, content_hash, batches, partition_ids, batch_counts)
        select tx, k.key, '', 0, '{}', '{}'
        from (select distinct u.key collate "C" as key from unnest(keys) u(key)) k
        order by k.key
        on conflict on constraint objects_key_key do nothing
        returning id
    ),
    dead as (
        insert into tidemark.dead_objects (object_id) select c.id from condemned_now c
    )
    select count(*) into fresh from condemned_now;

    -- A look of its own: it sees those who were waited for.
    select coalesce(array_agg(o.key order by o.key), '{}') into condemned
    from tidemark.objects o
    where o.key = any (keys) and o.content_hash = '';
    if cardinality(condemned) > fresh then
        -- As where a commit is repeated: this waits until what others have condemned is durable.
        perform pg_logical_emit_message(true, 'tidemark', '');
    end if;
    return query select unnest(condemned);
end
$$;
