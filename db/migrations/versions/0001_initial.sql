-- The first schema. What each constraint, index and storage parameter is for stands in db/schema.py.
create table tidemark.audit_progress (
    audited_to bigint not null,
    audited_at timestamp with time zone default clock_timestamp() not null,
    partition_id integer constraint audit_progress_pkey primary key
) with (fillfactor = 70);

create table tidemark.cluster (
    system_identifier bigint not null,
    tx_base bigint not null,
    singleton boolean default true constraint cluster_pkey primary key constraint cluster_one_row check (singleton)
);

create table tidemark.deleted_batches (
    object_id bigint not null,
    tx bigint not null,
    batches integer not null,
    constraint deleted_batches_pkey primary key (object_id, tx)
);

create table tidemark.fan_outs (
    id bigint generated always as identity constraint fan_outs_pkey primary key,
    seen_tx bigint not null,
    seen_at timestamp with time zone default clock_timestamp() not null,
    in_flight bigint[] not null
);

create table tidemark.log_starts (
    start_offset bigint not null,
    start_bytes bigint not null,
    stale_run bigint,
    partition_id integer not null,
    constraint log_starts_pkey primary key (partition_id, start_offset)
);

create table tidemark.objects (
    id bigint generated always as identity constraint objects_pkey primary key,
    tx bigint not null,
    committed_at timestamp with time zone default clock_timestamp() not null,
    batches integer not null,
    key text collate "C" not null constraint objects_key_key unique,
    content_hash bytea not null,
    partition_ids integer[] not null,
    batch_counts integer[] not null,
    constraint objects_key_length check (octet_length(key) between 1 and 1024),
    constraint objects_counts_match_partitions check (cardinality(partition_ids) = cardinality(batch_counts))
);

create index objects_tx_idx on tidemark.objects (tx);

create table tidemark.passes (
    tx bigint constraint passes_pkey primary key,
    in_flight bigint[] not null
);

create table tidemark.record_batch_events (
    tx bigint not null,
    id bigint generated always as identity (cache 1000),
    object_id bigint not null,
    byte_offset bigint not null,
    max_timestamp bigint not null,
    partition_id integer not null,
    n_records integer not null constraint record_batch_events_n_records_positive check (n_records >= 1),
    byte_length integer not null,
    constraint record_batch_events_pkey primary key (partition_id, tx, id),
    constraint record_batch_events_range_not_negative check (byte_offset >= 0 and byte_length >= 0)
);

create table tidemark.runs (
    start_offset bigint not null,
    end_offset bigint not null,
    end_bytes bigint not null,
    max_timestamp bigint not null,
    first_tx bigint not null,
    last_tx bigint not null,
    first_id bigint,
    last_id bigint,
    seen_tx bigint,
    seen_id bigint,
    pass_tx bigint,
    partition_id integer not null,
    batches integer not null,
    skipped bigint[],
    late bigint[],
    constraint runs_pkey primary key (partition_id, start_offset),
    constraint runs_offsets_ordered check (0 <= start_offset and start_offset < end_offset)
);

create index runs_apart_idx on tidemark.runs (partition_id, start_offset) where seen_tx is not null or skipped is not null;

create table tidemark.sweeps (
    id bigint generated always as identity constraint sweeps_pkey primary key,
    settled_tx bigint not null,
    collected_tx bigint not null,
    swept_at timestamp with time zone default clock_timestamp() not null,
    unsettled bigint[] not null
);

create table tidemark.topics (
    id uuid default gen_random_uuid() constraint topics_pkey primary key,
    created_at timestamp with time zone default clock_timestamp() not null,
    retention_ms bigint constraint topics_retention_ms_positive check (retention_ms > 0),
    retention_bytes bigint constraint topics_retention_bytes_positive check (retention_bytes > 0),
    partitions integer not null constraint topics_partitions_in_range check (partitions between 1 and 100000),
    name text collate "C" not null constraint topics_name_key unique,
    constraint topics_name_legal check (name ~ '^[A-Za-z0-9._-]{1,249}$' and name not in ('.', '..'))
);

create table tidemark.dead_objects (
    object_id bigint constraint dead_objects_pkey primary key,
    dead_at timestamp with time zone default clock_timestamp() not null,
    constraint dead_objects_object_id_fkey foreign key(object_id) references tidemark.objects (id) on delete cascade
);

create table tidemark.topic_partitions (
    topic_id uuid not null constraint topic_partitions_topic_id_fkey references tidemark.topics (id),
    id integer generated always as identity constraint topic_partitions_pkey primary key,
    partition integer not null constraint topic_partitions_partition_not_negative check (partition >= 0),
    constraint topic_partitions_topic_id_partition_key unique (topic_id, partition)
);
