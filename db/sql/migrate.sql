-- name: is_migrated
-- Whether anybody has migrated this database; then there is a version to read.
select to_regclass('tidemark.alembic_version') is not null;

-- name: schema_version
-- The version of the schema, null for none.
select (select v.version_num from tidemark.alembic_version v);

-- name: lock_migrations
-- The lock that migrations queue for, until the transaction ends: $1 its number.
select pg_advisory_xact_lock($1::bigint);
