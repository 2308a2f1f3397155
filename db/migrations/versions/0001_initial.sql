-- The first schema. Columns stand in the order of their width, widest first, so that no row carries padding. Constraint names are
-- part of the interface: `db.translate` turns them into domain errors. Each constraint stands on a line of its own, and so does
-- each index: the doctor reads here what there should be, and what makes it again.

create table tidemark.topics (
    id uuid default gen_random_uuid(),
    created_at timestamp with time zone default clock_timestamp() not null,
    retention_ms bigint,
    retention_bytes bigint,
    partitions integer not null,
    -- Collation C: names are compared byte by byte, as Kafka does, whatever the database's locale.
    name text collate "C" not null,
    constraint topics_pkey primary key (id),
    -- A name means one topic; resolves names to partitions.
    constraint topics_name_key unique (name),
    -- Kafka's rule for legal topic names.
    constraint topics_name_legal check (name ~ '^[A-Za-z0-9._-]{1,249}$' and name not in ('.', '..')),
    -- Bounds create_topic's work.
    constraint topics_partitions_in_range check (partitions between 1 and 100000),
    -- No limit is null. A limit of zero deletes what has its offset.
    constraint topics_retention_ms_not_negative check (retention_ms >= 0),
    constraint topics_retention_bytes_not_negative check (retention_bytes >= 0)
);

-- Kafka's rule: names that differ in nothing but . and _ would be one name in its metrics.
create unique index topics_name_collision on tidemark.topics (translate(name, '.', '_'));

-- Identity and nothing else: written when a topic is created, and deleted with it. Commits validate against these rows and materializing locks them, so
-- what changes (end, start, cursor) is appended to tables of its own: a row that is updated while a snapshot is held grows a
-- version that every reader passes.
create table tidemark.topic_partitions (
    topic_id uuid not null,
    -- Given at creation, never reused: a broker's cached id can become unknown, never another partition's. The order of these ids
    -- is the lock order of everything that locks partitions.
    id integer generated always as identity,
    partition integer not null,
    constraint topic_partitions_pkey primary key (id),
    constraint topic_partitions_topic_id_fkey foreign key (topic_id) references tidemark.topics (id),
    -- A topic has each partition number once; resolves (topic, partition).
    constraint topic_partitions_topic_id_partition_key unique (topic_id, partition),
    constraint topic_partitions_partition_not_negative check (partition >= 0)
);

create table tidemark.objects (
    id bigint generated always as identity,
    -- The order of commits, see `cluster`.
    tx bigint not null,
    committed_at timestamp with time zone default clock_timestamp() not null,
    batches integer not null,
    key text collate "C" not null,
    -- Empty: nothing was committed under the key, and nothing ever is; it is condemned.
    content_hash bytea not null,
    -- The partitions the commit touched, each once, and how many batches it brought to each: fan-out sizes its tasks from them
    -- without reading events.
    partition_ids integer[] not null,
    batch_counts integer[] not null,
    constraint objects_pkey primary key (id),
    -- Invariant 6: one key is one commit, also when two replays run at the same moment.
    constraint objects_key_key unique (key),
    constraint objects_key_length check (octet_length(key) between 1 and 1024),
    constraint objects_counts_match_partitions check (cardinality(partition_ids) = cardinality(batch_counts))
);

-- Fan-out reads the commits since its last snapshot, and only those (invariant 7).
create index objects_tx_idx on tidemark.objects (tx);

-- The log. Rows are inserted by commits and deleted by retention, never updated or moved.
create table tidemark.record_batch_events (
    tx bigint not null,
    -- The object's id times 65,536, plus the batch's place in the request, from 0. So it orders the events of one transaction, and
    -- tells object and place without columns for them. Order between transactions is tx's.
    id bigint not null,
    byte_offset bigint not null,
    max_timestamp bigint not null,
    partition_id integer not null,
    n_records integer not null,
    byte_length integer not null,
    -- The order of offsets, and the only index: each further one costs the hot path 15 to 30 per cent. No foreign keys either: one
    -- to topic_partitions would lock the partition's row in every commit.
    constraint record_batch_events_pkey primary key (partition_id, tx, id),
    -- A batch without records would have no offset (invariant 1).
    constraint record_batch_events_n_records_positive check (n_records >= 1),
    constraint record_batch_events_range_not_negative check (byte_offset >= 0 and byte_length >= 0)
);

-- The batches of a request that were not accepted, and why: a commit that is repeated gets the same answer.
create table tidemark.refused_batches (
    object_id bigint not null,
    -- Of a duplicate: the event of the first one.
    first_tx bigint,
    first_id bigint,
    position integer not null,
    partition_id integer,
    verdict text collate "C" not null,
    constraint refused_batches_pkey primary key (object_id, position)
);

