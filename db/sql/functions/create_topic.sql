-- Creates a topic with partitions 0 to partitions - 1 and returns the topic's id.
-- Errors: TM005 for a name or a number against the rules, TM006 for a name that is taken.
create or replace function tidemark.create_topic(name text, partitions int) returns uuid
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    new_id uuid;
begin
    if name is null or name !~ '^[A-Za-z0-9._-]{1,249}$' or name in ('.', '..') then
        raise exception using
            errcode = 'TM005',
            message = format('topic name %s is not legal', coalesce(quote_literal(left(name, 300)), 'NULL')),
            hint = 'Use 1 to 249 of the characters A-Z a-z 0-9 . _ - and neither "." nor "..".';
    end if;
    if partitions is null or partitions not between 1 and 100000 then
        raise exception using
            errcode = 'TM005',
            message = format('topic %s cannot have %s partitions', quote_literal(name), coalesce(partitions::text, 'NULL')),
            hint = 'Use 1 to 100000 partitions.';
    end if;
    insert into tidemark.topics (name, partitions)
    values (create_topic.name, create_topic.partitions)
    on conflict on constraint topics_name_key do nothing
    returning id into new_id;
    if new_id is null then
        raise exception using
            errcode = 'TM006',
            message = format('topic %s exists already', quote_literal(name)),
            hint = 'Choose another name, or use the topic that is there.';
    end if;
    insert into tidemark.topic_partitions (topic_id, partition)
    select new_id, number from generate_series(0, create_topic.partitions - 1) number order by number;
    return new_id;
end
$$;
