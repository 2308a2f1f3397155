-- Gives an idempotent producer its id and epoch, as Kafka's InitProducerId. Without arguments a new one, with epoch 0. For one
-- that is known the next epoch, which fences the one before in every partition; after 32767 a new id.
-- Errors: TM013 for an id that was not given or has expired, TM014 for an epoch that is not the newest.
create or replace function tidemark.init_producer(
    known_id bigint default null, known_epoch int default null, out producer_id bigint, out producer_epoch int
)
language plpgsql security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if current_setting('synchronous_commit') in ('off', 'local') then
        perform set_config('synchronous_commit', 'on', true);
    end if;
    while producer_id is null loop
        producer_epoch := 0;
        if known_id is not null then
            select q.epoch + 1 into producer_epoch from tidemark.producers q where q.id = known_id order by q.epoch desc limit 1;
            if not found then
                raise exception using
                    errcode = 'TM013',
                    message = format('producer %s is not known: it was never given, or was silent for too long', known_id),
                    hint = 'Call tidemark.init_producer() for a new id.';
            end if;
            if known_epoch < producer_epoch - 1 or known_epoch > 32767 then
                raise exception using
                    errcode = 'TM014',
                    message = format('producer %s with epoch %s is fenced: its epoch is %s', known_id, known_epoch,
                                     producer_epoch - 1),
                    hint = 'Another program goes on with this producer; start over with tidemark.init_producer().';
            end if;
            -- A client may have gone on to the next epoch by itself.
            producer_epoch := greatest(producer_epoch, known_epoch + 1);
        end if;
        if known_id is null or producer_epoch > 32767 then
            producer_epoch := 0;
            insert into tidemark.producers (epoch) values (0) returning id into producer_id;
        else
            -- Of two at once the second takes nothing, and looks again.
            insert into tidemark.producers (id, epoch) overriding system value values (known_id, producer_epoch)
            on conflict do nothing
            returning id into producer_id;
            -- The next one may be there already, and have deleted this one's row.
            if exists (select from tidemark.producers q where q.id = producer_id and q.epoch > init_producer.producer_epoch) then
                producer_id := null;
            end if;
            delete from tidemark.producers q
            where q.id = known_id
              and q.epoch < (select max(n.epoch) from tidemark.producers n where n.id = known_id);
        end if;
    end loop;
end
$$;

-- The producers that a partition knows, the highest id first: the epoch and sequence of the last batch of each, as Kafka's
-- DescribeProducers. Ids before before_id, at_most of them; null: all. One descent for each, to its newest row: the rows that
-- are deleted behind it are in nobody's way.
create or replace function tidemark.producer_states(partition_id int, before_id bigint default null, at_most int default 1000)
returns table (producer_id bigint, producer_epoch int, last_sequence int, batches bigint, last_commit timestamptz)
language sql stable
begin atomic
    with recursive known as (
        (select b.*, 1 as n
         from tidemark.producer_batches b
         where b.partition_id = producer_states.partition_id
           -- A comparison with null, where no id is lower, finds nothing.
           and b.producer_id <= case when before_id is null then 9223372036854775807
                                     when before_id > -9223372036854775808 then before_id - 1 end
           and coalesce(at_most >= 1, true)
         order by b.producer_id desc, b.ordinal desc
         limit 1)
        union all
        select f.*, k.n + 1
        from known k
        cross join lateral (
            select b.*
            from tidemark.producer_batches b
            where b.partition_id = producer_states.partition_id and b.producer_id < k.producer_id
            order by b.producer_id desc, b.ordinal desc
            limit 1
        ) f
        where coalesce(k.n < at_most, true)
    )
    select k.producer_id, k.producer_epoch::int, k.last_sequence, k.ordinal,
           (select o.committed_at from tidemark.objects o where o.id = k.id >> 16)
    from known k;
end;
