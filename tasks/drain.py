"""Materializes a task's partitions, one transaction after the other, until nothing is left or the task's time is up.

One loop. Who wants to know what happens in it (metrics, a comparison of strategies, the log) is an observer.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from time import monotonic
from typing import Any

from config.errors import TransientDatabaseError
from config.queues import partition_ids_of, shard_of
from config.settings import STRATEGIES, Strategy
from db.materialize import MaterializationMetrics, ages_of_run, materialize
from db.translate import would_meet_all
from tasks.app import TidemarkApp
from tasks.batching import Controller, make_controller
from tasks.compare import DrainComparison
from tasks.dispatch import hand_over
from tasks.hints import QueuedTokens
from tasks.metrics import DrainMetrics, WorkerMetrics
from tasks.names import PartitionNames
from tasks.retries import with_retries
from tasks.rollout import Observer, Side, split

log = logging.getLogger(__name__)

# That many fail and none works: the fault is not the partitions'.
_HOPELESS = 5


def controllers(app: TidemarkApp) -> Mapping[Strategy, Controller]:
    """One for each strategy: they differ in speed, so in what fits into a time. For `app.once`."""
    return {strategy: make_controller(app.settings) for strategy in STRATEGIES}


def serve(app: TidemarkApp, partition_ids: Sequence[int], observers: Sequence[Observer]) -> dict[str, Any]:
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
    sides = drain(app, ids, observers)
    total = together(sides)
    hand_over(app, total.backlog_partition_ids)
    return total.as_dict() | ({"sides": [side.as_dict() for side in sides]} if len(sides) > 1 else {})


def drain(
    app: TidemarkApp, partition_ids: Sequence[int], observers: Sequence[Observer]
) -> list[MaterializationMetrics]:
    """Materialize; returns what was done and what is left, for each side where a candidate strategy is tried."""
    until = monotonic() + app.settings.task_seconds
    sides = split(partition_ids, app.settings)
    done = []
    for number, side in enumerate(sides):
        now = monotonic()
        # Time a side does not use is the next one's.
        share = max(0.0, until - now) / (len(sides) - number)
        done.append(_Side(app, side, observers, now + share).drain())
    total = together(done)
    for observer in observers:
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

    def __init__(self, app: TidemarkApp, side: Side, observers: Sequence[Observer], until: float) -> None:
        self._app = app
        self._until = until
        self._side = side
        self._observers = observers
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

    def ages_of(partition_id: int, newer: int) -> list[float]:
        with app.database.connection() as conn:
            return ages_of_run(conn, partition_id, newer)

    metrics = DrainMetrics(app.once(WorkerMetrics), app.once(PartitionNames), ages_of)
    return metrics, DrainComparison(app), DrainLog(app)


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
