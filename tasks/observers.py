"""Who watches the jobs: each is counted, traced and named in its log lines, as is what its partitions go through."""

import logging
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import structlog
from celery import Task
from celery.exceptions import Ignore, Retry

from config.queues import shard_of
from db.materialize import MaterializationMetrics, ages_of_run
from tasks.app import TidemarkApp
from tasks.compare import DrainComparison
from tasks.dispatch import tracing_of
from tasks.hints import Hints
from tasks.metrics import DrainMetrics, WorkerMetrics
from tasks.names import PartitionNames
from tasks.rollout import Observer

log = logging.getLogger(__name__)


class Job(Task):
    """Base of the tasks. Its hooks are here, so no other app's tasks are touched."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the task. Celery has prepared the request; `run` is all that is left."""
        app: TidemarkApp = self.app
        tracing_of(app)
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
                metrics = app.once(worker_metrics)
                metrics.task_ended(self.name, state, perf_counter() - began, result)
                if "database" in vars(app):
                    metrics.pool_used(app.database.pool.pop_stats())
                metrics.flush()


def worker_metrics(app: TidemarkApp) -> WorkerMetrics:
    """This process's metrics; for `app.once`."""
    return WorkerMetrics(app.once(Hints), topics=app.settings.metrics_topics)


def observers(app: TidemarkApp) -> tuple[Observer, ...]:
    """Everybody who wants to know what a task's partitions go through; one set for each app."""
    return app.once(_observers)


def _observers(app: TidemarkApp) -> tuple[Observer, ...]:
    def ages_of(partition_id: int, newer: int) -> list[float]:
        with app.database.connection() as conn:
            return ages_of_run(conn, partition_id, newer)

    metrics, names = app.once(worker_metrics), app.once(PartitionNames)
    return DrainMetrics(metrics, names, ages_of), DrainComparison(metrics, app.settings), DrainLog(app)


class DrainLog(Observer):
    """Logs what a task did, for those who have to find out why something lags."""

    def __init__(self, app: TidemarkApp) -> None:
        self._shards = app.settings.shards
        self._names = app.once(PartitionNames)

    # A transaction that fails is said by `with_retries`, or as stuck, or the task fails with it.

    def stuck(self, partition_ids: Sequence[int], error: BaseException) -> None:
        """Report partitions by name."""
        log.error(
            "partitions cannot be materialized",
            extra={
                "partitions": self._names.describe(partition_ids),
                "error": f"{type(error).__name__}: {str(error).strip()}",
                "next": "each sweep tries again",
            },
        )

    def finished(self, partition_ids: Sequence[int], total: MaterializationMetrics) -> None:
        """One line for a task that did something."""
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
