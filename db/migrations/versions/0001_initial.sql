-- The first schema. What each constraint, index and storage parameter is for stands in db/schema.py.
create table tidemark.audit_progress (
    audited_to bigint not null,
    audited_at timestamp with time zone default clock_timestamp() not null,
    partition_id integer not null,
    constraint audit_progress_pkey primary key (partition_id)
) with (fillfactor = 70);

create table tidemark.cluster (
    system_identifier bigint not null,
    singleton boolean default true not null,
    constraint cluster_pkey primary key (singleton),
    constraint cluster_one_row check (singleton)
);

create table tidemark.fan_out_state (
    seen_at timestamp with time zone default clock_timestamp() not null,
    singleton boolean default true not null,
    seen pg_snapshot default pg_current_snapshot() not null,
    constraint fan_out_state_pkey primary key (singleton),
    constraint fan_out_state_one_row check (singleton)
) with (fillfactor = 50);

create table tidemark.objects (
    id bigint generated always as identity,
    xid xid8 default pg_current_xact_id() not null,
    committed_at timestamp with time zone default clock_timestamp() not null,
    live_batches integer not null,
    key text collate "C" not null,
    content_hash bytea not null,
    partition_ids integer[] not null,
    batch_counts integer[] not null,
    constraint objects_pkey primary key (id),
    constraint objects_key_key unique (key),
    constraint objects_live_batches_not_negative check (live_batches >= 0),
    constraint objects_key_length check (octet_length(key) between 1 and 1024),
    constraint objects_counts_match_partitions check (cardinality(partition_ids) = cardinality(batch_counts))
) with (fillfactor = 90);

create index objects_xid_idx on tidemark.objects (xid);

create table tidemark.record_batch_events (
    xid xid8 default pg_current_xact_id() not null,
    id bigint generated always as identity (cache 1000),
    object_id bigint not null,
    byte_offset bigint not null,
    max_timestamp bigint not null,
    partition_id integer not null,
    n_records integer not null,
    byte_length integer not null,
    constraint record_batch_events_pkey primary key (partition_id, xid, id),
    constraint record_batch_events_n_records_positive check (n_records >= 1),
    constraint record_batch_events_range_not_negative check (byte_offset >= 0 and byte_length >= 0)
) with (autovacuum_vacuum_threshold = 10000, autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0.2);

create table tidemark.record_batches (
    start_offset bigint not null,
    object_id bigint not null,
    byte_offset bigint not null,
    max_timestamp bigint not null,
    partition_id integer not null,
    n_records integer not null,
    byte_length integer not null,
    constraint record_batches_pkey primary key (partition_id, start_offset)
);

create table tidemark.topics (
    id uuid default gen_random_uuid() not null,
    created_at timestamp with time zone default clock_timestamp() not null,
    retention_ms bigint,
    retention_bytes bigint,
    partitions integer not null,
    name text collate "C" not null,
    constraint topics_pkey primary key (id),
    constraint topics_name_key unique (name),
    constraint topics_name_legal check (name ~ '^[A-Za-z0-9._-]{1,249}$' and name not in ('.', '..')),
    constraint topics_partitions_in_range check (partitions between 1 and 100000),
    constraint topics_retention_ms_positive check (retention_ms > 0),
    constraint topics_retention_bytes_positive check (retention_bytes > 0)
);

create table tidemark.dead_objects (
    object_id bigint not null,
    dead_at timestamp with time zone default clock_timestamp() not null,
    constraint dead_objects_pkey primary key (object_id),
    constraint dead_objects_object_id_fkey foreign key(object_id) references tidemark.objects (id) on delete cascade
);

create table tidemark.topic_partitions (
    topic_id uuid not null,
    start_offset bigint default 0 not null,
    end_offset bigint default 0 not null,
    byte_size bigint default 0 not null,
    seen_xid xid8 default '0' not null,
    seen_id bigint default 0 not null,
    id integer generated always as identity,
    partition integer not null,
    in_flight xid8[] default '{}' not null,
    constraint topic_partitions_pkey primary key (id),
    constraint topic_partitions_topic_id_partition_key unique (topic_id, partition),
    constraint topic_partitions_partition_not_negative check (partition >= 0),
    constraint topic_partitions_offsets_ordered check (0 <= start_offset and start_offset <= end_offset),
    constraint topic_partitions_byte_size_not_negative check (byte_size >= 0),
    constraint topic_partitions_topic_id_fkey foreign key(topic_id) references tidemark.topics (id)
) with (fillfactor = 45, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
