"""Topics and their partitions."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from config.errors import InvalidTopicError, UnknownTopicError
from db.arrays import Int4Array
from db.statements import Connection, all_, run, values
from db.translate import is_storable

_MAX_LIMIT = 2**63 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """A topic: the ids of its partitions, partition 0 first, and its limits of retention, None for none."""

    id: UUID
    name: str
    partition_ids: list[int]
    retention_ms: int | None
    retention_bytes: int | None
    created_at: datetime


def create_topic(
    conn: Connection,
    name: str,
    partitions: int,
    *,
    topic_id: UUID | None = None,
    retention_ms: int | None = None,
    retention_bytes: int | None = None,
) -> UUID:
    """Create a topic, under an id of the caller's where one is given; returns its id.

    Raises InvalidTopicError, also for a name that differs from another one in `.` and `_` alone, and TopicExistsError.
    """
    if not is_storable(name):
        raise InvalidTopicError(f"topic name {name!r} is not legal. Use 1 to 249 of the characters A-Z a-z 0-9 . _ -")
    _check_limits(name, retention_ms, retention_bytes)
    (created,) = values(conn, "create_topic", (name, partitions, topic_id, retention_ms, retention_bytes))
    return UUID(str(created))


def add_partitions(conn: Connection, topic: str, partitions: int) -> list[int]:
    """Give a topic more partitions, so that it has `partitions` in all; returns the ids of all of them.

    Raises UnknownTopicError, and InvalidTopicError where that is no more than it has.
    """
    (ids,) = values(conn, "add_partitions", (topic, partitions))
    return list(ids)


def delete_topic(conn: Connection, topic: str) -> UUID:
    """Delete a topic: its name is free at once, `tasks.purge` deletes what it held. Raises UnknownTopicError."""
    (topic_id,) = values(conn, "delete_topic", (topic,))
    return UUID(str(topic_id))


def list_topics(
    conn: Connection,
    names: Sequence[str] | None = None,
    *,
    ids: Sequence[UUID] | None = None,
    after: str = "",
    limit: int = 1_000,
) -> list[Topic]:
    """Topics by name: those with these names or ids, or all; at most `limit`, after a name. Others are left out."""
    wanted = None if names is None else list(names), None if ids is None else list(ids)
    return all_(conn, Topic, "list_topics", (*wanted, after, limit))


def partition_ids(conn: Connection, topic: str) -> list[int]:
    """Ids of a topic's partitions, partition 0 first; raises UnknownTopicError."""
    if not is_storable(topic):
        raise UnknownTopicError(f"topic {topic!r} does not exist: no topic can have this name")
    (ids,) = values(conn, "partition_ids", (topic,))
    return list(ids)


class PartitionIds:
    """Partition ids by topic name, read once: they never change as long as the topic lives, though it may get more."""

    def __init__(self) -> None:
        self._known: dict[str, Sequence[int]] = {}

    def get(self, conn: Connection, topic: str) -> Sequence[int]:
        """As `partition_ids`, from memory the second time."""
        if topic not in self._known:
            self._known[topic] = tuple(partition_ids(conn, topic))
        return self._known[topic]


def highest_partition_id(conn: Connection) -> int:
    """The id given last; 0 when there are no partitions."""
    (highest,) = values(conn, "highest_partition_id")
    return int(highest)


def names_of(conn: Connection, ids: Sequence[int]) -> dict[int, tuple[str, int]]:
    """Topic name and partition number by partition id; ids that do not exist are left out."""
    rows = run(conn, "name_partitions", (Int4Array(ids),)).fetchall()
    return {partition_id: (topic, partition) for partition_id, topic, partition in rows}


def set_retention(conn: Connection, topic: str, *, retention_ms: int | None, retention_bytes: int | None) -> None:
    """Set a topic's limits, both; None is no limit. What is beyond them goes at the next retention.

    Raises UnknownTopicError, and InvalidTopicError for a limit that is negative or beyond 64 bits.
    """
    _check_limits(topic, retention_ms, retention_bytes)
    run(conn, "set_retention", (topic, retention_ms, retention_bytes))


def _check_limits(topic: str, *limits: int | None) -> None:
    # Postgres would find no function for a number that is no bigint.
    if any(limit is not None and not 0 <= limit <= _MAX_LIMIT for limit in limits):
        raise InvalidTopicError(
            f"topic {topic!r}: retention of {limits[0]} ms and {limits[1]} bytes is out of range. Use 0 to "
            f"{_MAX_LIMIT}, or None for no limit."
        )
