"""Table definitions, for Alembic and for queries put together with SQLAlchemy.

The migrations create these tables; `tests/integration/test_schema.py` proves that both agree. Columns stand
in the order of their width, widest first, so that no row carries padding. Constraint names are part of the
interface: `db.translate` turns them into domain errors.
"""

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

SCHEMA = "tidemark"


metadata = MetaData(
    schema=SCHEMA,
    naming_convention={"pk": "%(table_name)s_pkey", "fk": "%(table_name)s_%(column_0_name)s_fkey"},
)
_timestamp = TIMESTAMP(timezone=True)
_now = text("clock_timestamp()")

topics = Table(
    "topics",
    metadata,
    Column("id", Uuid, server_default=text("gen_random_uuid()"), primary_key=True),
    Column("created_at", _timestamp, server_default=_now, nullable=False),
    Column("retention_ms", BigInteger),
    Column("retention_bytes", BigInteger),
    Column("partitions", Integer, nullable=False),
    # Collation C: names are compared byte by byte, as Kafka does, whatever the database's locale.
    Column("name", Text(collation="C"), nullable=False),
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
    # Identity and nothing else: written when a topic is created. Commits validate against these rows and materializing
    # locks them, so what changes (end, start, cursor) is appended to tables of its own: a row that is updated while a
    # snapshot is held grows a version that every reader passes.
    Column("topic_id", Uuid, ForeignKey(topics.c.id), nullable=False),
    # Given at creation, never reused: a broker's cached id can become unknown, never another partition's. The order of
    # these ids is the lock order of everything that locks partitions.
    Column("id", Integer, Identity(always=True), primary_key=True),
    Column("partition", Integer, nullable=False),
    # A topic has each partition number once; resolves (topic, partition).
    UniqueConstraint("topic_id", "partition", name="topic_partitions_topic_id_partition_key"),
    CheckConstraint("partition >= 0", name="topic_partitions_partition_not_negative"),
)

objects = Table(
    "objects",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    # The order of commits, see `cluster`.
    Column("tx", BigInteger, nullable=False),
    Column("committed_at", _timestamp, server_default=_now, nullable=False),
    Column("batches", Integer, nullable=False),
    Column("key", Text(collation="C"), nullable=False),
    Column("content_hash", LargeBinary, nullable=False),
    # The partitions the commit touched, each once, and how many batches it brought to each: fan-out sizes
    # its tasks from them without reading events.
    Column("partition_ids", ARRAY(Integer), nullable=False),
    Column("batch_counts", ARRAY(Integer), nullable=False),
    # Invariant 6: one key is one commit, also when two replays run at the same moment.
    UniqueConstraint("key", name="objects_key_key"),
    # Fan-out reads the commits since its last snapshot, and only those (invariant 7).
    Index("objects_tx_idx", "tx"),
    CheckConstraint("octet_length(key) between 1 and 1024", name="objects_key_length"),
    CheckConstraint("cardinality(partition_ids) = cardinality(batch_counts)", name="objects_counts_match_partitions"),
)

record_batch_events = Table(
    "record_batch_events",
    metadata,
    # The log. Rows are inserted by commits and deleted by retention, never updated or moved.
    Column("tx", BigInteger, nullable=False),
    # Orders the events of one transaction; order between transactions is tx's. So a session may hold a
    # range of ids in cache, which spares a WAL record in most commits.
    Column("id", BigInteger, Identity(always=True, cache=1000), nullable=False),
    Column("object_id", BigInteger, nullable=False),
    Column("byte_offset", BigInteger, nullable=False),
    Column("max_timestamp", BigInteger, nullable=False),
    Column("partition_id", Integer, nullable=False),
    Column("n_records", Integer, nullable=False),
    Column("byte_length", Integer, nullable=False),
    # The order of offsets, and the only index: each further one costs the hot path 15 to 30 per cent. No
    # foreign keys either: one to topic_partitions would lock the partition's row in every commit.
    PrimaryKeyConstraint("partition_id", "tx", "id"),
    # A batch without records would have no offset (invariant 1).
    CheckConstraint("n_records >= 1", name="record_batch_events_n_records_positive"),
    CheckConstraint("byte_offset >= 0 and byte_length >= 0", name="record_batch_events_range_not_negative"),
)

