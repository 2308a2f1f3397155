"""Tokens for partitions that wait in a queue, so that they are not queued again.

A hint like everything in Redis: a lost token means a task too many, and one that outlived its task expires. Set before
a task is published, dropped when the task starts, and before it reads: a commit it does not see is queued anew.
"""

import logging
from collections.abc import Iterable, Sequence

from redis import Redis, RedisError

log = logging.getLogger(__name__)


def _key(partition_id: int) -> str:
    return f"tidemark:queued:{partition_id}"


class QueuedTokens:
    """Tokens in `redis`; without one every partition counts as not queued."""

    def __init__(self, redis: "Redis | None", *, seconds: float) -> None:
        self._redis = redis
        self._milliseconds = round(seconds * 1000)

    def acquire(self, partition_ids: Sequence[int]) -> list[int]:
        """Mark partitions as queued; returns those that were not."""
        if self._redis is None or not partition_ids:
            return list(partition_ids)
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                for partition_id in partition_ids:
                    pipeline.set(_key(partition_id), 1, nx=True, px=self._milliseconds)
                answers = pipeline.execute()
        except RedisError as error:
            log.warning("queued-tokens are away, queueing without", extra={"error": str(error)})
            return list(partition_ids)
        return [partition_id for partition_id, was_free in zip(partition_ids, answers, strict=True) if was_free]

    def release(self, partition_ids: Iterable[int]) -> None:
        """Let partitions be queued again."""
        keys = [_key(partition_id) for partition_id in partition_ids]
        if self._redis is None or not keys:
            return
        try:
            self._redis.delete(*keys)
        except RedisError as error:
            log.warning("queued-tokens are away, they expire later", extra={"error": str(error)})
