"""Table definitions, for Alembic and for queries put together with SQLAlchemy.

The migrations create these tables; `tests/integration/test_schema.py` proves that both agree. Columns stand
in the order of their width, widest first, so that no row carries padding. Constraint names are part of the
interface: `db.translate` turns them into domain errors.
"""

from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.types import UserDefinedType

SCHEMA = "tidemark"


class Xid8(UserDefinedType[str]):
    """A transaction id with its epoch: never wraps, so old rows stay comparable."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "xid8"


class PgSnapshot(UserDefinedType[str]):
    """`pg_snapshot`: which transactions were finished, running and yet to come at one moment."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "pg_snapshot"


metadata = MetaData(schema=SCHEMA)
_timestamp = TIMESTAMP(timezone=True)
_now = text("clock_timestamp()")

topics = Table(
    "topics",
    metadata,
    Column("id", Uuid, server_default=text("gen_random_uuid()"), nullable=False),
    Column("created_at", _timestamp, server_default=_now, nullable=False),
    Column("retention_ms", BigInteger),
    Column("retention_bytes", BigInteger),
    Column("partitions", Integer, nullable=False),
    # Collation C: names are compared byte by byte, as Kafka does, whatever the database's locale.
    Column("name", Text(collation="C"), nullable=False),
    PrimaryKeyConstraint("id", name="topics_pkey"),
    # A name means one topic; resolves names to partitions.
    UniqueConstraint("name", name="topics_name_key"),
    # Kafka's rule for legal topic names.
    CheckConstraint("name ~ '^[A-Za-z0-9._-]{1,249}$' and name not in ('.', '..')", name="topics_name_legal"),
    # Bounds create_topic's work.
    CheckConstraint("partitions between 1 and 100000", name="topics_partitions_in_range"),
    # A limit of zero would delete what was just written; no limit is null.
    CheckConstraint("retention_ms > 0", name="topics_retention_ms_positive"),
    CheckConstraint("retention_bytes > 0", name="topics_retention_bytes_positive"),
)

topic_partitions = Table(
    "topic_partitions",
    metadata,
    Column("topic_id", Uuid, ForeignKey(topics.c.id, name="topic_partitions_topic_id_fkey"), nullable=False),
    Column("start_offset", BigInteger, server_default=text("0"), nullable=False),
    Column("end_offset", BigInteger, server_default=text("0"), nullable=False),
    Column("byte_size", BigInteger, server_default=text("0"), nullable=False),
    # The cursor: every event at or below (seen_xid, seen_id) is materialized, except those of the
    # transactions in `in_flight`, which were still running when the cursor passed them.
    Column("seen_xid", Xid8, server_default=text("'0'"), nullable=False),
    Column("seen_id", BigInteger, server_default=text("0"), nullable=False),
    # Given at creation, never reused: a broker's cached id can become unknown, never another partition's.
    Column("id", Integer, Identity(always=True), nullable=False),
    Column("partition", Integer, nullable=False),
    Column("in_flight", ARRAY(Xid8), server_default=text("'{}'"), nullable=False),
    # The lock order of everything that locks partitions.
    PrimaryKeyConstraint("id", name="topic_partitions_pkey"),
    # A topic has each partition number once; resolves (topic, partition).
    UniqueConstraint("topic_id", "partition", name="topic_partitions_topic_id_partition_key"),
    CheckConstraint("partition >= 0", name="topic_partitions_partition_not_negative"),
    # Invariant 1: the log is [start_offset, end_offset).
    CheckConstraint("0 <= start_offset and start_offset <= end_offset", name="topic_partitions_offsets_ordered"),
    # Retention by size subtracts what materialization added, never more.
    CheckConstraint("byte_size >= 0", name="topic_partitions_byte_size_not_negative"),
    # Updated by every materialization, a whole page of neighbours in one transaction: room for a second version of each
    # row, so that all of these updates are HOT. And vacuum before they pile up (the defaults wait for a fifth of the
    # table and then sleep between pages).
    postgresql_with={
        "fillfactor": "45",
        "autovacuum_vacuum_threshold": "1000",
        "autovacuum_vacuum_scale_factor": "0.02",
        "autovacuum_vacuum_cost_delay": "0",
    },
)

objects = Table(
    "objects",
    metadata,
    Column("id", BigInteger, Identity(always=True), nullable=False),
    Column("xid", Xid8, server_default=text("pg_current_xact_id()"), nullable=False),
    Column("committed_at", _timestamp, server_default=_now, nullable=False),
    # Batches of this object that are not deleted; at zero the object can go from storage.
    Column("live_batches", Integer, nullable=False),
    Column("key", Text(collation="C"), nullable=False),
    Column("content_hash", LargeBinary, nullable=False),
    # The partitions the commit touched, each once, and how many batches it brought to each: fan-out sizes
    # its tasks from them without reading events.
    Column("partition_ids", ARRAY(Integer), nullable=False),
    Column("batch_counts", ARRAY(Integer), nullable=False),
    PrimaryKeyConstraint("id", name="objects_pkey"),
    # Invariant 6: one key is one commit, also when two replays run at the same moment.
    UniqueConstraint("key", name="objects_key_key"),
    # Fan-out reads the commits since its last snapshot, and only those (invariant 7).
    Index("objects_xid_idx", "xid"),
    CheckConstraint("live_batches >= 0", name="objects_live_batches_not_negative"),
    CheckConstraint("octet_length(key) between 1 and 1024", name="objects_key_length"),
    CheckConstraint("cardinality(partition_ids) = cardinality(batch_counts)", name="objects_counts_match_partitions"),
    # Retention counts live_batches down in place: leave room for HOT updates.
    postgresql_with={"fillfactor": "90"},
)

