"""Identical workers share the shards out among themselves.

A worker started without `-Q` consumes `control` and `maintenance`, and those shard queues it holds a lease for. The row
lock in Postgres is what keeps a partition correct; a lease only spares workers from waiting for each other at it. So
every doubt is decided for consuming: two consumers on a shard are slower, none is a standstill.

Invariants
1. A shard has at most one owner in Redis, and an owner is a living member; both change in one script at once.
2. A worker owns at most its share: shards divided by members, the remainder to those who joined first. The shares of
   all members add up to the number of shards, so nobody is short of one that another has too many of. Who joins last
   has the last rank, so that a join only makes the others' shares smaller, and a leave only larger.
3. A lease is given up only after its queue was cancelled and none of its tasks is reserved or running here. What Redis
   had handed out before the cancellation took effect goes back to the queue (kombu does that).
4. Time is Redis' own. No worker compares its clock with another's.

Renewal is one thread's work, which talks to Redis and to nothing else: it goes on while a long task holds up the event
loop of a solo pool. The queues are the event loop's, which acts on what the thread last learned. The thread does not
renew for an event loop that has been silent for longer than any task may take.

What is left behind
- Killed: the membership ends after `lease_seconds` less two ticks; the others take the shards over at their next tick.
- Stopped (SIGTERM): idle shards are free at once, the others with the end of their task; membership ends with the last.
- Frozen and thawed: its leases are others' by then; the next tick says so, and it cancels the queues. A task that
  still runs meets the row lock.
- Redis away: everybody keeps what it has, and says so once; nobody can join or take over.
- Redis emptied: everybody takes what it consumes anew. Nothing else is taken for two ticks, so that the first to come
  does not take what the others are about to.
- Between a script and the event loop acting on it: a lease without a consumer for a fifth of a second.

Static workers (`-Q materialize.3`, or `-X` with a shard) take part in none of this. Beside leasing workers they are a
second consumer of their shards. With RabbitMQ all workers consume all queues, and it lets one consumer at a time have
a shard (`x-single-active-consumer`); there are no leases.

Workers with different `TIDEMARK_SHARDS` lease apart from each other, so a rolling change of it leaves no shard alone.
"""

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any
from uuid import uuid4

from celery import bootsteps, signals
from celery.utils.log import get_logger
from celery.utils.nodenames import default_nodename
from celery.worker import state
from celery.worker.control import inspect_command
from redis import Redis, RedisError

from config.celery import is_redis
from config.queues import CONTROL, MAINTENANCE, shard_of_queue, shard_queue
from config.settings import Settings
from tasks.app import TidemarkApp

log = get_logger(__name__)

_LONGEST_TICK = 1.0
_TICKS_PER_LEASE = 10
# So often the event loop acts on what the thread learned. Local work only.
_RECONCILE_SECONDS = 0.2
# A store that is younger was emptied a moment ago, and not everybody has come back.
_SETTLE_TICKS = 2

# KEYS: members (id -> living until, ms), ranks (id -> number of its joining), owners (shard -> id), born
# ARGV: id, ms to live, number of shards, may claim, ms to settle, leaving, shards to release, shards consumed
_TICK = """
local members, ranks, owners, born = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local me, ttl, shards = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local claim, settle, leaving = ARGV[4] == '1', tonumber(ARGV[5]), ARGV[6] == '1'
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', members, '-inf', now)) do
    redis.call('ZREM', members, dead)
    redis.call('ZREM', ranks, dead)
end
redis.call('SET', born, now, 'NX')
redis.call('ZADD', members, now + ttl, me)
if leaving then
    redis.call('ZREM', ranks, me)
elseif not redis.call('ZSCORE', ranks, me) then
    local last = redis.call('ZREVRANGE', ranks, 0, 0, 'WITHSCORES')
    redis.call('ZADD', ranks, (tonumber(last[2]) or 0) + 1, me)
end
local function owner(shard)
    local id = redis.call('HGET', owners, shard)
    return id and redis.call('ZSCORE', members, id) and id or nil
end
for shard in string.gmatch(ARGV[7], '%d+') do
    if redis.call('HGET', owners, shard) == me then redis.call('HDEL', owners, shard) end
end
for shard in string.gmatch(ARGV[8], '%d+') do
    if not owner(shard) then redis.call('HSET', owners, shard, me) end
end
local workers = redis.call('ZCARD', ranks)
local rank = redis.call('ZRANK', ranks, me)
local share = 0
if rank then
    share = math.floor(shards / workers)
    if rank < shards % workers then share = share + 1 end
end
local mine, held, foreign = {}, 0, {}
for shard = 0, shards - 1 do
    local id = owner(shard)
    if id == me then
        held = held + 1
    elseif id then
        foreign[shard] = true
    end
end
claim = claim and now - tonumber(redis.call('GET', born)) >= settle
for shard = 0, shards - 1 do
    if claim and held < share and not foreign[shard] and redis.call('HGET', owners, shard) ~= me then
        redis.call('HSET', owners, shard, me)
        held = held + 1
    end
    if redis.call('HGET', owners, shard) == me then mine[#mine + 1] = shard end
end
if leaving and held == 0 then redis.call('ZREM', members, me) end
for _, key in ipairs(KEYS) do redis.call('PEXPIRE', key, 20 * ttl) end
return {share, workers, mine}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What the store said last: the shards this worker owns, and how many it should."""

    owned: frozenset[int]
    share: int
    workers: int

    @property
    def wanted(self) -> frozenset[int]:
        """Shards to consume; what is owned beyond the share is to be given up."""
        return frozenset(sorted(self.owned)[: self.share])


