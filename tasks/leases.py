"""Identical workers share the shards out among themselves.

A worker started without `-Q` consumes `control` and `maintenance`, and its share of the shards' queues. All workers
compute the same shares from the entries of those that live (`tasks.membership`), so there is nothing to hand over. The
row lock in Postgres is what keeps a partition correct; two consumers on a shard are slower, none is a standstill. So
every doubt is decided for consuming.

Who computes from an older entry has other shares for a moment: a shard then has two consumers, or none for a second.

- A worker acts on new members when it has seen them twice in a row, so that nothing moves when Redis was emptied or
  away and all come back within a second. One that has no shard yet acts at once.
- Shares follow the workers' slots. A worker that joins or leaves moves little more than its own share: each shard goes
  to the member that comes first for it in an order of its own (rendezvous hashing) and still has room.
- Renewal is a thread's work: it goes on while a long task holds up the event loop of a solo pool. The queues are the
  event loop's, which acts on what the thread last learned. The thread does not renew for an event loop that has been
  silent for longer than any task may take.

What is left behind
- Killed: the entry counts for `lease_seconds` less two renewals; then the others take the shards over.
- Stopped (SIGTERM): its entry is gone at once. The others start on its shards while its last task ends.
- Frozen and thawed: others have its shards by then. It learns so within a second; a task that runs meets the row lock.
- Redis away: everybody keeps what it has. A worker that starts meanwhile takes all shards after `lease_seconds`.

Static workers (`-Q materialize.3`, or `-X` with a shard) take no part. Beside leasing workers they are a second
consumer of their shards. With another broker and `TIDEMARK_REDIS_URL` it is all the same; without any Redis every
worker consumes all queues, and RabbitMQ lets one consumer at a time have a shard (`x-single-active-consumer`).

Workers with different `TIDEMARK_SHARDS` share apart from each other, so a rolling change of it leaves no shard alone.
"""

import os
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from threading import Event, Thread
from time import monotonic
from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger

from config.queues import shard_of_queue, shard_queue
from tasks.app import TidemarkApp
from tasks.membership import RENEW_SECONDS, Membership, Program
from tasks.names import ranges

log = get_logger(__name__)

# So often the event loop acts on what the thread learned. Local work only.
_RECONCILE_SECONDS = 0.2


