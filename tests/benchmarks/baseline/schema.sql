-- The seed's tables in a schema of their own: keys are random uuids, events carry a `processed` flag.
drop schema if exists seed cascade;
create schema seed;

create table seed.topics (
    id uuid primary key default gen_random_uuid(),
    name varchar(255) not null unique
);

create table seed.topic_partitions (
    id uuid primary key default gen_random_uuid(),
    topic_id uuid not null references seed.topics,
    partition int not null,
    start_offset bigint not null check (start_offset >= 0),
    end_offset bigint not null check (end_offset >= 0 and end_offset >= start_offset)
);

create table seed.record_batch_events (
    id uuid primary key default gen_random_uuid(),
    topic_id uuid not null references seed.topics,
    partition int not null,
    n_records bigint not null,
    s3_key varchar(255) not null,
    processed boolean not null default false,
    created_at timestamptz not null default clock_timestamp()
);

create table seed.record_batches (
    id uuid primary key default gen_random_uuid(),
    topic_id uuid not null references seed.topics,
    partition int not null,
    start_offset bigint not null,
    end_offset bigint not null,
    s3_key varchar(255) not null
);
