"""What topics hold, what waits in them, and what for: the facts that commands, doctor and exporter show.

Each reading is one snapshot, takes no lock, and costs some descents of an index for each partition, and what it counts.
Sessions of other roles hide what they run from a role that is no member of pg_monitor.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Any, Literal, get_args
from uuid import UUID

from config.errors import UnknownPartitionError, UnknownTopicError
from db.arrays import Int4Array
from db.statements import Connection, all_, rows, run, values
from db.topics import partition_ids

# Counting further would keep the server busy for a figure nobody reads to the last digit: of one partition, of all.
COUNT_LIMIT = 100_000
COUNT_LIMIT_OF_ALL = 500_000
_ROWS = 100

HolderKind = Literal["session", "standby", "prepared transaction", "replication slot"]
HOLDER_KINDS: tuple[HolderKind, ...] = get_args(HolderKind)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicState:
    """A topic and its log: sums over the partitions, and the least and greatest of their end offsets."""

    name: str
    id: UUID
    created_at: datetime
    retention_ms: int | None
    retention_bytes: int | None
    partitions: int
    start_offsets: int
    end_offsets: int
    min_end_offset: int
    max_end_offset: int
    byte_size: int

    @property
    def records(self) -> int:
        return self.end_offsets - self.start_offsets


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionState:
    """A partition, the events that wait in it (counted up to `COUNT_LIMIT`) and the age of the oldest in seconds."""

    topic: str
    partition: int
    partition_id: int
    start_offset: int
    end_offset: int
    byte_size: int
    backlog: int
    lag: float | None

    @property
    def counted(self) -> bool:
        """False where there may be more than `backlog` says."""
        return self.backlog < COUNT_LIMIT


@dataclass(kw_only=True, slots=True)
class TopicBacklog:
    """What waits in a topic: `lag` is the oldest event's age in seconds; `counted` is False where there is more."""

    events: int = 0
    partitions: int = 0
    lag: float | None = None
    counted: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class LockWait:
    """A session that waits, and one that it waits for: `blocker_pid` 0 is the prepared transaction `blocker_gid`."""

    pid: int
    application: str
    waited: float
    lock: str
    topic: str | None
    partition: int | None
    query: str
    blocker_pid: int
    blocker_user: str | None
    blocker_application: str | None
    blocker_state: str | None
    blocker_age: float | None
    blocker_query: str | None
    blocker_gid: str | None

    @property
    def blocker(self) -> "Session":
        seen = (self.blocker_user, self.blocker_application, self.blocker_state, self.blocker_age, self.blocker_query)
        return Session(self.blocker_pid, self.blocker_gid, *seen)


@dataclass(frozen=True, slots=True)
class Session:
    """Who holds something, and the partitions whose rows it has locked, for at most the `age` of its transaction.

    `pid` 0 is the prepared transaction `gid`. What a role may not see is None.
    """

    pid: int
    gid: str | None
    user: str | None
    application: str | None
    state: str | None
    age: float | None
    query: str | None
    partition_ids: Sequence[int] = ()

    def __str__(self) -> str:
        return f"pid {self.pid}" if self.pid else f"prepared transaction {self.name}"

    @property
    def name(self) -> str:
        """As a `Holder` is called."""
        return str(self.pid) if self.pid else self.gid or "(unknown)"

    @property
    def repair(self) -> str:
        """The statement that ends it."""
        if self.pid:
            return f"select pg_terminate_backend({self.pid});"
        quoted = "'" + (self.gid or "").replace("'", "''") + "'"
        return f"commit prepared {quoted}; or rollback prepared {quoted};"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """What is open and holds something up: vacuum, and with an id also the offsets of what it commits.

    `name` is a process id, the name of a prepared transaction or of a slot. `seconds` is how long it has been open; of
    a standby and a slot the age of the oldest commit that they do not see.
    """

    kind: HolderKind
    name: str
    database: str | None
    user: str | None
    application: str | None
    state: str | None
    has_id: bool
    seconds: float | None
    query: str | None

    @property
    def session(self) -> Session:
        """What is no slot: those have none."""
        pid, gid = (0, self.name) if self.kind == "prepared transaction" else (int(self.name), None)
        seen = (self.user, self.application, self.state, self.seconds, self.query)
        return Session(pid, gid, *seen)


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """How far fan-out got: seconds since it last found commits, and the age of the oldest that it has not seen."""

    last: float
    undispatched: float | None
    own_cluster: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Leftovers:
    """What waits to be deleted, each counted up to 100,000: partitions of deleted topics, and objects in storage."""

    partitions: int
    objects: int


@dataclass(frozen=True, slots=True)
class Reading:
    """What people look at, at one moment; `at` is the monotonic clock's."""

    at: float
    topics: Sequence[TopicState]
    pending: Sequence[PartitionState]
    row_locks: Sequence[Session]
    lock_waits: Sequence[LockWait]
    holders: Sequence[Holder]
    dispatch: Dispatch
    leftovers: Leftovers

    def backlogs(self) -> dict[str, TopicBacklog]:
        """Backlog by topic; an empty one for topics without."""
        found: dict[str, TopicBacklog] = defaultdict(TopicBacklog)
        for partition in self.pending:
            so_far = found[partition.topic]
            so_far.events += partition.backlog
            so_far.partitions += 1
            so_far.lag = max(so_far.lag or 0.0, partition.lag or 0.0)
            so_far.counted &= partition.counted
        return found

    def rates(self, before: "Reading") -> dict[str, float]:
        """Records materialized per second and topic between two readings."""
        seconds = max(self.at - before.at, 1e-9)
        ends = {topic.name: topic.end_offsets for topic in before.topics}
        return {t.name: (t.end_offsets - ends.get(t.name, t.end_offsets)) / seconds for t in self.topics}


