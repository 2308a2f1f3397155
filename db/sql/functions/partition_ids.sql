-- The ids of a topic's partitions; the first element is partition 0. Brokers cache them: they never change.
-- Error: TM004 for a topic that does not exist.
create or replace function tidemark.partition_ids(topic text) returns int[]
language plpgsql stable security definer parallel safe
set search_path = pg_catalog, pg_temp
as $$
declare
    ids int[];
begin
    select array_agg(p.id order by p.partition) into ids
    from tidemark.topics t
    join tidemark.topic_partitions p on p.topic_id = t.id
    where t.name = topic;
    if ids is null then
        raise exception using
            errcode = 'TM004',
            message = format('topic %s does not exist', coalesce(quote_literal(left(topic, 300)), 'NULL')),
            hint = 'Create it with tidemark.create_topic(name, partitions), or list what there is in tidemark.topics.';
    end if;
    return ids;
end
$$;
