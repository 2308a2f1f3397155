"""Redis, for what may as well be missing: tokens, moves, metrics, leases, traces. Truth is in Postgres (invariant 8).

Whoever asks goes on without an answer. A Redis that hangs is the worst case: each question would wait for its
time-out. So time-outs are short, and after a failure nothing is asked for some seconds: while Redis is away a task
loses half a second now and then, and no more.

Tokens are for partitions that wait in a queue, so that they are not queued again. A lost token means a task too many,
and one that outlived its task expires. Set before a task is published, dropped when the task starts, and before it
reads: a commit it does not see is queued again. A queue that was purged leaves its tokens. So a token that is some
seconds old counts for nothing where its shard's queue is empty. It may belong to a task that a worker holds and has
not begun; then one task is queued too many.

What a committing thread must not wait for, a thread does: wake-ups, and traces. What cannot be done is dropped, and
fan-out finds the commits. A broker that hangs costs this thread seconds; meanwhile commits go on, and beyond a limit
their wake-ups are dropped. When the process ends, what waits is done first.

Which programs live: each worker and beat has an entry in one hash, which it renews each second. Time is Redis' own: no
program compares its clock with another's.
"""

import json
import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from threading import BoundedSemaphore
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import uuid4

from redis import RedisError

from config.queues import shard_queue
from tasks.app import TidemarkApp

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_PAUSE_SECONDS = 5.0


class Hints:
    """Asks the app's Redis. Usable by several threads; a question that is under way is nobody else's affair."""

    def __init__(self, app: TidemarkApp) -> None:
        self._redis = app.redis
        self._silent_until = 0.0
        self._away = False

    def ask(self, question: "Callable[[Redis], _Answer]", otherwise: _Answer) -> _Answer:
        """What `question` returns; `otherwise` without a Redis, where it does not answer, and for some seconds then."""
        if self._redis is None or monotonic() < self._silent_until:
            return otherwise
        # Without a lock, which a fork could leave held for ever: two threads at once may log twice.
        try:
            answer = question(self._redis)
        except RedisError as error:
            self._silent_until = monotonic() + _PAUSE_SECONDS
            if not self._away:
                fields = {"error": f"{type(error).__name__}: {error}", "next_question_seconds": _PAUSE_SECONDS}
                log.warning("Redis does not answer: going on without its hints", extra=fields)
            self._away = True
            return otherwise
        if self._away:
            log.warning("Redis answers again")
        self._away = False
        return answer


# --- Tokens

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


_key = "tidemark:queued:{}".format


class QueuedTokens:
    """The tokens of one app; without a Redis every partition counts as not queued."""

    def __init__(self, app: TidemarkApp) -> None:
        self._hints = app.once(Hints)
        settings = app.settings
        # Another Redis than the broker's knows nothing of the queues.
        shards = settings.shards if app.redis_url == app.broker_url else 0
        queued, fresh = settings.queued_seconds, max(_FRESH_SECONDS, settings.task_seconds)
        self._arguments = (round(queued * 1000), shards, shard_queue(0).removesuffix("0"), round(fresh * 1000))

    def acquire(self, partition_ids: Sequence[int]) -> list[int]:
        """Mark partitions as queued; returns those that were not, all where Redis does not answer."""

        def set_free(redis: "Redis") -> list[int]:
            script = redis.register_script(_SET_FREE)
            free: list[int] = []
            for start in range(0, len(partition_ids), _CHUNK):
                chunk = partition_ids[start : start + _CHUNK]
                free += [chunk[index - 1] for index in script(keys=list(map(_key, chunk)), args=self._arguments)]
            return free

        return self._hints.ask(set_free, list(partition_ids)) if partition_ids else []

    def release(self, partition_ids: Iterable[int]) -> None:
        if keys := list(map(_key, partition_ids)):
            self._hints.ask(lambda redis: redis.delete(*keys), None)


# --- Moves

_MOVED = "tidemark:moved"


def publish_moves(redis: "Redis", partition_ids: Sequence[int]) -> int:
    """Tell everybody who listens that these partitions have got new offsets; returns how many do.

    A list of partition ids as JSON. A message that is lost costs a listener one poll, and nothing else.
    """
    return int(redis.publish(_MOVED, json.dumps(partition_ids)))


