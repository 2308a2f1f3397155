"""Materializes a task's partitions, one transaction after the other, until nothing is left or the task's time is up.

One loop. Who wants to know what happens in it (metrics, a comparison of strategies, the log) is an observer.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial, reduce
from random import choices, randrange
from time import monotonic, time
from typing import Any

import psycopg

from config.errors import TidemarkError, TransientDatabaseError
from config.queues import partition_ids_of, shard_of
from config.settings import STRATEGIES, Strategy
from db.materialize import RUN_BYTES, MaterializationMetrics, ages_of_run, materialize
from db.translate import TRANSIENT, would_meet_all
from tasks.app import TidemarkApp
from tasks.batching import Controller, make_controller
from tasks.compare import DrainComparison, Observer, Side, split
from tasks.dispatch import hand_over
from tasks.hints import Hints, QueuedTokens, publish_moves
from tasks.metrics import OTHER, SEVERAL, STUCK_KEY, WorkerMetrics
from tasks.names import PartitionNames
from tasks.retries import with_retries

log = logging.getLogger(__name__)

# That many fail and none works: the fault is not the partitions'.
_HOPELESS = 5
# What is kept of partitions that are stuck: how many of a task, and how much of the reason.
_STUCK = 20
_WHY = 300
_AGES_SECONDS = 1.0
_KINDS = frozenset(
    {"OperationalError", "InterfaceError"}
    | {kind.__name__ for kind in TRANSIENT}
    | {kind.__name__ for kind in TidemarkError.__subclasses__()}
)


def controllers(app: TidemarkApp) -> Mapping[Strategy, Controller]:
    """One for each strategy: they differ in speed, so in what fits into a time. For `app.once`."""
    return {strategy: make_controller(app.settings) for strategy in STRATEGIES}


def serve(app: TidemarkApp, partition_ids: Sequence[int]) -> dict[str, Any]:
    """A task: materialize partitions of one shard, hand over what is left; returns MaterializationMetrics as a dict.

    Raises InvalidJobError for what are no partition ids.
    """
    ids = partition_ids_of((partition_ids,), None)
    if len({shard_of(i, app.settings.shards) for i in ids}) > 1:
        # Published by a program with another number of shards; they are queued by their shards of now.
        hand_over(app, ids, queued=True)
        return MaterializationMetrics().as_dict()
    # Before anything is read: a commit this task does not see must be queued again.
    app.once(QueuedTokens).release(ids)
    sides = drain(app, ids)
    total = together(sides)
    hand_over(app, total.backlog_partition_ids)
    return total.as_dict() | ({"sides": [side.as_dict() for side in sides]} if len(sides) > 1 else {})


def drain(app: TidemarkApp, partition_ids: Sequence[int]) -> list[MaterializationMetrics]:
    """Materialize; returns what was done and what is left, for each side where a candidate strategy is tried."""
    until = monotonic() + app.settings.task_seconds
    sides = split(partition_ids, app.settings)
    done = []
    for number, side in enumerate(sides):
        now = monotonic()
        # Time a side does not use is the next one's.
        share = max(0.0, until - now) / (len(sides) - number)
        done.append(_Side(app, side, now + share).drain())
    total = together(done)
    for observer in app.once(observers):
        observer.finished(partition_ids, total)
    return done


def together(sides: Sequence[MaterializationMetrics]) -> MaterializationMetrics:
    return reduce(MaterializationMetrics.beside, sides)


class _Side:
    """One side of a task.

    A partition that cannot be placed, or that somebody else has locked, holds up none of the others: a group that
    fails is halved until the one that makes it fail is alone, and what is locked is passed over, and waited for once
    and briefly at the end.
    """

    def __init__(self, app: TidemarkApp, side: Side, until: float) -> None:
        self._app = app
        self._until = until
        self._side = side
        self._observers = app.once(observers)
        self._controller = app.once(controllers)[side.strategy]
        self._total = MaterializationMetrics(strategy=side.strategy)
        # With each group, whether it had more than an earlier transaction took.
        self._groups = deque([(side.partition_ids, False)])
        self._busy: list[int] = []

    def drain(self) -> MaterializationMetrics:
        """Go on until nothing is left or it is time to hand over: what was done, and what is left."""
        while self._groups and (self._total.transactions == 0 or monotonic() < self._until):
            ids, again = self._groups.popleft()
            self._take(ids, again=again, wait=False)
        if self._busy:
            self._take(self._busy, again=False, wait=True)
        return replace(self._total, backlog_partition_ids=tuple(i for ids, _ in self._groups for i in ids))

    def _take(self, ids: list[int], *, again: bool, wait: bool) -> None:
        work = partial(self._transaction, ids, again=again, wait=wait)
        settings = self._app.settings
        try:
            done = with_retries(settings, work, until=self._until, on_error=self._failed, retry=would_meet_all)
        except TransientDatabaseError:
            # Its attempts were counted one by one.
            raise
        except Exception as error:
            self._failed(error)
            if would_meet_all(error):
                raise
            stuck = self._total.stuck_partition_ids
            if len(ids) > 1 and not wait:
                half = len(ids) // 2
                self._groups.extendleft([(ids[half:], again), (ids[:half], again)])
            elif self._total.transactions == 0 and (not self._groups or len(stuck) >= _HOPELESS):
                # Nothing worked, and nothing is left or enough has failed.
                raise
            else:
                for observer in self._observers:
                    observer.stuck(ids, error)
                self._total = replace(self._total, stuck_partition_ids=(*stuck, *ids))
        else:
            self._busy += done.busy_partition_ids
            self._total += done
            if done.backlog_partition_ids:
                self._groups.append((list(done.backlog_partition_ids), True))

    def _transaction(self, ids: list[int], *, again: bool, wait: bool) -> MaterializationMetrics:
        # Planned for each attempt: the controller has heard of the one before.
        plan = self._controller.plan(ids, again=again)
        with self._app.database.connection() as conn:
            self._app.once(PartitionNames).learn(conn, plan.partition_ids)
            limit, strategy = plan.events_per_partition, self._side.strategy
            done = materialize(conn, plan.partition_ids, events_per_partition=limit, strategy=strategy, wait=wait)
        self._controller.done(done)
        for observer in self._observers:
            observer.transaction(self._side, done)
        # First what it began: `complete` goes on with one partition to its end.
        taken = set(plan.partition_ids)
        rest = tuple(i for i in ids if i not in taken)
        return replace(done, backlog_partition_ids=done.backlog_partition_ids + rest)

    def _failed(self, error: BaseException) -> None:
        self._total += MaterializationMetrics(errors=1)
        self._controller.failed()
        for observer in self._observers:
            observer.failed(self._side, error)


def observers(app: TidemarkApp) -> tuple[Observer, ...]:
    """Everybody who wants to know what a task's partitions go through; for `app.once`."""
    return DrainMoves(app), DrainMetrics(app), DrainComparison(app), DrainLog(app)


