"""Queues, and which task goes to which: a partition belongs to one shard, and a shard has one queue.

A queue's name is its routing key. The router looks at nothing but a task's name and arguments, so beat, the command
line, Flower and Python route alike. A shard's queue with one consumer serializes its partitions; the row lock in
Postgres is what keeps them correct.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from celery.utils.saferepr import saferepr

from config.errors import InvalidJobError

# Fan-out and ad-hoc jobs: short, and what latency depends on.
CONTROL = "control"
# Sweep, retention, purge, audit, what cleans up storage: seconds each, so they must not stand in the way of fan-out.
MAINTENANCE = "maintenance"

_SHARD_PREFIX = "materialize."


def shard_queue(shard: int) -> str:
    """Queue of a shard; only `tasks.materialize` lives there."""
    return f"{_SHARD_PREFIX}{shard}"


def shard_of_queue(queue: str) -> int | None:
    """Shard a queue belongs to; None for the other queues."""
    number = queue.removeprefix(_SHARD_PREFIX)
    return int(number) if number != queue and number.isdecimal() else None


def all_queues(shards: int) -> list[str]:
    """Every queue, shards first."""
    return [*(shard_queue(shard) for shard in range(shards)), CONTROL, MAINTENANCE]


MATERIALIZE = "tasks.materialize"
# Postgres' integer ends here.
_NO_ID = 2**31
_MAINTENANCE = {f"tasks.{name}" for name in ("sweep", "retain", "purge", "audit", "collect", "reconcile")}


def shard_of(partition_id: int, shards: int) -> int:
    """Shard of a partition: the same in every process and every release."""
    return partition_id % shards


def partition_ids_of(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> list[int]:
    """Partition ids in the arguments of a materialize task; InvalidJobError for anything but ids."""
    ids = (kwargs or {}).get("partition_ids", args[0] if args else None)
    if not isinstance(ids, list | tuple) or not ids or not all(type(i) is int and 0 < i < _NO_ID for i in ids):
        raise InvalidJobError(
            f"{MATERIALIZE} takes partition_ids, a list of at least one positive integer, not {saferepr(ids, 100)}. "
            f"By name, use tasks.materialize_topic(topic) or tasks.materialize_partition(topic, partition)."
        )
    return list(ids)


def route(
    shards: int, name: str, args: Any, kwargs: Any, _options: Mapping[str, Any], **_: Any
) -> dict[str, str] | None:
    """Queue for a task of ours; None for others. With `shards` filled in, an entry of Celery's `task_routes`."""
    if not name.startswith("tasks."):
        return None
    queue = MAINTENANCE if name in _MAINTENANCE else CONTROL
    if name == MATERIALIZE:
        ids = partition_ids_of(args, kwargs)
        found = {shard_of(i, shards) for i in ids}
        if len(found) > 1:
            raise InvalidJobError(
                f"{MATERIALIZE}: partition ids {ids[:10]} belong to {len(found)} shards. One task serves one: "
                f"pass them apart, or use tasks.materialize_topic(topic)."
            )
        queue = shard_queue(found.pop())
    return {"queue": queue, "routing_key": queue}
