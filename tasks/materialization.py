"""The tasks that materialize: `materialize` by partition ids, and the ad-hoc jobs that find the ids by name."""

import logging
from time import monotonic
from types import NoneType
from typing import Any

from config.errors import InvalidJobError, TransientDatabaseError, UnknownPartitionError
from db.discover import Pending
from db.materialize import MaterializationMetrics
from db.materialize import materialize as materialize_partitions
from db.topics import partition_ids as ids_of_topic
from tasks.application import TidemarkApp
from tasks.attempts import with_retries
from tasks.dispatch import group, publish
from tasks.routing import MATERIALIZE, partition_ids_of, shard_of

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
    until = monotonic() + app.settings.task_seconds
    total = MaterializationMetrics()
    left = partition_ids

    def failed(_: BaseException) -> None:
        nonlocal total
        total += MaterializationMetrics(errors=1)

    def once() -> MaterializationMetrics:
        with app.database.connection() as conn:
            app.names.learn(conn, left)
            return materialize_partitions(conn, left, events_per_partition=app.settings.events_per_partition)

    while left and (total.transactions == 0 or monotonic() < until):
        total += with_retries(app.settings, once, on_error=failed)
        left = list(total.backlog_partition_ids)
    return total


def register(app: TidemarkApp) -> tuple[Any, Any, Any]:
    """Make the tasks known to the app; returns `materialize`, `materialize_partition` and `materialize_topic`."""

    @app.task(name=MATERIALIZE, shared=False, **RETRY_OPTIONS)
    def materialize(partition_ids: list[int]) -> dict[str, Any]:
        """Materialize the backlog of partitions of one shard; returns its MaterializationMetrics."""
        ids = partition_ids_of((partition_ids,), None)
        # Before anything is read: a commit this task does not see must be queued anew.
        app.queued.release(ids)
        total = drain(app, ids)
        # To the end of the queue: other partitions of the shard get their turn. Not what is queued again by now.
        left = app.queued.acquire(total.backlog_partition_ids)
        describe(app, ids, total)
        if left:
            publish(app, left)
        return total.as_dict()

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
            "errors": total.errors,
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
        return [publish(app, g, producer=producer, **options).id for g in groups]
