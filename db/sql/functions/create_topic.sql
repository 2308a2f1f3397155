-- Creates a topic with partitions 0 to partitions - 1 and returns its id, which is the caller's where he gives one. Limits of
-- retention are milliseconds and bytes by partition, null for none.
-- Errors: TM005 for a name, a number or a limit against the rules, and for a name that differs from another one in . and _ alone;
-- TM006 for a name or an id that is taken.
create or replace function tidemark.create_topic(
    name text, partitions int, id uuid default null, retention_ms bigint default null, retention_bytes bigint default null
) returns uuid
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    new_id uuid;
    same text;
begin
    if name is null or name !~ '^[A-Za-z0-9._-]{1,249}$' or name in ('.', '..') then
        raise exception using
            errcode = 'TM005',
            message = format('topic name %s is not legal', coalesce(quote_literal(left(name, 300)), 'NULL')),
            hint = 'Use 1 to 249 of the characters A-Z a-z 0-9 . _ - and neither "." nor "..".';
    end if;
    perform tidemark.check_topic(name, partitions, retention_ms, retention_bytes);
    insert into tidemark.topics (id, name, partitions, retention_ms, retention_bytes)
    values (coalesce(create_topic.id, gen_random_uuid()), create_topic.name, create_topic.partitions, create_topic.retention_ms,
            create_topic.retention_bytes)
    on conflict do nothing
    returning topics.id into new_id;
    if new_id is null then
        select t.name into same from tidemark.topics t where translate(t.name, '.', '_') = translate(create_topic.name, '.', '_');
        raise exception using
            errcode = case when same <> name then 'TM005' else 'TM006' end,
            message = case
                when same <> name then format('topic name %L differs from %L in . and _ alone', name, same)
                when same is null then format('a topic with the id %s exists already', id)
                else format('topic %L exists already', name)
            end,
            hint = 'Choose another name, or use the topic that is there.';
    end if;
    insert into tidemark.topic_partitions (topic_id, partition)
    select new_id, number from generate_series(0, create_topic.partitions - 1) number order by number;
    return new_id;
end
$$;

-- Raises TM005 for what no topic can have.
create or replace function tidemark.check_topic(name text, partitions int, retention_ms bigint, retention_bytes bigint)
returns void
language plpgsql immutable
set search_path = pg_catalog, pg_temp
as $$
begin
    if (partitions between 1 and 100000) is not true then
        raise exception using
            errcode = 'TM005',
            message = format('topic %s cannot have %s partitions', quote_literal(name), coalesce(partitions::text, 'NULL')),
            hint = 'Use 1 to 100000 partitions.';
    end if;
    if retention_ms < 0 or retention_bytes < 0 then
        raise exception using
            errcode = 'TM005',
            message = format('topic %L: retention of %s ms and %s bytes', name, coalesce(retention_ms::text, 'NULL'),
                             coalesce(retention_bytes::text, 'NULL')),
            hint = 'Use limits of at least 0, or NULL for none.';
    end if;
end
$$;

-- Locks a topic and returns it. Error: TM004 unknown topic. What changes topics begins here, so one follows the other.
create or replace function tidemark.lock_topic(topic text) returns tidemark.topics
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    found_topic tidemark.topics;
begin
    select * into found_topic from tidemark.topics t where t.name = topic for no key update;
    if not found then
        raise exception using
            errcode = 'TM004',
            message = format('topic %s does not exist', coalesce(quote_literal(left(topic, 300)), 'NULL')),
            hint = 'Create it with tidemark.create_topic(name, partitions), or list what there is in tidemark.topics.';
    end if;
    return found_topic;
end
$$;

-- Gives a topic more partitions, up to `partitions` in all; returns the ids of all of them, partition 0 first. The new ones are
-- empty, and keys go to other partitions from then on.
-- Errors: TM004 unknown topic, TM005 for a number that is not greater than the one it has.
create or replace function tidemark.add_partitions(topic text, partitions int) returns int[]
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    grown constant tidemark.topics := tidemark.lock_topic(topic);
begin
    perform tidemark.check_topic(topic, partitions, null, null);
    if partitions <= grown.partitions then
        raise exception using
            errcode = 'TM005',
            message = format('topic %s has %s partitions, not fewer than %s', quote_literal(topic), grown.partitions, partitions),
            hint = 'Pass the number that it shall have in all; partitions can be added and never taken away.';
    end if;
    update tidemark.topics t set partitions = add_partitions.partitions where t.id = grown.id;
    insert into tidemark.topic_partitions (topic_id, partition)
    select grown.id, number from generate_series(grown.partitions, add_partitions.partitions - 1) number order by number;
    return tidemark.partition_ids(topic);
end
$$;

-- Sets a topic's limits of retention, both: milliseconds and bytes by partition, null for none. Zero deletes all that has its
-- offset.
-- Errors: TM004 unknown topic, TM005 for a negative limit.
create or replace function tidemark.set_retention(topic text, retention_ms bigint, retention_bytes bigint) returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    changed constant tidemark.topics := tidemark.lock_topic(topic);
begin
    perform tidemark.check_topic(topic, 1, retention_ms, retention_bytes);
    update tidemark.topics t
    set retention_ms = set_retention.retention_ms, retention_bytes = set_retention.retention_bytes
    where t.id = changed.id;
end
$$;

-- Deletes a topic and returns its id. From the commit on its name is free, its partitions are unknown to commits and readers, and
-- tasks.purge deletes what they held. A commit that is under way is answered as usual, and purged with the rest.
-- Waits for those who place batches in its partitions. Error: TM004 unknown topic.
create or replace function tidemark.delete_topic(topic text) returns uuid
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    gone constant tidemark.topics := tidemark.lock_topic(topic);
begin
    -- In the order of their ids, as everybody locks them.
    perform from tidemark.topic_partitions p where p.topic_id = gone.id order by p.id for update;
    insert into tidemark.deleted_partitions (topic_id, partition_id)
    select p.topic_id, p.id from tidemark.topic_partitions p where p.topic_id = gone.id order by p.id;
    delete from tidemark.topic_partitions p where p.topic_id = gone.id;
    delete from tidemark.topics t where t.id = gone.id;
    return gone.id;
end
$$;

-- Topics by name, with the ids of their partitions, partition 0 first: those with these names or ids, or all; after a name, and
-- at_most of them (null: all). What does not exist is left out.
create or replace function tidemark.list_topics(
    names text[] default null, ids uuid[] default null, after text default '', at_most int default 1000
)
returns table (
    id uuid, name text, partition_ids int[], retention_ms bigint, retention_bytes bigint, created_at timestamptz
)
language sql stable security definer
set search_path = pg_catalog, pg_temp
as $$
    select t.id, t.name,
           array(select p.id from tidemark.topic_partitions p where p.topic_id = t.id order by p.partition), t.retention_ms,
           t.retention_bytes, t.created_at
    from tidemark.topics t
    where (names is null or t.name = any (names)) and (ids is null or t.id = any (ids)) and t.name > after
    order by t.name
    limit case when at_most < 0 then 0 else at_most end
$$;