class LeaseStore:
    """The leases in Redis, as one worker sees them."""

    def __init__(self, redis: "Redis", settings: Settings, worker: str) -> None:
        self._script = redis.register_script(_TICK)
        self._worker = worker
        self._shards = settings.shards
        prefix = f"tidemark:leases:{settings.shards}:"
        self._keys = [prefix + name for name in ("members", "ranks", "owners", "born")]
        self.tick_seconds = min(_LONGEST_TICK, settings.lease_seconds / _TICKS_PER_LEASE)
        # Whoever notices an end does so up to a tick later, and has its queue a moment after that.
        self._living = settings.lease_seconds - 2 * self.tick_seconds

    def tick(
        self,
        *,
        consumed: Iterable[int] = (),
        released: Iterable[int] = (),
        claim: bool = True,
        fresh: bool = False,
        leaving: bool = False,
    ) -> View:
        """Renew, release and claim at once. `fresh`: this worker has consumed nothing yet, so nothing can be lost."""
        settle = 0 if fresh else round(_SETTLE_TICKS * self.tick_seconds * 1000)
        arguments: list[str | int] = [
            self._worker,
            round(self._living * 1000),
            self._shards,
            int(claim and not leaving),
            settle,
            int(leaving),
            " ".join(map(str, released)),
            " ".join(map(str, consumed)),
        ]
        share, workers, owned = self._script(keys=self._keys, args=arguments)
        return View(owned=frozenset(owned), share=share, workers=workers)