class DrainMoves(Observer):
    """Tells whoever waits for offsets which partitions have got some."""

    def __init__(self, app: TidemarkApp) -> None:
        self._hints = app.once(Hints)

    def transaction(self, side: Side, done: MaterializationMetrics) -> None:  # noqa: ARG002 - an observer's
        if moved := [m.partition_id for m in done.moved]:
            self._hints.ask(lambda redis: publish_moves(redis, moved), 0)


class DrainMetrics(Observer):
    """Counts what a drain does: one of its observers."""

    def __init__(self, app: TidemarkApp) -> None:
        self._app = app
        self._metrics = app.once(WorkerMetrics)
        self._names = app.once(PartitionNames)
        self._ages_due = 0.0

    def transaction(self, side: Side, done: MaterializationMetrics) -> None:
        """Count what was placed for each topic, and the transaction's time for all of them together."""
        add = self._metrics.add
        ids = [m.partition_id for m in done.moved] or side.partition_ids
        topic, *others = {self._names.topic(i) or OTHER for i in ids}
        labels = (SEVERAL if others else topic, done.strategy)
        self._metrics.observe("materialize_duration_seconds", done.processing_time_ms / 1000, *labels)
        self._metrics.observe("materialize_lock_wait_seconds", done.lock_wait_time_ms / 1000, *labels)
        add("materialize_batch_events", *labels, amount=done.batch_events)
        for moved in done.moved:
            own = (self._names.topic(moved.partition_id) or OTHER, done.strategy)
            add("materialize_events", *own, amount=moved.events)
            add("materialize_records", *own, amount=moved.records)
            add("materialize_log_bytes", *own, amount=moved.log_bytes)
            add("materialize_transaction_bytes", *own, amount=moved.runs * RUN_BYTES)
        add("materialize_attempts")
        if not done.moved or monotonic() < self._ages_due:
            return
        self._ages_due = monotonic() + _AGES_SECONDS
        # Any of the new runs, and each event with the same chance: the newest ones alone have waited least.
        (chosen,) = choices(done.moved, [m.events for m in done.moved])  # noqa: S311 - a sample
        topic = self._names.topic(chosen.partition_id) or OTHER
        # A database that fails now fails in the next transaction, too, which reports it.
        with suppress(psycopg.Error, TidemarkError), self._app.database.connection() as conn:
            for seconds in ages_of_run(conn, chosen.partition_id, randrange(chosen.runs)):  # noqa: S311 - a sample
                self._metrics.observe("commit_to_offset_seconds", max(seconds, 0.0), topic)

    def failed(self, side: Side, error: BaseException) -> None:  # noqa: ARG002 - an observer's
        kind = type(error).__name__
        self._metrics.add("materialize_attempts")
        self._metrics.add("materialize_errors", kind if kind in _KINDS else "other")

    def stuck(self, partition_ids: Sequence[int], error: BaseException) -> None:
        self._metrics.add("materialize_stuck", amount=len(partition_ids))
        why = f"{time():.0f} {type(error).__name__}: {str(error).strip()}"[:_WHY]
        self._metrics.keep({self._names.describe([i]): why for i in partition_ids[:_STUCK]}, STUCK_KEY)


class DrainLog(Observer):
    """Logs what a task did, for those who have to find out why something lags."""

    def __init__(self, app: TidemarkApp) -> None:
        self._shards = app.settings.shards
        self._names = app.once(PartitionNames)

    # A transaction that fails is said by `with_retries`, or as stuck, or the task fails with it.

    def stuck(self, partition_ids: Sequence[int], error: BaseException) -> None:
        fields = {"partitions": self._names.describe(partition_ids), "next": "each sweep tries again"}
        fields["error"] = f"{type(error).__name__}: {str(error).strip()}"
        log.error("partitions cannot be materialized", extra=fields)

    def finished(self, partition_ids: Sequence[int], total: MaterializationMetrics) -> None:
        if total.events_processed:
            fields = {
                "shard": shard_of(partition_ids[0], self._shards),
                "partitions": self._names.describe(partition_ids),
                "events": total.events_processed,
                "records": total.records,
                "ms": round(total.processing_time_ms, 1),
                "lock_wait_ms": round(total.lock_wait_time_ms, 1),
                "backlog_partitions": len(total.backlog_partition_ids),
                "stuck_partitions": len(total.stuck_partition_ids),
                "errors": total.errors,
                "strategy": total.strategy,
                "batch_events": total.batch_events,
            }
            log.info("materialized", extra=fields)
