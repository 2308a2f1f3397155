"""Topics and their partitions."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import psycopg

from config.errors import InvalidTopicError, UnknownTopicError
from db.translate import domain_errors, is_storable

_MAX_LIMIT = 2**63 - 1


def create_topic(conn: psycopg.Connection[Any], name: str, partitions: int) -> UUID:
    """Create a topic; raises InvalidTopicError and TopicExistsError."""
    if not is_storable(name):
        raise InvalidTopicError(f"topic name {name!r} is not legal. Use 1 to 249 of the characters A-Z a-z 0-9 . _ -")
    with domain_errors():
        row = conn.execute("select tidemark.create_topic(%s::text, %s::int)", (name, partitions)).fetchone()
    assert row is not None  # noqa: S101 - a function call returns a row
    return UUID(str(row[0]))


def partition_ids(conn: psycopg.Connection[Any], topic: str) -> list[int]:
    """Ids of a topic's partitions, partition 0 first; raises UnknownTopicError."""
    if not is_storable(topic):
        raise UnknownTopicError(f"topic {topic!r} does not exist: no topic can have this name")
    with domain_errors():
        row = conn.execute("select tidemark.partition_ids(%s::text)", (topic,)).fetchone()
    assert row is not None  # noqa: S101 - a function call returns a row
    return list(row[0])


class PartitionIds:
    """Partition ids by topic name, read once: they never change as long as the topic lives."""

    def __init__(self) -> None:
        self._known: dict[str, Sequence[int]] = {}

    def get(self, conn: psycopg.Connection[Any], topic: str) -> Sequence[int]:
        """As `partition_ids`, from memory the second time."""
        if topic not in self._known:
            self._known[topic] = tuple(partition_ids(conn, topic))
        return self._known[topic]


def highest_partition_id(conn: psycopg.Connection[Any]) -> int:
    """The id given last; 0 when there are no partitions."""
    row = conn.execute("select coalesce(max(p.id), 0) from tidemark.topic_partitions p").fetchone()
    assert row is not None  # noqa: S101 - an aggregate returns a row
    return int(row[0])


def names_of(conn: psycopg.Connection[Any], ids: Sequence[int]) -> dict[int, tuple[str, int]]:
    """Topic name and partition number by partition id; ids that do not exist are left out."""
    rows = conn.execute(
        "select p.id, t.name, p.partition from tidemark.topic_partitions p "
        "join tidemark.topics t on t.id = p.topic_id where p.id = any(%s)",
        (list(ids),),
    ).fetchall()
    return {row[0]: (row[1], row[2]) for row in rows}


def set_retention(
    conn: psycopg.Connection[Any], topic: str, *, retention_ms: int | None, retention_bytes: int | None
) -> None:
    """Set a topic's limits, both; None is no limit. What is beyond them goes at the next retention.

    Raises UnknownTopicError, and InvalidTopicError for a limit that is not positive or beyond 64 bits.
    """
    for name, limit in (("retention_ms", retention_ms), ("retention_bytes", retention_bytes)):
        if limit is not None and not 1 <= limit <= _MAX_LIMIT:
            raise InvalidTopicError(
                f"topic {topic!r}: {name} {limit} is out of range. Use 1 to {_MAX_LIMIT}, or None for no limit."
            )
    with domain_errors():
        found = conn.execute(
            "update tidemark.topics set retention_ms = %s::bigint, retention_bytes = %s::bigint where name = %s::text",
            (retention_ms, retention_bytes, topic),
        ).rowcount
    if not found:
        raise UnknownTopicError(
            f"topic {topic!r} does not exist. Create it with tidemark.create_topic(name, partitions), or list what "
            f"there is in tidemark.topics."
        )