-- The batches of idempotent producers, by their sequences: the last five of each producer in a partition, and up to 64 more before
-- they are deleted together. It outlives the batches themselves. See db/sql/functions/claim_sequences.sql.
create table tidemark.producer_batches (
    producer_id bigint not null,
    -- Counts the producer's batches in the partition. Two sessions that go on from the same one meet at the same number.
    ordinal bigint not null,
    -- The event.
    tx bigint not null,
    id bigint not null,
    partition_id integer not null,
    base_sequence integer not null,
    last_sequence integer not null,
    producer_epoch smallint not null,
    constraint producer_batches_pkey primary key (partition_id, producer_id, ordinal)
);

-- The ids given to producers, and the epochs: the row with the highest epoch is the one that may write.
create table tidemark.producers (
    id bigint generated always as identity,
    created_at timestamp with time zone default clock_timestamp() not null,
    epoch smallint not null,
    constraint producers_pkey primary key (id, epoch)
);

-- What materializing writes, and all it writes: neighbouring events that were given neighbouring offsets. The newest run of a
-- partition is its end offset and its cursor. How to read one: db/sql/functions/cursors.sql.
create table tidemark.runs (
    start_offset bigint not null,
    end_offset bigint not null,
    -- Bytes in object storage of all batches up to here, since the partition exists: a size is a difference of two.
    end_bytes bigint not null,
    -- The greatest of all batches up to here, so it never falls along the offsets: a time is found by search.
    max_timestamp bigint not null,
    -- The run's events are those from (first_tx, first_id) to (last_tx, last_id), both included. No id: all of the transaction's,
    -- from its first or to its last.
    first_tx bigint not null,
    last_tx bigint not null,
    first_id bigint,
    last_id bigint,
    -- Of a run of one late transaction: the position, which such a run does not move. Others stand at their last event.
    seen_tx bigint,
    seen_id bigint,
    -- Of a pass's last run, where it met transactions that were running: the row of `passes`.
    pass_tx bigint,
    partition_id integer not null,
    batches integer not null,
    -- Transactions between the first and the last that were running when the run was made: their events are not in it. Empty: there
    -- are none, but some ran between the last run and this one, whose events lie between both in the key.
    skipped bigint[],
    -- Of a pass's last run: late transactions that were visible, and are not placed (to their end).
    late bigint[],
    -- No offset twice (invariant 4); fetch reads along it.
    constraint runs_pkey primary key (partition_id, start_offset),
    -- Invariant 1: a run has records. Overflow of a bigint is an error of its own.
    constraint runs_offsets_ordered check (0 <= start_offset and start_offset < end_offset)
);

-- Fetch finds the next run that is apart, whose events or those before it do not follow each other in the key. Up to it the runs
-- need not be read, however thin they are.
create index runs_apart_idx on tidemark.runs (partition_id, start_offset) where seen_tx is not null or skipped is not null;

-- A receipt finds the runs of a late transaction; those of the others are found by the position, which rises along the offsets.
create index runs_late_idx on tidemark.runs (partition_id, first_tx, start_offset) where seen_tx is not null;

-- The transactions that were running when a pass placed, ascending: what they commit below the position is late. A row for all runs
-- of a pass; one in each of them made passes under many open transactions 25 times as slow. The sweep deletes rows whose
-- transactions are settled in every partition: then no row means that none is late.
create table tidemark.passes (
    tx bigint,
    in_flight bigint[] not null,
    constraint passes_pkey primary key (tx)
);

-- Where a log starts, once something was deleted from it: the row with the highest offsets. Beside the partition, not in it:
-- retention would leave a version behind that every commit reads.
create table tidemark.log_starts (
    start_offset bigint not null,
    -- The first offset whose run is there: records may be deleted up to an offset inside of a run, and before retention comes.
    deleted_to bigint not null,
    -- Bytes of the batches before the one that has the start offset.
    start_bytes bigint not null,
    -- The run before it, where that was the newest: it stayed as the cursor. The next deletion finds it by this, without a search
    -- among deleted ones.
    stale_run bigint,
    partition_id integer not null,
    constraint log_starts_pkey primary key (partition_id, start_offset, deleted_to)
);

-- Partitions of deleted topics, as long as something of theirs may be left. See db/sql/topics.sql.
create table tidemark.deleted_partitions (
    topic_id uuid not null,
    deleted_at timestamp with time zone default clock_timestamp() not null,
    -- The first transaction yet to come when the deletion was first seen: older ones may still commit to the partition.
    settled_tx bigint,
    -- Up to here its events are purged, in their order; once more from the first one when there can be no new ones.
    purged_tx bigint,
    purged_id bigint,
    purged_at timestamp with time zone,
    partition_id integer not null,
    constraint deleted_partitions_pkey primary key (partition_id)
) with (fillfactor=50);

-- What is to be purged, which is little of what is remembered.
create index deleted_partitions_left_idx on tidemark.deleted_partitions (partition_id) where purged_at is null;

