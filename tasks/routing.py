"""Where a task goes: to the shard queue of the partitions in its arguments.

The router looks at nothing but name and arguments, so beat, the command line, Flower and Python route alike. A shard's
queue with one consumer serializes its partitions; the row lock in Postgres is what keeps them correct.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from config.errors import InvalidJobError
from config.queues import CONTROL, MAINTENANCE, shard_queue

MATERIALIZE = "tasks.materialize"
_MAINTENANCE = {"tasks.sweep", "tasks.retain", "tasks.audit"}


def shard_of(partition_id: int, shards: int) -> int:
    """Shard of a partition: the same in every process and every release."""
    return partition_id % shards


def partition_ids_of(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> list[int]:
    """Partition ids in the arguments of a materialize task; InvalidJobError for anything but ids."""
    ids = (kwargs or {}).get("partition_ids", args[0] if args else None)
    if not isinstance(ids, list | tuple) or not ids or not all(type(i) is int and i > 0 for i in ids):
        raise InvalidJobError(
            f"{MATERIALIZE} takes partition_ids, a list of at least one positive integer, not {ids!r}. "
            f"By name, use tasks.materialize_topic(topic) or tasks.materialize_partition(topic, partition)."
        )
    return list(ids)


class Router:
    """An entry of Celery's `task_routes`."""

    def __init__(self, shards: int) -> None:
        self._shards = shards

    def __call__(
        self, name: str, args: Any, kwargs: Any, _options: Mapping[str, Any], **_: Any
    ) -> dict[str, str] | None:
        """Queue for a task of ours; None for others."""
        if name == MATERIALIZE:
            ids = partition_ids_of(args, kwargs)
            shards = {shard_of(i, self._shards) for i in ids}
            if len(shards) > 1:
                raise InvalidJobError(
                    f"{MATERIALIZE}: partition ids {ids[:10]} belong to {len(shards)} shards. One task serves one: "
                    f"pass them apart, or use tasks.materialize_topic(topic)."
                )
            return _to(shard_queue(shards.pop()))
        if name in _MAINTENANCE:
            return _to(MAINTENANCE)
        return _to(CONTROL) if name.startswith("tasks.") else None


def _to(queue: str) -> dict[str, str]:
    return {"queue": queue, "routing_key": queue}
