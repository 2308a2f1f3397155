"""Where materialization stands, what waits and what for: read in one snapshot, without a lock.

Sessions of other roles hide what they run from a role that is no member of pg_monitor.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, Literal, get_args, overload

import psycopg

from db.partitions import PartitionState, TopicState, describe_partitions, describe_topics
from db.statements import run
from db.translate import domain_errors

_ROWS = 20

HolderKind = Literal["session", "standby", "prepared transaction", "replication slot"]
HOLDER_KINDS: tuple[HolderKind, ...] = get_args(HolderKind)


@dataclass(frozen=True, kw_only=True, slots=True)
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """How far fan-out got. `undispatched` is the age of the oldest commit it has not seen."""

    last: float
    undispatched: float | None
    own_cluster: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """All of it at one moment; `at` is the monotonic clock's."""

    at: float
    topics: tuple[TopicState, ...]
    pending: tuple[PartitionState, ...]
    lock_waits: tuple[LockWait, ...]
    holders: tuple[Holder, ...]
    dispatch: Dispatch

    def backlogs(self) -> dict[str, TopicBacklog]:
        """Backlog by topic; an empty one for topics without."""
        found: dict[str, TopicBacklog] = defaultdict(TopicBacklog)
        for partition in self.pending:
            so_far = found[partition.topic]
            found[partition.topic] = TopicBacklog(
                events=so_far.events + partition.backlog,
                partitions=so_far.partitions + 1,
                lag=max(so_far.lag or 0.0, partition.lag or 0.0),
                counted=so_far.counted and partition.counted,
            )
        return found

    def rates(self, before: "Reading") -> dict[str, float]:
        """Records materialized per second and topic between two readings."""
        seconds = max(self.at - before.at, 1e-9)
        ends = {topic.name: topic.end_offsets for topic in before.topics}
        return {t.name: (t.end_offsets - ends.get(t.name, t.end_offsets)) / seconds for t in self.topics}


def read_status(conn: psycopg.Connection[Any], names: Sequence[str] | None = None) -> Reading:
    """Read all topics, or those named; the connection must be idle. UnknownTopicError."""
    with domain_errors(), conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        # Statistics are out of date; a plan for few rows would scan many.
        conn.execute("set local enable_seqscan = off")
        topics = tuple(describe_topics(conn, names))
        at = monotonic()
        return Reading(
            at=at,
            topics=topics,
            pending=tuple(describe_partitions(conn, names, only_pending=True)),
            lock_waits=tuple(_lock_waits(conn)),
            holders=tuple(find_holders(conn, _ROWS)),
            dispatch=read_dispatch(conn),
        )


def _lock_waits(conn: psycopg.Connection[Any]) -> list[LockWait]:
    return [
        LockWait(
            pid=row[0],
            application=row[1],
            waited=row[2],
            lock=row[3],
            topic=row[4],
            partition=row[5],
            query=_without_hint(row[6]),
            blocker_pid=row[7],
            blocker_user=row[8],
            blocker_application=row[9],
            blocker_state=row[10],
            blocker_age=row[11],
            blocker_query=_without_hint(row[12]),
            blocker_gid=row[13],
        )
        for row in run(conn, "find_lock_waits", (_ROWS,), prepare=False).fetchall()
    ]


def find_holders(conn: psycopg.Connection[Any], limit: int) -> list[Holder]:
    """What is open, the oldest first."""
    return [
        Holder(
            kind=row[0],
            name=row[1],
            database=row[2],
            user=row[3],
            application=row[4],
            state=row[5],
            has_id=row[6],
            seconds=row[7],
            query=_without_hint(row[8]),
        )
        for row in run(conn, "find_holders", (limit,), prepare=False).fetchall()
    ]


@overload
def _without_hint(query: str) -> str: ...
@overload
def _without_hint(query: None) -> None: ...
def _without_hint(query: str | None) -> str | None:
    """A query for people: what pg_hint_plan reads in front of some of ours tells them nothing."""
    return None if query is None else re.sub(r"\A/\*\+.*?\*/\s*", "", query, count=1, flags=re.DOTALL)


def read_dispatch(conn: psycopg.Connection[Any]) -> Dispatch:
    """Read it."""
    row = run(conn, "read_dispatch", prepare=False).fetchone()
    assert row is not None  # noqa: S101 - the migration puts the row there, and the newest one stays
    return Dispatch(last=row[0], undispatched=row[1], own_cluster=row[2])
