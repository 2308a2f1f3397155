"""Tokens for partitions that wait in a queue, so that they are not queued again.

A hint like everything in Redis: a lost token means a task too many, and one that outlived its task expires. Set before
a task is published, dropped when the task starts, and before it reads: a commit it does not see is queued again.

A queue that was purged leaves its tokens. So a token that is some seconds old counts for nothing where its shard's
queue is empty. It may belong to a task that a worker holds and has not begun; then one task is queued too many.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from config.queues import shard_queue
from tasks.app import TidemarkApp
from tasks.hints import Hints

if TYPE_CHECKING:
    from redis import Redis

# One command for many partitions: a command each costs this process more than finding them costs the database. Returns
# the indexes of those that had no token, counted from 1. Queue by queue its length is asked for once.
_SET_FREE = """
local ttl, shards, prefix, fresh = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local free, length = {}, {}
for i, key in ipairs(KEYS) do
    local taken = not redis.call('set', key, '1', 'nx', 'px', ttl)
    if taken and shards > 0 and ttl - redis.call('pttl', key) > fresh then
        local queue = prefix .. tonumber(string.match(key, '%d+$')) % shards
        length[queue] = length[queue] or redis.call('llen', queue)
        if length[queue] == 0 then
            redis.call('set', key, '1', 'px', ttl)
            taken = false
        end
    end
    if not taken then free[#free + 1] = i end
end
return free
"""
# Redis does nothing else while a script runs: under a millisecond of it.
_CHUNK = 1_000
# So long a message may be on its way, or wait in a worker for the task before it.
_FRESH_SECONDS = 5.0


def _key(partition_id: int) -> str:
    return f"tidemark:queued:{partition_id}"


class QueuedTokens:
    """The tokens of one app; without a Redis every partition counts as not queued."""

    def __init__(self, app: TidemarkApp) -> None:
        self._hints = app.once(Hints)
        settings = app.settings
        # Another Redis than the broker's knows nothing of the queues.
        shards = settings.shards if app.redis_url == app.broker_url else 0
        fresh = max(_FRESH_SECONDS, settings.task_seconds)
        self._arguments: list[int | str] = [
            round(settings.queued_seconds * 1000),
            shards,
            shard_queue(0).removesuffix("0"),
            round(fresh * 1000),
        ]

    def acquire(self, partition_ids: Sequence[int]) -> list[int]:
        """Mark partitions as queued; returns those that were not, all where Redis does not answer."""

        def set_free(redis: "Redis") -> list[int]:
            script = redis.register_script(_SET_FREE)
            free: list[int] = []
            for start in range(0, len(partition_ids), _CHUNK):
                chunk = partition_ids[start : start + _CHUNK]
                indexes = script(keys=[_key(partition_id) for partition_id in chunk], args=self._arguments)
                free.extend(chunk[index - 1] for index in indexes)
            return free

        return self._hints.ask(set_free, list(partition_ids)) if partition_ids else []

    def release(self, partition_ids: Iterable[int]) -> None:
        """Let partitions be queued again."""
        keys = [_key(partition_id) for partition_id in partition_ids]
        if keys:
            self._hints.ask(lambda redis: redis.delete(*keys), None)
