"""Topics and their partitions."""

from collections.abc import Sequence
from uuid import UUID

from config.errors import InvalidTopicError, UnknownTopicError
from db.arrays import Int4Array
from db.statements import Connection, run, values
from db.translate import is_storable

_MAX_LIMIT = 2**63 - 1


def create_topic(conn: Connection, name: str, partitions: int) -> UUID:
    """Create a topic; raises InvalidTopicError and TopicExistsError."""
    if not is_storable(name):
        raise InvalidTopicError(f"topic name {name!r} is not legal. Use 1 to 249 of the characters A-Z a-z 0-9 . _ -")
    (topic_id,) = values(conn, "create_topic", (name, partitions))
    return UUID(str(topic_id))


def partition_ids(conn: Connection, topic: str) -> list[int]:
    """Ids of a topic's partitions, partition 0 first; raises UnknownTopicError."""
    if not is_storable(topic):
        raise UnknownTopicError(f"topic {topic!r} does not exist: no topic can have this name")
    (ids,) = values(conn, "partition_ids", (topic,))
    return list(ids)


class PartitionIds:
    """Partition ids by topic name, read once: they never change as long as the topic lives."""

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

    Raises UnknownTopicError, and InvalidTopicError for a limit that is not positive or beyond 64 bits.
    """
    for name, limit in (("retention_ms", retention_ms), ("retention_bytes", retention_bytes)):
        if limit is not None and not 1 <= limit <= _MAX_LIMIT:
            raise InvalidTopicError(
                f"topic {topic!r}: {name} {limit} is out of range. Use 1 to {_MAX_LIMIT}, or None for no limit."
            )
    if not run(conn, "set_retention", (topic, retention_ms, retention_bytes)).rowcount:
        raise UnknownTopicError(
            f"topic {topic!r} does not exist. Create it with tidemark.create_topic(name, partitions), or list what "
            f"there is in tidemark.topics."
        )
