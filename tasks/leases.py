"""Identical workers share the shards out among themselves.

A worker started without `-Q` consumes `control` and `maintenance`, and its share of the shards' queues. All workers
compute the same shares from the entries of those that live (`tasks.hints`), so there is nothing to hand over. The
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
from collections.abc import Mapping
from hashlib import blake2b
from threading import Event, Thread
from time import monotonic
from typing import Any

from celery import bootsteps
from celery.utils.log import get_logger

from config.heartbeat import INTERVAL, Heartbeat
from config.queues import shard_of_queue, shard_queue
from tasks.app import TidemarkApp
from tasks.hints import RENEW_SECONDS, Membership, Program
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
        ranked = ((blake2b(f"{m} {shard}".encode(), digest_size=8).digest(), m) for m in room if room[m])
        _, owners[shard] = min(ranked)
        room[owners[shard]] -= 1
    return owners


class ShardLeases(bootsteps.StartStopStep):
    """The consumer's step: renews the worker's entry, and keeps the consumed queues in line with its share."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        consumer.shard_leases = self
        app: TidemarkApp = consumer.app
        self._settings = app.settings
        self._leases: bool = consumer.controller.leases_shards
        # Static workers consume what they were told to.
        queues = app.amqp.queues.consume_from
        self._consumed = frozenset(shard for shard in map(shard_of_queue, queues) if shard is not None)
        self._wanted: frozenset[int] = frozenset()
        self._members: dict[str, int] = {}
        self._answered = self._loop_seen = monotonic()
        self._timers: list[Any] = []
        self._ended = Event()
        self._thread = Thread(target=self._run, name="shard-leases", daemon=True)
        self._membership = app.once(Membership)
        slots = consumer.controller.concurrency or 1
        self._membership.enter(consumer.hostname, program="worker", pid=os.getpid(), slots=slots, leases=self._leases)

    def start(self, consumer: Any) -> None:
        """Also after a lost connection: the consumer has its queues again by then."""
        heartbeat: Heartbeat = consumer.controller.heartbeat
        heartbeat.resume()
        self._loop_seen = monotonic()
        if self._thread.ident is None:
            self._thread.start()
        self._timers = [
            consumer.timer.call_repeatedly(INTERVAL, heartbeat.tick),
            consumer.timer.call_repeatedly(_RECONCILE_SECONDS, self._reconcile, (consumer,)),
        ]

    def stop(self, consumer: Any) -> None:
        """The connection is lost or the worker stops; the share stays until `close`."""
        if self._timers:
            consumer.controller.heartbeat.wait()
        while self._timers:
            self._timers.pop().cancel()

    def close(self, _consumer: Any) -> None:
        """The worker stops: the others may have all shards; tasks that run are finished, no other is taken."""
        if not self._ended.is_set():
            self._ended.set()
            if self._thread.ident is not None:
                self._thread.join(RENEW_SECONDS)
            self._membership.leave()

    def shutdown(self, consumer: Any) -> None:
        self.stop(consumer)
        self.close(consumer)

    def report(self) -> dict[str, Any]:
        """For `inspect shards`."""
        shards = ranges(sorted(self._consumed))
        if not self._leases:
            return {"leasing": False, "shards": shards}
        away = monotonic() - self._answered - 2 * RENEW_SECONDS
        store = f"away for {away:.0f} s" if away > 0 else "ok"
        return {"leasing": True, "shards": shards, "workers": len(self._members), "store": store}

    def _reconcile(self, consumer: Any) -> None:
        """Act on what the thread learned; runs in the event loop."""
        self._loop_seen = monotonic()
        if not self._leases or consumer.task_consumer is None:
            return
        wanted, consumed = self._wanted, self._consumed
        for shard in sorted(consumed - wanted):
            consumer.cancel_task_queue(shard_queue(shard))
        for shard in sorted(wanted - consumed):
            consumer.add_task_queue(shard_queue(shard))
        if wanted != consumed:
            self._consumed = wanted
            log.info("consuming shards %s (%s workers share)", ranges(sorted(wanted)) or "none", len(self._members))

    # --- The thread

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._look()
            except Exception:
                log.exception("sharing the shards failed; the next look tries again")
            self._ended.wait(RENEW_SECONDS)

    def _look(self) -> None:
        lease = self._settings.lease_seconds
        silence = self._settings.hard_time_limit + lease
        if monotonic() - self._loop_seen > silence:
            if self._members:
                log.error("the event loop has been silent for %.0f s: others may have its shards", silence)
                self._members = {}
            return
        programs = self._membership.renew(consumes=tuple(sorted(self._consumed)))
        if not self._leases:
            return
        if programs is None:
            if not self._wanted and monotonic() - self._answered > lease:
                log.warning("Redis does not say who else is there: taking all shards")
                self._wanted = frozenset(range(self._settings.shards))
            return
        self._answered = monotonic()
        members = self._sharing(programs)
        if members == self._members or not self._wanted:
            owners = assign(self._settings.shards, members)
            self._wanted = frozenset(shard for shard, owner in owners.items() if owner == self._membership.id)
        self._members = members

    def _sharing(self, programs: Mapping[str, Program]) -> dict[str, int]:
        """Slots of the living workers that share with this one, the oldest first."""
        alive = programs[self._membership.id].seen - self._settings.lease_seconds + 2 * RENEW_SECONDS
        living = [
            (entry.since, member, max(1, entry.slots))
            for member, entry in programs.items()
            if entry.leases and entry.shards == self._settings.shards and entry.seen > alive
        ]
        return {member: slots for _, member, slots in sorted(living)}
