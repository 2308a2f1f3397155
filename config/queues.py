"""Names of the queues. A queue's name is its routing key."""

# Fan-out and ad-hoc jobs: short, and what latency depends on.
CONTROL = "control"
# Sweep, retention, audit: seconds each, so they must not stand in the way of fan-out.
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