@dataclass(frozen=True, slots=True)
class Figures:
    """What the exporter shows, at one moment.

    `topics`, `tables`, `indexes` and `connections` are rows of the statements `figures_…`, which say what they hold.
    `capped` says that the events of backlogs were counted up to `COUNT_LIMIT_OF_ALL` only.
    """

    topics: Sequence[Any]
    capped: bool
    tables: Sequence[Any]
    indexes: Sequence[Any]
    connections: Sequence[Any]
    lock_waits: Sequence[LockWait]
    holders: Sequence[Holder]
    dispatch: Dispatch
    leftovers: Leftovers


def read_status(conn: Connection, names: Sequence[str] | None = None) -> Reading:
    """Read all topics, or those named; the connection must be idle. UnknownTopicError."""
    with _snapshot(conn):
        topics = describe_topics(conn, names)
        at = monotonic()
        pending = describe_partitions(conn, names, only_pending=True)
        waiting = Int4Array(p.partition_id for p in pending)
        locks = all_(conn, Session, "find_row_locks", (waiting, _ROWS), prepare=False)
        return Reading(at, topics, pending, locks, *_activity(conn))


def read_figures(conn: Connection, *, topics: int, overdue_seconds: float) -> Figures:
    """Read everything; the connection must be idle. A partition is overdue when an event waits `overdue_seconds`.

    Topics beyond the `topics` oldest are summed up.
    """
    with _snapshot(conn):
        found = rows(conn, "figures_topics", (topics, COUNT_LIMIT_OF_ALL, overdue_seconds), prepare=False)
        capped = sum(topic.events for topic in found) >= COUNT_LIMIT_OF_ALL
        others = "figures_tables", "figures_indexes", "figures_connections"
        tables, indexes, connections = (rows(conn, name, prepare=False) for name in others)
        return Figures(found, capped, tables, indexes, connections, *_activity(conn))


@contextmanager
def _snapshot(conn: Connection) -> Iterator[None]:
    with conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        # Statistics are out of date; a plan for few rows, or for an empty table, would scan a full one. Statements are
        # planned each time for the same reason: readings are rare, and tables grow between them.
        conn.execute("set local enable_seqscan = off")
        conn.execute("set local jit = off")
        yield


def _activity(conn: Connection) -> tuple[list[LockWait], list[Holder], Dispatch, Leftovers]:
    """Who waits for locks, what holds something up, how far fan-out got, and what is yet to be deleted."""
    waits = all_(conn, LockWait, "find_lock_waits", (_ROWS,), prepare=False)
    holders = all_(conn, Holder, "find_holders", (_ROWS,), prepare=False)
    # The migration puts a row of fan-out's there, and the newest one stays.
    [dispatch] = all_(conn, Dispatch, "read_dispatch", prepare=False)
    [leftovers] = all_(conn, Leftovers, "read_leftovers", prepare=False)
    return waits, holders, dispatch, leftovers


def describe_topics(conn: Connection, names: Sequence[str] | None = None) -> list[TopicState]:
    """All topics, or those with these names; UnknownTopicError for a name that is not there."""
    found = all_(conn, TopicState, "describe_topics", (None if names is None else list(names),), prepare=False)
    missing = sorted(set(names or ()) - {topic.name for topic in found})
    if missing:
        raise UnknownTopicError(f"topic {missing[0]!r} does not exist. See: celery -A tasks topics list")
    return found


def describe_partitions(
    conn: Connection, names: Sequence[str] | None = None, *, only_pending: bool = False
) -> list[PartitionState]:
    """Partitions of these topics, or of all, by topic and number."""
    parameters = (None if names is None else list(names), COUNT_LIMIT, only_pending)
    return all_(conn, PartitionState, "describe_partitions", parameters, prepare=False)


def find_partition(conn: Connection, topic: str, partition: int) -> int:
    """Id of a partition; UnknownTopicError and UnknownPartitionError."""
    ids = partition_ids(conn, topic)
    if not 0 <= partition < len(ids):
        valid = f"it has partitions 0 to {len(ids) - 1}"
        raise UnknownPartitionError(f"topic {topic!r} has no partition {partition}; {valid}")
    return ids[partition]


def read_offsets(conn: Connection, partition_id: int) -> tuple[int, int]:
    """Start and end offset of a partition; UnknownPartitionError."""
    row = run(conn, "read_head", (partition_id,)).fetchone()
    if row is None:
        raise UnknownPartitionError(f"partition id {partition_id} does not exist")
    return row[0], row[1]


def records_to_audit(conn: Connection, topic: str | None = None) -> int:
    """How many records an audit has yet to read."""
    return max(0, int(values(conn, "audit_left", (topic,), prepare=False)[0]))
