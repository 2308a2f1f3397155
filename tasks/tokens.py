"""Tokens for partitions that wait in a queue, so that they are not queued again.

A hint like everything in Redis: a lost token means a task too many, and one that outlived its task expires. Set before
a task is published, dropped when the task starts, and before it reads: a commit it does not see is queued anew.
"""

import logging
from collections.abc import Iterable, Sequence

from redis import Redis, RedisError

log = logging.getLogger(__name__)

# One command for many partitions: a command each costs this process more than finding them costs the database. Returns
# the indexes of those that had no token, counted from 1.
_SET_FREE = """
local free = {}
for i, key in ipairs(KEYS) do
    if redis.call('set', key, '1', 'nx', 'px', ARGV[1]) then
        free[#free + 1] = i
    end
end
return free
"""
# Redis does nothing else while a script runs: under a millisecond of it.
_CHUNK = 1_000


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
        set_free = self._redis.register_script(_SET_FREE)
        free: list[int] = []
        try:
            for start in range(0, len(partition_ids), _CHUNK):
                chunk = partition_ids[start : start + _CHUNK]
                indexes = set_free(keys=[_key(partition_id) for partition_id in chunk], args=[self._milliseconds])
                free.extend(chunk[index - 1] for index in indexes)
        except RedisError as error:
            log.warning("queued-tokens are away, queueing without", extra={"error": str(error)})
            return list(partition_ids)
        return free

    def release(self, partition_ids: Iterable[int]) -> None:
        """Let partitions be queued again."""
        keys = [_key(partition_id) for partition_id in partition_ids]
        if self._redis is None or not keys:
            return
        try:
            self._redis.delete(*keys)
        except RedisError as error:
            log.warning("queued-tokens are away, they expire later", extra={"error": str(error)})
