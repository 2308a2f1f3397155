-- The sequences of idempotent producers. Their state in a partition is what was appended last: a row of producer_batches for
-- each batch, numbered by `ordinal`. A commit appends the next ordinals. So of two commits that go on from the same batch at
-- one moment the second waits for the first on the primary key, takes nothing, and looks again.
--
-- Rows are never updated. Each 64th batch deletes the rows before the last five, so what is read is at the end of the key
-- and dead rows are not, however long a snapshot is held.

-- The usual case, in one statement: every batch goes on where the one before it ended, in this object or in the log. False, and
-- nothing claimed, where one does not. `first_id` is the id of the event of the first batch.
create or replace function tidemark.claim_sequences(
    own_tx bigint, first_id bigint, partition_ids int[], n_records int[], producer_ids bigint[], producer_epochs int[],
    base_sequences int[]
) returns boolean
language plpgsql
set search_path = pg_catalog, pg_temp
-- A session keeps its plans: one made for an empty table must not read a full one.
set enable_seqscan = off
set enable_bitmapscan = off
-- Without it each call plans for its own arrays.
set plan_cache_mode = force_generic_plan
as $$
declare
    done record;
begin
    loop
        begin
            with batch as (
                select b.*, ((b.base_sequence::bigint + b.n_records - 1) & 2147483647)::int as last_sequence,
                       lag(b.producer_epoch) over upto as previous_epoch,
                       ((lag(b.base_sequence) over upto)::bigint + lag(b.n_records) over upto) & 2147483647 as next_sequence,
                       row_number() over upto as number
                from unnest(partition_ids, n_records, producer_ids, producer_epochs, base_sequences) with ordinality
                    as b(partition_id, n_records, producer_id, producer_epoch, base_sequence, n)
                where b.producer_id <> -1
                window upto as (partition by b.partition_id, b.producer_id order by b.n rows unbounded preceding)
            ),
            judged as materialized (
                select b.*, coalesce(s.ordinal, 0) + b.number as ordinal, s.tx,
                       (b.producer_id >= 0 and b.base_sequence >= 0 and b.producer_epoch between 0 and 32767
                        and case when b.producer_epoch = coalesce(b.previous_epoch, s.producer_epoch) then
                                b.base_sequence = coalesce(b.next_sequence, (s.last_sequence::bigint + 1) & 2147483647)
                            else
                                b.base_sequence = 0 and b.producer_epoch > coalesce(b.previous_epoch, s.producer_epoch, -1)
                            end) is true as goes_on
                from batch b
                left join lateral (
                    select c.ordinal, c.tx, c.producer_epoch, c.last_sequence
                    from tidemark.producer_batches c
                    where c.partition_id = b.partition_id and c.producer_id = b.producer_id
                    order by c.ordinal desc
                    limit 1
                ) s on true
            ),
            verdict as materialized (
                select bool_and(j.goes_on) is not false
                       and not exists (
                           select
                           from (
                               select u.id, min(u.epoch) as epoch
                               from unnest(producer_ids, producer_epochs) u(id, epoch)
                               group by u.id
                           ) o
                           cross join lateral (
                               select q.epoch from tidemark.producers q where q.id = o.id order by q.epoch desc limit 1
                           ) f
                           where o.epoch < f.epoch
                       ) as is_clean,
                       max(j.tx) > own_tx as is_late,
                       array_agg(j.partition_id) filter (where j.ordinal % 64 = 0) as full_partitions,
                       array_agg(j.producer_id) filter (where j.ordinal % 64 = 0) as full_producers,
                       array_agg(j.ordinal) filter (where j.ordinal % 64 = 0) as full_ordinals
                from judged j
            ),
            claimed as (
                insert into tidemark.producer_batches
                    (producer_id, ordinal, tx, id, partition_id, base_sequence, last_sequence, producer_epoch)
                select j.producer_id, j.ordinal, own_tx, first_id + j.n - 1, j.partition_id, j.base_sequence, j.last_sequence,
                       j.producer_epoch
                -- In their order, by partition and producer, as everywhere: or two commits could wait for each other.
                from judged j
                where (select v.is_clean from verdict v)
            )
            select v.* into done from verdict v;
            if not done.is_clean then
                return false;
            end if;
            if done.is_late then
                perform tidemark.raise_sequence_race();
            end if;
            if done.full_ordinals is not null then
                delete from tidemark.producer_batches d
                using unnest(done.full_partitions, done.full_producers, done.full_ordinals) f(partition_id, producer_id, ordinal)
                where d.partition_id = f.partition_id and d.producer_id = f.producer_id
                  and d.ordinal between f.ordinal - 68 and f.ordinal - 5;
            end if;
            return true;
        exception
            -- Another session has taken one of the ordinals, and has committed: now its batches are seen. (To insert "on conflict
            -- do nothing" costs each batch half as much again.) From an older snapshot they never are.
            when unique_violation then
                if current_setting('transaction_isolation') <> 'read committed' then
                    perform tidemark.raise_sequence_race();
                end if;
        end;
    end loop;
end
$$;

create or replace function tidemark.raise_sequence_race() returns void
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Offsets go by transaction ids, and the other session's is above ours: what follows its batches would stand before them.
    raise exception using
        errcode = '40001',
        message = 'another session has committed batches of the same producer to the same partition meanwhile',
        hint = 'Repeat the call in a new transaction.';
end
$$;

-- Every other case: batch by batch, what is to become of each. Claims the sequences of those that are accepted. In arrays, in the
-- order of the request; of duplicates with the event of the first one.
create or replace function tidemark.judge_batches(
    own_tx bigint, first_id bigint, partition_ids int[], n_records int[], byte_offsets bigint[], byte_lengths int[],
    max_timestamps bigint[], producer_ids bigint[], producer_epochs int[], base_sequences int[],
    out verdicts text[], out first_txs bigint[], out first_ids bigint[]
)
language plpgsql
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
-- Without it each call plans for its own arrays.
set plan_cache_mode = force_generic_plan
as $$
declare
    b record;
    partition_at int;
    producer_at bigint;
    -- The last batches of the producer at hand, the newest first.
    newest tidemark.producer_batches[];
    head tidemark.producer_batches;
    same tidemark.producer_batches;
begin
    loop
        begin
            verdicts := array_fill(null::text, array[cardinality(partition_ids)]);
            first_txs := array_fill(null::bigint, array[cardinality(partition_ids)]);
            first_ids := first_txs;
            partition_at := null;
            -- In the order in which sequences are claimed everywhere, or two commits could wait for each other.
            for b in
                select i.*, ((i.base_sequence::bigint + i.n_records - 1) & 2147483647)::int as last_sequence,
                       coalesce(f.epoch, 0) as newest_epoch,
                       exists (select from tidemark.topic_partitions p where p.id = i.partition_id) as is_known,
                       (i.n_records >= 1 and i.byte_offset >= 0 and i.byte_length >= 0 and i.max_timestamp <= 253402300799999
                        and i.partition_id is not null
                        and (i.producer_id is null
                             or i.producer_id >= 0 and i.producer_epoch between 0 and 32767 and i.base_sequence >= 0)) is true
                           as is_sound
                from (
                    select u.partition_id, u.n_records, u.byte_offset, u.byte_length, u.max_timestamp,
                           nullif(u.producer_id, -1) as producer_id, u.producer_epoch, u.base_sequence, u.n::int as n
                    from unnest(partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps, producer_ids,
                                producer_epochs, base_sequences) with ordinality
                        as u(partition_id, n_records, byte_offset, byte_length, max_timestamp, producer_id, producer_epoch,
                             base_sequence, n)
                ) i
                left join lateral (
                    select q.epoch from tidemark.producers q where q.id = i.producer_id order by q.epoch desc limit 1
                ) f on true
                order by i.partition_id, i.producer_id, i.n
            loop
                if not b.is_sound or not b.is_known or b.producer_id is null then
                    verdicts[b.n] := case when not b.is_sound then 'malformed' when not b.is_known then 'unknown_partition'
                                          else 'accepted' end;
                    continue;
                end if;
                if (partition_at, producer_at) is distinct from (b.partition_id, b.producer_id) then
                    partition_at := b.partition_id;
                    producer_at := b.producer_id;
                    newest := array(
                        select c
                        from tidemark.producer_batches c
                        where c.partition_id = b.partition_id and c.producer_id = b.producer_id
                        order by c.ordinal desc
                        limit 5
                    );
                end if;
                head := newest[1];
                select * into same
                from unnest(newest) c
                where c.producer_epoch = b.producer_epoch and c.producer_epoch = head.producer_epoch
                  and c.base_sequence = b.base_sequence and c.last_sequence = b.last_sequence;
                verdicts[b.n] := case
                    when b.producer_epoch < greatest(head.producer_epoch, b.newest_epoch) then 'fenced_epoch'
                    -- Before duplicates, as in the usual case above: five batches may go once round all sequences.
                    when b.base_sequence = case when b.producer_epoch = head.producer_epoch
                        then (head.last_sequence::bigint + 1) & 2147483647 else 0 end then 'accepted'
                    when same.tx is not null then 'duplicate'
                    else 'out_of_order_sequence'
                end;
                first_txs[b.n] := same.tx;
                first_ids[b.n] := same.id;
                continue when verdicts[b.n] <> 'accepted';
                if head.tx > own_tx then
                    perform tidemark.raise_sequence_race();
                end if;
                head := row(b.producer_id, coalesce(head.ordinal, 0) + 1, own_tx, first_id + b.n - 1, b.partition_id,
                            b.base_sequence, b.last_sequence, b.producer_epoch);
                insert into tidemark.producer_batches select head.*;
                newest := head || newest[1:4];
                if head.ordinal % 64 = 0 then
                    delete from tidemark.producer_batches d
                    where d.partition_id = b.partition_id and d.producer_id = b.producer_id
                      and d.ordinal between head.ordinal - 68 and head.ordinal - 5;
                end if;
            end loop;
            return;
        exception
            when unique_violation then
                if current_setting('transaction_isolation') <> 'read committed' then
                    perform tidemark.raise_sequence_race();
                end if;
        end;
    end loop;
end
$$;
