"""The tasks. From Python: `from tasks.jobs import materialize_topic; materialize_topic.delay("orders")`.

What they do stands in `tasks.drain`, `tasks.dispatch`, `tasks.maintenance` and `tasks.cleanup`, as functions of an app.
"""

from functools import partial
from time import perf_counter
from typing import Any

import structlog
from celery import Task
from celery.exceptions import Ignore, Retry

from config.errors import InvalidJobError, TransientDatabaseError, UnknownPartitionError, UnknownTopicError
from config.queues import MATERIALIZE
from tasks import cleanup, dispatch, drain, maintenance
from tasks.app import TidemarkApp, app
from tasks.metrics import WorkerMetrics


class Job(Task):
    """Base of the tasks. Its hooks are here, so no other app's tasks are touched."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task. Celery has prepared the request; `run` is all that is left."""
        app: TidemarkApp = self.app
        dispatch.tracing_of(app)
        began, state, result = perf_counter(), "FAILURE", None
        with structlog.contextvars.bound_contextvars(task=self.name, task_id=self.request.id):
            try:
                result = self.run(*args, **kwargs)
                state = "SUCCESS"
                return result
            except (Retry, Ignore) as how:
                state = "RETRY" if isinstance(how, Retry) else "IGNORED"
                raise
            finally:
                metrics = app.once(WorkerMetrics)
                metrics.task_ended(self.name, state, perf_counter() - began, result)
                if "database" in vars(app):
                    metrics.pool_used(app.database.pool.pop_stats())
                metrics.flush()


# Celery's retry after the task's own ones: seconds apart, and a message waiting for its time is held by the worker, so
# well below the visibility timeout. What fails for longer is found by the sweep. Periodic tasks have the next tick.
_RETRIED: dict[str, Any] = {
    "autoretry_for": (TransientDatabaseError,),
    "max_retries": 3,
    "retry_backoff": 2,
    "retry_backoff_max": 30,
    "retry_jitter": True,
}
# By name: the result is kept for who asked, and a wrong name is the asker's mistake, for Celery's log no error.
_ASKED: dict[str, Any] = {
    **_RETRIED,
    "ignore_result": False,
    "throws": (InvalidJobError, UnknownPartitionError, UnknownTopicError),
}
# Not `shared`: tasks of this app, and of no other one in the process.
_job = partial(app.task, base=Job, shared=False)


@_job(name=MATERIALIZE, **_RETRIED)
def materialize(partition_ids: list[int]) -> dict[str, Any]:
    """Materialize the backlog of partitions of one shard; returns its MaterializationMetrics."""
    return drain.serve(app, partition_ids)


@_job(name="tasks.materialize_partition", **_ASKED)
def materialize_partition(topic: str, partition: int) -> list[str]:
    """Materialize one partition now; returns the ids of the tasks that do so."""
    return dispatch.enqueue(app, topic, partition, ignore_result=False)


@_job(name="tasks.materialize_topic", **_ASKED)
def materialize_topic(topic: str) -> list[str]:
    """Materialize all partitions of a topic now; returns the ids of the tasks that do so."""
    return dispatch.enqueue(app, topic, None, ignore_result=False)


@_job(name="tasks.fan_out")
def fan_out() -> dict[str, int]:
    """Find partitions with new commits and queue their materialization."""
    return dispatch.fan_out(app)


@_job(name="tasks.sweep")
def sweep() -> dict[str, int]:
    """Probe every partition and queue those with pending events."""
    return dispatch.sweep(app)


@_job(name="tasks.retain")
def retain() -> dict[str, int]:
    """Delete batches beyond the topics' limits, and silent producers, for as long as a maintenance task may take."""
    return maintenance.retain(app)


@_job(name="tasks.purge")
def purge() -> dict[str, int]:
    """Delete what deleted topics held, for as long as a maintenance task may take."""
    return maintenance.purge(app)


@_job(name="tasks.audit")
def audit() -> dict[str, Any]:
    """Check the invariants on what was not audited yet, for as long as a maintenance task may take."""
    return maintenance.audit(app)


@_job(name="tasks.collect")
def collect() -> dict[str, int]:
    """Delete the uploads that no batch refers to, for as long as a maintenance task may take."""
    return cleanup.collect(app)


@_job(name="tasks.reconcile")
def reconcile() -> dict[str, Any]:
    """Compare the next part of the store with the table, for as long as a maintenance task may take."""
    return cleanup.reconcile(app)
