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
    -- A limit of zero would delete what was just written; no limit is null.
    constraint topics_retention_ms_positive check (retention_ms > 0),
    constraint topics_retention_bytes_positive check (retention_bytes > 0)
);

-- Identity and nothing else: written when a topic is created. Commits validate against these rows and materializing locks them, so
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
    -- Orders the events of one transaction; order between transactions is tx's. So a session may hold a range of ids in cache,
    -- which spares a WAL record in most commits.
    id bigint generated always as identity (cache 1000),
    object_id bigint not null,
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

-- What materializing writes, and all it writes: neighbouring events that were given neighbouring offsets. The newest run of a
-- partition is its end offset and its cursor. How to read one: db/sql/functions/run_events.sql.
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

-- The transactions that were running when a pass placed, ascending: what they commit below the position is late. A row for all runs
-- of a pass; one in each of them made passes under many open transactions 25 times as slow. The sweep deletes rows whose
-- transactions are settled in every partition: then no row means that none is late.
create table tidemark.passes (
    tx bigint,
    in_flight bigint[] not null,
    constraint passes_pkey primary key (tx)
);

-- Where a log starts, once something was deleted from it: the row with the highest offset. Beside the partition, not in it:
-- retention would leave a version behind that every commit reads.
create table tidemark.log_starts (
    start_offset bigint not null,
    -- Bytes of the batches before it.
    start_bytes bigint not null,
    -- The run before it, where that was the newest: it stayed as the cursor. The next deletion finds it by this, without a search
    -- among deleted ones.
    stale_run bigint,
    partition_id integer not null,
    constraint log_starts_pkey primary key (partition_id, start_offset)
);

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

-- Objects whose last batch was deleted, for the broker that removes them from storage.
create table tidemark.dead_objects (
    object_id bigint,
    dead_at timestamp with time zone default clock_timestamp() not null,
    constraint dead_objects_pkey primary key (object_id),
    constraint dead_objects_object_id_fkey foreign key (object_id) references tidemark.objects (id) on delete cascade
);

-- Up to here the batches of a partition are audited, so that an audit goes on where the last one stopped. Rows are updated in
-- place, for which pages keep room.
create table tidemark.audit_progress (
    audited_to bigint not null,
    audited_at timestamp with time zone default clock_timestamp() not null,
    partition_id integer,
    constraint audit_progress_pkey primary key (partition_id)
) with (fillfactor=70);