runs = Table(
    "runs",
    metadata,
    # What materializing writes, and all it writes: neighbouring events that were given neighbouring offsets. The newest
    # run of a partition is its end offset and its cursor. How to read one: db/sql/functions/run_events.sql.
    Column("start_offset", BigInteger, nullable=False),
    Column("end_offset", BigInteger, nullable=False),
    # Bytes in object storage of all batches up to here, since the partition exists: a size is a difference of two.
    Column("end_bytes", BigInteger, nullable=False),
    # The greatest of all batches up to here, so it never falls along the offsets: a time is found by search.
    Column("max_timestamp", BigInteger, nullable=False),
    # The run's events are those from (first_tx, first_id) to (last_tx, last_id), both included. No id: all of the
    # transaction's, from its first or to its last.
    Column("first_tx", BigInteger, nullable=False),
    Column("last_tx", BigInteger, nullable=False),
    Column("first_id", BigInteger),
    Column("last_id", BigInteger),
    # Of a run of one late transaction: the position, which such a run does not move. Others stand at their last event.
    Column("seen_tx", BigInteger),
    Column("seen_id", BigInteger),
    # Of a pass's last run, where it met transactions that were running: the row of `passes`.
    Column("pass_tx", BigInteger),
    Column("partition_id", Integer, nullable=False),
    Column("batches", Integer, nullable=False),
    # Transactions between the first and the last that were running when the run was made: their events are not in it.
    # Empty: there are none, but some ran between the last run and this one, whose events lie between both in the key.
    Column("skipped", ARRAY(BigInteger)),
    # Of a pass's last run: late transactions that were visible, and are not placed (to their end).
    Column("late", ARRAY(BigInteger)),
    # No offset twice (invariant 4); fetch reads along it.
    PrimaryKeyConstraint("partition_id", "start_offset"),
    # Fetch finds the next run that is apart, whose events or those before it do not follow each other in the key. Up to
    # it the runs need not be read, however thin they are.
    Index(
        "runs_apart_idx",
        "partition_id",
        "start_offset",
        postgresql_where=text("seen_tx is not null or skipped is not null"),
    ),
    # Invariant 1: a run has records. Overflow of a bigint is an error of its own.
    CheckConstraint("0 <= start_offset and start_offset < end_offset", name="runs_offsets_ordered"),
)

passes = Table(
    "passes",
    metadata,
    # The transactions that were running when a pass placed, ascending: what they commit below the position is late. A
    # row for all runs of a pass; one in each of them made passes under many open transactions 25 times as slow. The
    # sweep deletes rows whose transactions are settled in every partition: then no row means that none is late.
    Column("tx", BigInteger, autoincrement=False, primary_key=True),
    Column("in_flight", ARRAY(BigInteger), nullable=False),
)

log_starts = Table(
    "log_starts",
    metadata,
    # Where a log starts, once something was deleted from it: the row with the highest offset. Beside the partition, not
    # in it: retention would leave a version behind that every commit reads.
    Column("start_offset", BigInteger, nullable=False),
    # Bytes of the batches before it.
    Column("start_bytes", BigInteger, nullable=False),
    # The run before it, where that was the newest: it stayed as the cursor. The next deletion finds it by this, without
    # a search among deleted ones.
    Column("stale_run", BigInteger),
    Column("partition_id", Integer, nullable=False),
    PrimaryKeyConstraint("partition_id", "start_offset"),
)

cluster = Table(
    "cluster",
    metadata,
    # The cluster whose transaction ids the log speaks of. In another cluster they mean nothing, so commit and
    # materialize refuse to run there until `celery -A tasks rebase`.
    Column("system_identifier", BigInteger, nullable=False),
    # The order of commits is tx = tx_base + the id of the committing transaction. Rebase raises it, so that new
    # ones lie above all that are there.
    Column("tx_base", BigInteger, nullable=False),
    Column("singleton", Boolean, server_default=text("true"), primary_key=True),
    CheckConstraint("singleton", name="cluster_one_row"),
)

fan_outs = Table(
    "fan_outs",
    metadata,
    # The newest row is how far fan-out got: all commits up to seen_tx but those of the transactions in_flight.
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("seen_tx", BigInteger, nullable=False),
    Column("seen_at", _timestamp, server_default=_now, nullable=False),
    Column("in_flight", ARRAY(BigInteger), nullable=False),
)

sweeps = Table(
    "sweeps",
    metadata,
    # The newest row is what the last full round of the sweep found: the transactions below settled_tx but those in
    # unsettled were over, and all that they committed had its offsets. Nobody looks for late events of theirs any more.
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("settled_tx", BigInteger, nullable=False),
    # Rows of `passes` below it are deleted.
    Column("collected_tx", BigInteger, nullable=False),
    Column("swept_at", _timestamp, server_default=_now, nullable=False),
    Column("unsettled", ARRAY(BigInteger), nullable=False),
)

deleted_batches = Table(
    "deleted_batches",
    metadata,
    # How many batches of an object a transaction deleted. Appended: counting down in the object would leave a version
    # of its row behind for each of its partitions.
    Column("object_id", BigInteger, nullable=False),
    Column("tx", BigInteger, nullable=False),
    Column("batches", Integer, nullable=False),
    PrimaryKeyConstraint("object_id", "tx"),
)

dead_objects = Table(
    "dead_objects",
    metadata,
    # Objects whose last batch was deleted, for the broker that removes them from storage.
    Column("object_id", BigInteger, ForeignKey(objects.c.id, ondelete="CASCADE"), primary_key=True),
    Column("dead_at", _timestamp, server_default=_now, nullable=False),
)

audit_progress = Table(
    "audit_progress",
    metadata,
    # Up to here the batches of a partition are audited, so that an audit goes on where the last one stopped.
    Column("audited_to", BigInteger, nullable=False),
    Column("audited_at", _timestamp, server_default=_now, nullable=False),
    Column("partition_id", Integer, autoincrement=False, primary_key=True),
    postgresql_with={"fillfactor": "70"},
)