class LeaseKeeper:
    """The thread that renews, and what it shares with the event loop."""

    def __init__(self, store: LeaseStore, *, silence: float) -> None:
        self._store = store
        self._silence = silence
        self._lock = Lock()
        self._wake = Event()
        self._ended = Event()
        self._thread: Thread | None = None
        self._consumed: frozenset[int] = frozenset()
        self._released: frozenset[int] = frozenset()
        self._fresh = True
        self._leaving = False
        self._loop_seen = monotonic()
        self._away_since: float | None = None
        self.view: View | None = None

    def start(self) -> None:
        """Begin to renew; at once, and then every tick."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="shard-leases", daemon=True)
            self._thread.start()

    def loop_is_alive(self, consumed: Iterable[int], released: Iterable[int]) -> None:
        """The event loop reports: what it consumes or drains, and what it has let go of since."""
        with self._lock:
            self._loop_seen = monotonic()
            self._consumed = frozenset(consumed)
            self._released |= frozenset(released)
            wake = bool(released)
        if wake:
            self._wake.set()

    def released(self) -> frozenset[int]:
        """Let go of, and the store does not know it yet."""
        with self._lock:
            return self._released

    def leave(self) -> None:
        """Hand over what is idle now, and the rest as its tasks end."""
        self._leaving = True
        self._wake.set()

    def end(self, timeout: float = 3.0) -> None:
        """Hand over everything: no task runs any more."""
        self._leaving = True
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    @property
    def away_seconds(self) -> float | None:
        """How long the store has not answered; None when it does."""
        return None if self._away_since is None else monotonic() - self._away_since

    def _run(self) -> None:
        while True:
            last = self._ended.is_set()
            self._wake.clear()
            try:
                self._tick(last=last)
            except RedisError as error:
                if self._away_since is None:
                    self._away_since = monotonic()
                    log.warning("the lease store is away (%s): keeping the shards at hand", error)
            except Exception:
                log.exception("renewing the shard leases failed; the next tick tries again")
            else:
                if self._away_since is not None:
                    log.warning("the lease store is back after %.1f s", monotonic() - self._away_since)
                    self._away_since = None
            if last:
                return
            self._wake.wait(self._store.tick_seconds)

    def _tick(self, *, last: bool) -> None:
        with self._lock:
            silent = monotonic() - self._loop_seen
            consumed, released = self._consumed, self._released
        if self._leaving:
            # The event loop is over: what is still busy is known from the requests alone.
            busy = frozenset() if last else busy_shards()
            released |= consumed - busy
            consumed &= busy
        elif silent > self._silence:
            log.error("the event loop has been silent for %.0f s: not renewing its shard leases", silent)
            return
        view = self._store.tick(
            consumed=consumed - released,
            released=released,
            # A loop that is held up by a task could not consume what is claimed for it.
            claim=silent < 1 + self._store.tick_seconds,
            fresh=self._fresh,
            leaving=self._leaving,
        )
        with self._lock:
            self._released -= released
            self.view = view
        self._fresh = False


def busy_shards() -> frozenset[int]:
    """Shards that have a task reserved or running in this worker."""
    for _ in range(10):
        try:
            requests = [*state.reserved_requests, *state.active_requests]
        except RuntimeError:  # a pool of threads changes the sets meanwhile
            continue
        queues = ((request.delivery_info or {}).get("routing_key") or "" for request in requests)
        return frozenset(shard for shard in map(shard_of_queue, queues) if shard is not None)
    return frozenset(range(10_000))  # unknown: all may be


class ShardLeases(bootsteps.StartStopStep):
    """The consumer's step: keeps the consumed queues in line with the leases."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        consumer.shard_leases = self
        app = consumer.app
        self.keeper: LeaseKeeper | None = None
        self.consumed: set[int] = set()
        self.draining: set[int] = set()
        self._timer: Any = None
        if not (isinstance(app, TidemarkApp) and app.leases_shards and app.lease_redis is not None):
            return
        app.amqp.queues.select([name for name in (CONTROL, MAINTENANCE) if name in app.amqp.queues.consume_from])
        store = LeaseStore(app.lease_redis, app.settings, f"{consumer.hostname}/{uuid4().hex[:8]}")
        self.keeper = LeaseKeeper(store, silence=app.settings.hard_time_limit + app.settings.lease_seconds)

    def start(self, consumer: Any) -> None:
        """Also after a lost connection: the consumer has its queues again by then."""
        if self.keeper is None:
            return
        self.keeper.loop_is_alive(self.consumed | self.draining, ())
        self.keeper.start()
        self._timer = consumer.timer.call_repeatedly(_RECONCILE_SECONDS, self.reconcile, (consumer,))

    def reconcile(self, consumer: Any) -> None:
        """Act on the keeper's view; runs in the event loop."""
        keeper = self.keeper
        if keeper is None:
            return
        view = keeper.view
        released: set[int] = set()
        if view is not None and consumer.task_consumer is not None:
            wanted = view.wanted - keeper.released()
            for shard in sorted(self.consumed - wanted):
                log.info("giving up shard %s (share: %s of %s workers)", shard, view.share, view.workers)
                consumer.cancel_task_queue(shard_queue(shard))
                self.consumed.discard(shard)
                self.draining.add(shard)
            for shard in sorted(wanted - self.consumed):
                log.info("taking shard %s (share: %s of %s workers)", shard, view.share, view.workers)
                consumer.add_task_queue(shard_queue(shard))
                self.consumed.add(shard)
                self.draining.discard(shard)
            released = self.draining - busy_shards()
            self.draining -= released
        keeper.loop_is_alive(self.consumed | self.draining, released)

    def stop(self, _consumer: Any) -> None:
        """The connection is lost or the worker stops; the leases stay until `close`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self, _consumer: Any) -> None:
        """The worker stops: tasks that run are finished, no other is taken."""
        if self.keeper is not None:
            self.keeper.leave()

    def shutdown(self, consumer: Any) -> None:
        """The pool has drained."""
        self.stop(consumer)
        if self.keeper is not None:
            self.keeper.end()

    def report(self, consumer: Any) -> dict[str, Any]:
        """For `inspect shards`."""
        if self.keeper is None:
            queues = consumer.app.amqp.queues.consume_from
            shards = [shard for shard in map(shard_of_queue, queues) if shard is not None]
            return {"leasing": False, "shards": sorted(shards)}
        view, away = self.keeper.view, self.keeper.away_seconds
        return {
            "leasing": True,
            "shards": sorted(self.consumed),
            "draining": sorted(self.draining),
            "share": view.share if view else None,
            "workers": view.workers if view else None,
            "store": "ok" if away is None else f"away for {away:.0f} s",
        }


@inspect_command()
def shards(state: Any, **_: Any) -> dict[str, Any]:
    """Shards this worker consumes, and whether it leases them."""
    consumer = state.consumer
    report: dict[str, Any] = consumer.shard_leases.report(consumer)
    return report


def connect(app: TidemarkApp) -> None:
    """Make workers of this app lease their shards where nobody has given them queues."""
    app.steps["consumer"].add(ShardLeases)

    @signals.celeryd_init.connect(weak=False)
    def _choose(instance: Any = None, options: Mapping[str, Any] | None = None, **_: Any) -> None:
        given = options or {}
        if getattr(instance, "app", None) is not app:
            return
        excluded = given.get("exclude_queues") or ()
        excluded = excluded.split(",") if isinstance(excluded, str) else excluded
        static = given.get("queues") or any(shard_of_queue(name) is not None for name in excluded)
        app.leases_shards = is_redis(app.broker_url) and not static
        # Any number of workers on one machine: Celery calls all of them celery@machine, and their replies collide.
        if instance.hostname == default_nodename(None):
            instance.hostname = f"worker-{os.getpid()}@{socket.gethostname()}"