create table tidemark.cluster (
    -- The cluster whose transaction ids the log speaks of. In another cluster they mean nothing, so commit and materialize refuse
    -- to run there until `celery -A tasks rebase`.
    system_identifier bigint not null,
    -- The order of commits is tx = tx_base + the id of the committing transaction. Rebase raises it, so that new ones lie above all
    -- that are there.
    tx_base bigint not null,
    singleton boolean default true,
    constraint cluster_pkey primary key (singleton),
    constraint cluster_one_row check (singleton)
);

insert into tidemark.cluster (system_identifier, tx_base) select system_identifier, 0 from pg_control_system();

-- The newest row is how far fan-out got: all commits up to seen_tx but those of the transactions in_flight.
create table tidemark.fan_outs (
    id bigint generated always as identity,
    seen_tx bigint not null,
    seen_at timestamp with time zone default clock_timestamp() not null,
    in_flight bigint[] not null,
    constraint fan_outs_pkey primary key (id)
);

insert into tidemark.fan_outs (seen_tx, in_flight) select pg_snapshot_xmax(pg_current_snapshot())::text::bigint - 1, '{}';

-- The newest row is what the last full round of the sweep found: the transactions below settled_tx but those in unsettled were
-- over, and all that they committed had its offsets. Nobody looks for late events of theirs any more.
create table tidemark.sweeps (
    id bigint generated always as identity,
    settled_tx bigint not null,
    -- Rows of `passes` below it are deleted.
    collected_tx bigint not null,
    swept_at timestamp with time zone default clock_timestamp() not null,
    unsettled bigint[] not null,
    constraint sweeps_pkey primary key (id)
);

insert into tidemark.sweeps (settled_tx, collected_tx, unsettled)
select pg_snapshot_xmin(pg_current_snapshot())::text::bigint, 0, '{}';

-- How many batches of an object a transaction deleted. Appended: counting down in the object would leave a version of its row
-- behind for each of its partitions.
create table tidemark.deleted_batches (
    object_id bigint not null,
    tx bigint not null,
    batches integer not null,
    constraint deleted_batches_pkey primary key (object_id, tx)
);

-- Objects that can go from storage: their last batch was deleted, none of their batches was accepted, or the key is condemned.
create table tidemark.dead_objects (
    object_id bigint,
    dead_at timestamp with time zone default clock_timestamp() not null,
    constraint dead_objects_pkey primary key (object_id),
    constraint dead_objects_object_id_fkey foreign key (object_id) references tidemark.objects (id) on delete cascade
);

-- Collecting goes along it, from where it stopped: by id it would meet the index entries of what it has deleted before.
create index dead_objects_dead_at_idx on tidemark.dead_objects (dead_at, object_id);

-- The newest row is how far collecting got: it has taken the objects that were dead at dead_at, up to object_id. Appended like a
-- fan-out's row. The first one stays, and is what everybody locks who moves the position.
create table tidemark.collections (
    id bigint generated always as identity,
    -- A round goes once through all that is dead.
    begun_at timestamp with time zone not null,
    dead_at timestamp with time zone not null,
    object_id bigint not null,
    constraint collections_pkey primary key (id)
);

insert into tidemark.collections (begun_at, dead_at, object_id) values ('-infinity', '-infinity', 0);

-- The newest row is how far bucket and table are compared: up to the key, empty where a round begins. Appended under the id that
-- follows the one that the turn began with: of two turns at once one counts.
create table tidemark.reconciliations (
    id bigint not null,
    saved_at timestamp with time zone default clock_timestamp() not null,
    key text collate "C" not null,
    -- A committed object that was in the store. Where it is not, the store may be another one, and nothing is condemned.
    found_key text collate "C",
    constraint reconciliations_pkey primary key (id)
);

insert into tidemark.reconciliations (id, key) values (0, '');

-- Up to here the batches of a partition are audited, so that an audit goes on where the last one stopped. Rows are updated in
-- place, for which pages keep room.
create table tidemark.audit_progress (
    audited_to bigint not null,
    audited_at timestamp with time zone default clock_timestamp() not null,
    partition_id integer,
    constraint audit_progress_pkey primary key (partition_id)
) with (fillfactor=70);

-- The partitions of the seed's system, with their ids here and what they held when their adoption began. Written before the first
-- batch is copied; until completed_at their topics do not exist, and nobody commits to them or reads them. See db/adopt.py.
create table tidemark.adopted_partitions (
    topic_id uuid not null,
    start_offset bigint not null,
    end_offset bigint not null,
    -- With an offset, and without.
    batches bigint not null,
    pending bigint not null,
    completed_at timestamp with time zone,
    partition_id integer not null,
    partition integer not null,
    topic text collate "C" not null,
    constraint adopted_partitions_pkey primary key (partition_id),
    -- A topic is adopted once.
    constraint adopted_partitions_topic_partition_key unique (topic, partition)
);