def assign(shards: int, members: Mapping[str, int]) -> dict[int, str]:
    """Which member has which shard, by the members' slots; the same for everybody who knows the same members."""
    total = sum(members.values())
    room = {member: shards * slots // total for member, slots in members.items()}
    # The remainder is for those who joined first: a joining worker does not move it.
    for member in list(members)[: shards - sum(room.values())]:
        room[member] += 1
    owners = {}
    for shard in range(shards):
        first = min((member for member in room if room[member]), key=lambda member: _rank(member, shard))
        owners[shard] = first
        room[first] -= 1
    return owners


def _rank(member: str, shard: int) -> bytes:
    return blake2b(f"{member} {shard}".encode(), digest_size=8).digest()


class Shares:
    """The thread that renews a worker's entry, and which shards it is to consume where it leases them."""

    def __init__(self, app: TidemarkApp, name: str, *, pid: int, slots: int, leases: bool) -> None:
        settings = app.settings
        self.leases = leases
        self._shards = settings.shards
        self._lease = settings.lease_seconds
        self._silence = settings.hard_time_limit + settings.lease_seconds
        self._membership = app.once(Membership)
        self._membership.enter(name, program="worker", pid=pid, slots=slots, leases=leases)
        self._ended = Event()
        self._thread = Thread(target=self._run, name="shard-leases", daemon=True)
        self._members: dict[str, int] = {}
        self._answered = self._loop_seen = monotonic()
        self.wanted: frozenset[int] = frozenset()
        self.consumed: frozenset[int] = frozenset()

    @property
    def workers(self) -> int:
        """How many share."""
        return len(self._members)

    @property
    def away_seconds(self) -> float:
        """How long Redis has not answered."""
        return max(0.0, monotonic() - self._answered - 2 * RENEW_SECONDS)

    def start(self) -> None:
        """Begin to renew; at once, and then each second."""
        if self._thread.ident is None:
            self._thread.start()

    def loop_is_alive(self, consumed: Iterable[int]) -> None:
        """Hear from the event loop which shards it consumes."""
        self._loop_seen = monotonic()
        self.consumed = frozenset(consumed)

    def leave(self) -> None:
        """Let the others have all shards."""
        if not self._ended.is_set():
            self._ended.set()
            if self._thread.ident is not None:
                self._thread.join(RENEW_SECONDS)
            self._membership.leave()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._look()
            except Exception:
                log.exception("sharing the shards failed; the next look tries again")
            self._ended.wait(RENEW_SECONDS)

    def _look(self) -> None:
        if monotonic() - self._loop_seen > self._silence:
            if self._members:
                log.error("the event loop has been silent for %.0f s: others may have its shards", self._silence)
                self._members = {}
            return
        programs = self._membership.renew(consumes=tuple(sorted(self.consumed)))
        if not self.leases:
            return
        if programs is None:
            if not self.wanted and monotonic() - self._answered > self._lease:
                log.warning("Redis does not say who else is there: taking all shards")
                self.wanted = frozenset(range(self._shards))
            return
        self._answered = monotonic()
        members = self._sharing(programs)
        if members == self._members or not self.wanted:
            owners = assign(self._shards, members)
            self.wanted = frozenset(shard for shard, owner in owners.items() if owner == self._membership.id)
        self._members = members

    def _sharing(self, programs: Mapping[str, Program]) -> dict[str, int]:
        """Slots of the living workers that share with this one, the oldest first."""
        now = programs[self._membership.id].seen
        living = [
            (entry.since, member, entry.slots)
            for member, entry in programs.items()
            if entry.leases and entry.shards == self._shards and entry.seen > now - self._lease + 2 * RENEW_SECONDS
        ]
        return {member: max(1, slots) for _, member, slots in sorted(living)}


class ShardLeases(bootsteps.StartStopStep):
    """The consumer's step: keeps the consumed queues in line with the worker's share."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        consumer.shard_leases = self
        worker = consumer.controller
        self.shares: Shares | None = None
        self._timer: Any = None
        # Static workers consume what they were told to.
        queues = consumer.app.amqp.queues.consume_from
        self._consumed = {shard for shard in map(shard_of_queue, queues) if shard is not None}
        if consumer.app.redis_url is not None:
            self.shares = Shares(
                consumer.app,
                consumer.hostname,
                pid=os.getpid(),
                slots=worker.concurrency or 1,
                leases=worker.leases_shards,
            )

    def start(self, consumer: Any) -> None:
        """Also after a lost connection: the consumer has its queues again by then."""
        if self.shares is not None:
            self.shares.loop_is_alive(self._consumed)
            self.shares.start()
            self._timer = consumer.timer.call_repeatedly(_RECONCILE_SECONDS, self.reconcile, (consumer, self.shares))

    def reconcile(self, consumer: Any, shares: Shares) -> None:
        """Act on what the thread learned; runs in the event loop."""
        shares.loop_is_alive(self._consumed)
        if not shares.leases or consumer.task_consumer is None:
            return
        wanted = shares.wanted
        given_up, taken = self._consumed - wanted, wanted - self._consumed
        for shard in sorted(given_up):
            consumer.cancel_task_queue(shard_queue(shard))
        for shard in sorted(taken):
            consumer.add_task_queue(shard_queue(shard))
        if given_up or taken:
            self._consumed = set(wanted)
            log.info("consuming shards %s (%s workers share)", ranges(sorted(wanted)) or "none", shares.workers)

    def stop(self, _consumer: Any) -> None:
        """The connection is lost or the worker stops; the share stays until `close`."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def close(self, _consumer: Any) -> None:
        """The worker stops: tasks that run are finished, no other is taken."""
        if self.shares is not None:
            self.shares.leave()

    def shutdown(self, consumer: Any) -> None:
        """The pool has drained."""
        self.stop(consumer)
        self.close(consumer)

    def report(self) -> dict[str, Any]:
        """For `inspect shards`."""
        shards = ranges(sorted(self._consumed))
        if self.shares is None or not self.shares.leases:
            return {"leasing": False, "shards": shards}
        away = self.shares.away_seconds
        return {
            "leasing": True,
            "shards": shards,
            "workers": self.shares.workers,
            "store": f"away for {away:.0f} s" if away else "ok",
        }
