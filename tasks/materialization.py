"""The tasks that materialize: `materialize` by partition ids, and the ad-hoc jobs that find the ids by name."""

import logging
from collections import deque
from dataclasses import replace
from functools import reduce
from time import monotonic
from types import NoneType
from typing import Any

from config.errors import InvalidJobError, TransientDatabaseError, UnknownPartitionError
from config.queues import MATERIALIZE, partition_ids_of, shard_of
from db.discover import Pending
from db.materialize import MaterializationMetrics
from db.materialize import materialize as materialize_partitions
from db.topics import partition_ids as ids_of_topic
from db.translate import would_meet_all
from tasks.app import TidemarkApp
from tasks.dispatch import group, publish
from tasks.retries import with_retries
from tasks.rollout import Side, split

log = logging.getLogger(__name__)

# Celery's retry after the task's own ones: seconds apart, and a message waiting for its time is held by the worker, so
# well below the visibility timeout. What fails for longer is found by the sweep.
RETRY_OPTIONS: dict[str, Any] = {
    "autoretry_for": (TransientDatabaseError,),
    "max_retries": 3,
    "retry_backoff": 2,
    "retry_backoff_max": 30,
    "retry_jitter": True,
}


def drain(app: TidemarkApp, partition_ids: list[int]) -> MaterializationMetrics:
    """Materialize until nothing is left or the task's time is up: one transaction after the other."""
    first, *others = drain_sides(app, partition_ids)
    return reduce(MaterializationMetrics.beside, others, first)


def drain_sides(app: TidemarkApp, partition_ids: list[int]) -> list[MaterializationMetrics]:
    """The same, where a candidate is tried one side after the other: what each did."""
    until = monotonic() + app.settings.task_seconds
    sides = split(partition_ids, app.settings)
    done = []
    for number, side in enumerate(sides):
        now = monotonic()
        # Time a side does not use is the next one's.
        done.append(_Drain(app, side).run(now + max(0.0, until - now) / (len(sides) - number)))
    return done


# That many fail and none works: the fault is not the partitions'.
_HOPELESS = 5


class _Drain:
    """One side of a task, one transaction after the other.

    A partition that cannot be placed, or that somebody else has locked, holds up none of the others: a group that fails
    is halved until the one that makes it fail is alone, and what is locked is passed over, and tried once more at
    the end.
    """

    def __init__(self, app: TidemarkApp, side: Side) -> None:
        self._app = app
        self._side = side
        self._controller = app.controllers[side.strategy]
        self._total = MaterializationMetrics(strategy=side.strategy)
        # With each group, whether it had more than an earlier transaction took.
        self._groups = deque([(side.partition_ids, False)])
        self._busy: list[int] = []

    def run(self, until: float) -> MaterializationMetrics:
        """Go on until nothing is left or it is time to hand over: what was done, and what is left."""
        while self._groups and (self._total.transactions == 0 or monotonic() < until):
            ids, again = self._groups.popleft()
            self._take(ids, again=again, wait=False)
        if self._busy:
            self._take(self._busy, again=False, wait=True)
        return replace(self._total, backlog_partition_ids=tuple(i for ids, _ in self._groups for i in ids))

    def _take(self, ids: list[int], *, again: bool, wait: bool) -> None:
        def work() -> MaterializationMetrics:
            return self._transaction(ids, again=again, wait=wait)

        try:
            done = with_retries(self._app.settings, work, on_error=self._failed, retry=would_meet_all)
        except TransientDatabaseError:
            # Counted attempt by attempt.
            raise
        except Exception as error:
            self._failed(error)
            if would_meet_all(error):
                raise
            if len(ids) > 1 and not wait:
                half = len(ids) // 2
                self._groups.extendleft([(ids[half:], again), (ids[:half], again)])
            elif self._total.transactions == 0 and (
                not self._groups or len(self._total.stuck_partition_ids) >= _HOPELESS
            ):
                raise
            else:
                for observer in self._app.observers:
                    observer.stuck(ids, error)
                self._total = replace(self._total, stuck_partition_ids=(*self._total.stuck_partition_ids, *ids))
        else:
            self._busy += done.busy_partition_ids
            self._total += done
            if done.backlog_partition_ids:
                self._groups.append((list(done.backlog_partition_ids), True))

    def _transaction(self, ids: list[int], *, again: bool, wait: bool) -> MaterializationMetrics:
        # Planned for each attempt: the controller has heard of the one before.
        plan = self._controller.plan(ids, again=again)
        app = self._app
        with app.database.connection() as conn:
            app.names.learn(conn, plan.partition_ids)
            done = materialize_partitions(
                conn,
                plan.partition_ids,
                events_per_partition=plan.events_per_partition,
                strategy=self._side.strategy,
                wait=wait,
            )
        self._controller.done(done)
        for observer in app.observers:
            observer.transaction(self._side, done)
        # First what it began: `complete` goes on with one partition to its end.
        taken = set(plan.partition_ids)
        rest = tuple(i for i in ids if i not in taken)
        return replace(done, backlog_partition_ids=done.backlog_partition_ids + rest)

    def _failed(self, error: BaseException) -> None:
        self._total += MaterializationMetrics(errors=1)
        self._controller.failed()
        for observer in self._app.observers:
            observer.failed(self._side, error)


