"""How many events a transaction takes: one controller per strategy and worker process, asked before each transaction.

- `fixed`: the same number of each partition, always.
- `collect`: the same; the collecting is done where wake-ups are published, see `tasks.dispatch.publish`.
- `complete`: what the partitions have, whole; one with more than fits is then taken alone, to its end.
- `adaptive`: as many as fit into a target time. Doubles at most on a deep backlog, halves at every failed attempt and
  wherever others made it wait, and then keeps still for a while.

A transaction takes at most `events_max` events of all its partitions together (`fixed` and `collect`: that many of
each), and at least one of each, for a partition that gets none would never be done. Controllers know no server: they
hear of times and counts. Threads of a process may share one: its state is one number and one count, and a lost update
is one step not taken.
"""

from collections.abc import Sequence
from typing import NamedTuple

from config.settings import Settings
from db.materialize import MaterializationMetrics

# Within this factor of the target time nothing is changed: two transactions alike differ by as much.
_DEAD_BAND = 1.2
# The most that one transaction says about the next one.
_STEP = 2.0
# Waiting for locks longer than this share of the target is trouble.
_WAIT_SHARE = 0.25
# Transactions without growth after trouble, or the next one would run into it again.
_CALM = 8


class Plan(NamedTuple):
    """The next transaction: these partitions, and at most so many events of each."""

    partition_ids: tuple[int, ...]
    events_per_partition: int


class Controller:
    """Plans one transaction after the other, and hears how each went. This one always takes as many events of each."""

    def __init__(self, events: int) -> None:
        self.events = events

    def plan(self, left: Sequence[int], *, again: bool) -> Plan:  # noqa: ARG002 - for others
        """What to take of the partitions that are left; `again`: those had more than an earlier transaction took."""
        return Plan(tuple(left), self.events)

    def done(self, done: MaterializationMetrics) -> None:
        """Hear of a transaction that committed."""

    def failed(self) -> None:
        """Hear of an attempt that failed."""


class Complete(Controller):
    """All partitions at first; those with more than their share of the events alone, each to its end."""

    def plan(self, left: Sequence[int], *, again: bool) -> Plan:
        taken = tuple(left[:1] if again else left)
        return Plan(taken, max(1, self.events // len(taken)))


class Adaptive(Controller):
    """Holds `target` seconds a transaction, lock waits aside, within `events_min` and `events_max` events."""

    def __init__(self, *, target: float, start: int, events_min: int, events_max: int) -> None:
        self._target = target
        self._min = events_min
        self._max = events_max
        self._calm_in = 0
        super().__init__(min(max(start, events_min), events_max))

    def plan(self, left: Sequence[int], *, again: bool) -> Plan:  # noqa: ARG002 - as the others
        return Plan(tuple(left), max(1, self.events // len(left)))

    def done(self, done: MaterializationMetrics) -> None:
        """Shrink after a lock wait, else steer towards the target."""
        wait = done.lock_wait_time_ms / 1000
        if wait > _WAIT_SHARE * self._target:
            self.failed()
            return
        worked = max(done.processing_time_ms / 1000 - wait, 1e-6)
        if worked > self._target * _DEAD_BAND:
            # What it did take says more than what it might have taken.
            fitting = int(done.events_processed * self._target / worked)
            self._set(min(self.events, max(fitting, int(self.events / _STEP))))
        elif self._calm_in > 0:
            self._calm_in -= 1
        # A thin group with one deep partition took few events at the limit it had: no sign that more would fit.
        elif (
            done.backlog_partition_ids
            and worked * _DEAD_BAND < self._target
            and 2 * done.events_processed >= self.events
        ):
            self._set(int(self.events * min(_STEP, self._target / worked)) + 1)

    def failed(self) -> None:
        """Shrink: a deadlock or a timeout is less likely for less."""
        self._set(int(self.events / _STEP))
        self._calm_in = _CALM

    def _set(self, events: int) -> None:
        self.events = min(max(events, self._min), self._max)


def make_controller(settings: Settings) -> Controller:
    if settings.batching == "adaptive":
        return Adaptive(
            target=settings.batch_seconds,
            # A task's worth: a group of thin partitions would be taken in slices.
            start=settings.events_per_task,
            events_min=settings.batch_events_min,
            events_max=settings.batch_events_max,
        )
    if settings.batching == "complete":
        return Complete(settings.batch_events_max)
    return Controller(settings.events_per_partition)