class Moves:
    """Listens for partitions that got new offsets, for `db.receipts` and `db.fetch`. Close it when done."""

    def __init__(self, app: TidemarkApp) -> None:
        redis: Any = app.redis
        self._pubsub = None if redis is None else redis.pubsub(ignore_subscribe_messages=True)
        self._subscribed = False
        self._silent_until = 0.0

    def wait(self, seconds: float) -> set[int]:
        """Partitions that moved since the last call; waits so long for the first, and returns none without a Redis."""
        until = monotonic() + seconds
        moved: set[int] = set()
        if self._pubsub is not None and monotonic() >= self._silent_until:
            try:
                if not self._subscribed:
                    self._pubsub.subscribe(_MOVED)
                    self._subscribed = True
                message = self._pubsub.get_message(timeout=seconds)
                while message is not None or not (moved or monotonic() >= until):
                    if message is not None:
                        moved.update(json.loads(message["data"]))
                    message = self._pubsub.get_message(timeout=0 if moved else max(0.0, until - monotonic()))
            except RedisError as error:
                self._silent_until = monotonic() + _PAUSE_SECONDS
                said = f"{type(error).__name__}: {error}"
                log.warning("Redis does not answer: polling for offsets", extra={"error": said})
        if not moved:
            sleep(max(0.0, until - monotonic()))
        return moved

    def close(self) -> None:
        if self._pubsub is not None:
            self._pubsub.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- What nobody waits for

# More wake-ups than that do not wait: they are dropped.
_WAITING = 1_000


class Background:
    """The thread of one process; a forked child gets its own."""

    def __init__(self, _app: object = None) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._pid = os.getpid()
        self._room = BoundedSemaphore(_WAITING)
        self._silent_until = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tidemark-background")

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Do it soon, or drop it. Never waits, never raises."""
        if self._pid != os.getpid():
            self._start_over()
        if monotonic() >= self._silent_until and self._room.acquire(blocking=False):
            with suppress(RuntimeError):  # the interpreter is ending
                self._thread.submit(self._do, work, arguments)

    def _do(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            if monotonic() >= self._silent_until:
                work(*arguments)
        except Exception as error:  # noqa: BLE001 - the commit stands; nothing that happens here may harm anybody
            self._silent_until = monotonic() + _PAUSE_SECONDS
            log.warning(
                "waking failed: for some seconds fan-out alone finds commits",
                extra={"error": f"{type(error).__name__}: {error}", "seconds": _PAUSE_SECONDS},
            )
        finally:
            self._room.release()


# --- Programs

KEY = "tidemark:programs"
RENEW_SECONDS = 1.0
# So long a program is shown that says nothing any more.
GONE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A worker or beat as it describes itself; times in seconds since the epoch, by Redis' clock."""

    program: str
    name: str
    host: str
    pid: int
    shards: int
    # Of a worker: how many tasks it runs at once, whether it takes a share of the shards, and those it consumes.
    slots: int = 0
    leases: bool = False
    consumes: Sequence[int] = ()
    since: float = 0.0
    seen: float = 0.0


class Membership:
    """This process's entry, and everybody's."""

    def __init__(self, app: TidemarkApp) -> None:
        self._hints = app.once(Hints)
        self._shards = app.settings.shards
        self._facts: dict[str, Any] = {}
        self.id = ""

    def enter(self, name: str, **facts: Any) -> None:
        """Begin; the next renewal tells the others."""
        # Names may be given twice; what they stand for counts twice, too.
        self.id = f"{name}/{uuid4().hex[:8]}"
        self._facts = {"name": name, "host": socket.gethostname(), "shards": self._shards, **facts}

    def renew(self, **facts: Any) -> Mapping[str, Program] | None:
        """Say that this process lives, and what is new; returns all who live, None where Redis does not answer."""
        if not self._facts:
            return None
        self._facts |= facts
        return self._hints.ask(self._exchange, None)

    def leave(self) -> None:
        """End; the others need not wait."""
        if self._facts:
            self._hints.ask(lambda redis: redis.hdel(KEY, self.id), 0)
            self._facts = {}

    def _exchange(self, redis: "Redis") -> Mapping[str, Program]:
        now = redis_time(redis)
        redis.hset(KEY, self.id, json.dumps({"since": now, **self._facts, "seen": now}))
        self._facts.setdefault("since", now)
        return read_programs(redis, now)


def redis_time(redis: "Redis") -> float:
    """Seconds since the epoch, by Redis' clock."""
    seconds, microseconds = redis.time()
    return float(seconds) + float(microseconds) / 1e6


def read_programs(redis: "Redis", now: float) -> dict[str, Program]:
    """Who lives, by the entry's id; another release's are left out, and those gone for `GONE_SECONDS` forgotten."""
    found: Any = redis.hgetall(KEY)
    entries = {}
    for name, text in found.items():
        with suppress(ValueError, TypeError):
            entries[name] = Program(**json.loads(text))
    if dead := [name for name, entry in entries.items() if entry.seen < now - GONE_SECONDS]:
        redis.hdel(KEY, *dead)
    return {name: entry for name, entry in entries.items() if name not in dead}