def register(app: TidemarkApp) -> tuple[Any, Any, Any]:
    """Make the tasks known to the app; returns `materialize`, `materialize_partition` and `materialize_topic`."""

    @app.task(name=MATERIALIZE, shared=False, **RETRY_OPTIONS)
    def materialize(partition_ids: list[int]) -> dict[str, Any]:
        """Materialize the backlog of partitions of one shard; returns its MaterializationMetrics."""
        ids = partition_ids_of((partition_ids,), None)
        # Before anything is read: a commit this task does not see must be queued anew.
        app.queued.release(ids)
        sides = drain_sides(app, ids)
        total = reduce(MaterializationMetrics.beside, sides)
        # To the end of the queue: other partitions of the shard get their turn. Not what is queued again by now.
        left = app.queued.acquire(total.backlog_partition_ids)
        describe(app, ids, total)
        if left:
            publish(app, left, at_once=True)
        return total.as_dict() | ({"sides": [side.as_dict() for side in sides]} if len(sides) > 1 else {})

    @app.task(name="tasks.materialize_partition", shared=False, **RETRY_OPTIONS)
    def materialize_partition(topic: str, partition: int) -> list[str]:
        """Materialize one partition now; returns the ids of the tasks that do so."""
        return enqueue(app, topic, partition)

    @app.task(name="tasks.materialize_topic", shared=False, **RETRY_OPTIONS)
    def materialize_topic(topic: str) -> list[str]:
        """Materialize all partitions of a topic now; returns the ids of the tasks that do so."""
        return enqueue(app, topic, None)

    return materialize, materialize_partition, materialize_topic


def describe(app: TidemarkApp, ids: list[int], total: MaterializationMetrics) -> None:
    """Log what a task did, for those who have to find out why something lags."""
    if total.events_processed == 0:
        return
    log.info(
        "materialized",
        extra={
            "shard": shard_of(ids[0], app.settings.shards),
            "partitions": app.names.describe(ids),
            "events": total.events_processed,
            "records": total.records,
            "ms": round(total.processing_time_ms, 1),
            "lock_wait_ms": round(total.lock_wait_time_ms, 1),
            "backlog_partitions": len(total.backlog_partition_ids),
            "stuck_partitions": len(total.stuck_partition_ids),
            "errors": total.errors,
            "strategy": total.strategy,
            "batch_events": total.batch_events,
        },
    )


def enqueue(app: TidemarkApp, topic: str, partition: int | None, **options: Any) -> list[str]:
    """Publish materialize tasks for a topic, or one partition of it; returns their ids.

    Whoever asks by name wants it now: tokens are not looked at. Raises UnknownTopicError and UnknownPartitionError.
    """
    # Whoever calls a task by hand may pass anything.
    given: tuple[object, object] = (topic, partition)
    if type(given[0]) is not str or type(given[1]) not in {int, NoneType}:
        raise InvalidJobError(f"a job takes a topic name and a partition number, not {topic!r} and {partition!r}")

    def look_up() -> list[int]:
        with app.database.connection() as conn:
            ids = ids_of_topic(conn, topic)
            app.names.learn(conn, ids)
            return ids

    ids = with_retries(app.settings, look_up)
    if partition is not None:
        if not 0 <= partition < len(ids):
            raise UnknownPartitionError(
                f"topic {topic!r} has no partition {partition}; it has partitions 0 to {len(ids) - 1}"
            )
        ids = [ids[partition]]
    # Depth is not known here; the task hands over what it does not finish.
    groups = group((Pending(partition_id=i, events=1) for i in ids), app.settings)
    with app.producer_or_acquire() as producer:
        return [publish(app, g, at_once=True, producer=producer, **options).id for g in groups]
