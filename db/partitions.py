"""What topics and partitions hold and what waits in them, for people who look."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import psycopg

from config.errors import UnknownPartitionError, UnknownTopicError
from db.statements import run
from db.topics import partition_ids
from db.translate import domain_errors

# Counting further would keep the server busy for a figure nobody reads to the last digit.
COUNT_LIMIT = 100_000


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


def describe_topics(conn: psycopg.Connection[Any], names: Sequence[str] | None = None) -> list[TopicState]:
    """All topics, or those with these names; UnknownTopicError for a name that is not there."""
    with domain_errors():
        rows = run(conn, "describe_topics", (None if names is None else list(names),), prepare=False).fetchall()
    found = [
        TopicState(
            name=row[0],
            id=row[1],
            created_at=row[2],
            retention_ms=row[3],
            retention_bytes=row[4],
            partitions=row[5],
            start_offsets=int(row[6]),
            end_offsets=int(row[7]),
            min_end_offset=row[8],
            max_end_offset=row[9],
            byte_size=int(row[10]),
        )
        for row in rows
    ]
    missing = sorted(set(names or ()) - {topic.name for topic in found})
    if missing:
        raise UnknownTopicError(f"topic {missing[0]!r} does not exist. See: celery -A tasks topics list")
    return found


def describe_partitions(
    conn: psycopg.Connection[Any], names: Sequence[str] | None = None, *, only_pending: bool = False
) -> list[PartitionState]:
    """Partitions of these topics, or of all, by topic and number."""
    parameters = (None if names is None else list(names), COUNT_LIMIT, only_pending)
    with domain_errors():
        # Planned each time: a plan kept from an empty table would scan a full one.
        rows = run(conn, "describe_partitions", parameters, prepare=False).fetchall()
    return [
        PartitionState(
            topic=row[0],
            partition=row[1],
            partition_id=row[2],
            start_offset=row[3],
            end_offset=row[4],
            byte_size=row[5],
            backlog=row[6],
            lag=row[7],
        )
        for row in rows
    ]


def find_partition(conn: psycopg.Connection[Any], topic: str, partition: int) -> int:
    """Id of a partition; UnknownTopicError and UnknownPartitionError."""
    ids = partition_ids(conn, topic)
    if not 0 <= partition < len(ids):
        raise UnknownPartitionError(
            f"topic {topic!r} has no partition {partition}; it has partitions 0 to {len(ids) - 1}"
        )
    return ids[partition]


def read_offsets(conn: psycopg.Connection[Any], partition_id: int) -> tuple[int, int]:
    """Start and end offset of a partition; UnknownPartitionError."""
    with domain_errors():
        row = run(conn, "read_head", (partition_id,)).fetchone()
    if row is None:
        raise UnknownPartitionError(f"partition id {partition_id} does not exist")
    return row[0], row[1]


def records_to_audit(conn: psycopg.Connection[Any], topic: str | None = None) -> int:
    """How many records an audit has yet to read."""
    with domain_errors():
        row = run(conn, "audit_left", (topic,), prepare=False).fetchone()
    assert row is not None  # noqa: S101 - an aggregate returns a row
    return max(0, int(row[0]))