record_batch_events = Table(
    "record_batch_events",
    metadata,
    Column("xid", Xid8, server_default=text("pg_current_xact_id()"), nullable=False),
    # Orders the events of one transaction; order between transactions is xid's. So a session may hold a
    # range of ids in cache, which spares a WAL record in most commits.
    Column("id", BigInteger, Identity(always=True, cache=1000), nullable=False),
    Column("object_id", BigInteger, nullable=False),
    Column("byte_offset", BigInteger, nullable=False),
    Column("max_timestamp", BigInteger, nullable=False),
    Column("partition_id", Integer, nullable=False),
    Column("n_records", Integer, nullable=False),
    Column("byte_length", Integer, nullable=False),
    # The order of offsets, and the only index: each further one costs the hot path 15 to 30 per cent. No
    # foreign keys either: one to topic_partitions would lock the head row in every commit.
    PrimaryKeyConstraint("partition_id", "xid", "id", name="record_batch_events_pkey"),
    # A batch without records would have no offset (invariant 1).
    CheckConstraint("n_records >= 1", name="record_batch_events_n_records_positive"),
    CheckConstraint("byte_offset >= 0 and byte_length >= 0", name="record_batch_events_range_not_negative"),
    # Insert-and-delete only: vacuum by inserts would read all of it for nothing, so it goes by the deletes
    # of trim, early and without pauses.
    postgresql_with={
        "autovacuum_vacuum_threshold": "10000",
        "autovacuum_vacuum_scale_factor": "0.05",
        "autovacuum_vacuum_cost_delay": "0",
        "autovacuum_analyze_scale_factor": "0.2",
    },
)

record_batches = Table(
    "record_batches",
    metadata,
    Column("start_offset", BigInteger, nullable=False),
    Column("object_id", BigInteger, nullable=False),
    Column("byte_offset", BigInteger, nullable=False),
    Column("max_timestamp", BigInteger, nullable=False),
    Column("partition_id", Integer, nullable=False),
    Column("n_records", Integer, nullable=False),
    Column("byte_length", Integer, nullable=False),
    # No offset twice (invariant 4); fetch reads along it. A second index would cost a quarter of the
    # materializer's throughput. What the rows hold was checked when they were events.
    PrimaryKeyConstraint("partition_id", "start_offset", name="record_batches_pkey"),
)

cluster = Table(
    "cluster",
    metadata,
    # The cluster whose transaction ids the cursors speak of. In another cluster they mean nothing, so
    # commit and materialize refuse to run there until `celery -A tasks rebase`.
    Column("system_identifier", BigInteger, nullable=False),
    Column("singleton", Boolean, server_default=text("true"), nullable=False),
    PrimaryKeyConstraint("singleton", name="cluster_pkey"),
    CheckConstraint("singleton", name="cluster_one_row"),
)

fan_out_state = Table(
    "fan_out_state",
    metadata,
    Column("seen_at", _timestamp, server_default=_now, nullable=False),
    Column("singleton", Boolean, server_default=text("true"), nullable=False),
    # Commits visible in this snapshot are dispatched.
    Column("seen", PgSnapshot, server_default=text("pg_current_snapshot()"), nullable=False),
    PrimaryKeyConstraint("singleton", name="fan_out_state_pkey"),
    CheckConstraint("singleton", name="fan_out_state_one_row"),
    postgresql_with={"fillfactor": "50"},
)

dead_objects = Table(
    "dead_objects",
    metadata,
    # Objects whose last batch was deleted, for the broker that removes them from storage. A table of its own,
    # so that `objects` needs no index on live_batches, which would forbid HOT updates of it.
    Column(
        "object_id",
        BigInteger,
        ForeignKey(objects.c.id, name="dead_objects_object_id_fkey", ondelete="CASCADE"),
        nullable=False,
    ),
    Column("dead_at", _timestamp, server_default=_now, nullable=False),
    PrimaryKeyConstraint("object_id", name="dead_objects_pkey"),
)

audit_progress = Table(
    "audit_progress",
    metadata,
    # Up to here the batches of a partition are audited, so that an audit goes on where the last one stopped.
    Column("audited_to", BigInteger, nullable=False),
    Column("audited_at", _timestamp, server_default=_now, nullable=False),
    Column("partition_id", Integer, autoincrement=False, nullable=False),
    PrimaryKeyConstraint("partition_id", name="audit_progress_pkey"),
    postgresql_with={"fillfactor": "70"},
)
