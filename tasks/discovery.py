"""The tasks that find work: fan-out after new commits, the sweep after lost messages."""

import logging
from typing import Any

from db.discover import Pending, find_committed, save_fan_out
from db.discover import sweep as sweep_partitions
from tasks.app import TidemarkApp
from tasks.dispatch import dispatch
from tasks.retries import with_retries

log = logging.getLogger(__name__)


def fan_out_once(app: TidemarkApp, *, commits_at_most: int = 50_000) -> dict[str, int]:
    """Dispatch the partitions of all commits since the last fan-out; with more of them than that, sweep instead.

    How far it got is saved after publishing: a crash in between dispatches twice, never not at all.
    """
    with app.database.connection() as conn:
        found = find_committed(conn, limit=commits_at_most)
        if found.commits == 0:
            return {"commits": 0, "partitions": 0, "tasks": 0}
        partitions: tuple[Pending, ...] = found.partitions
        if not found.complete:
            # After a long pause; reading every partition is cheaper than so many commits.
            log.info("too many new commits, sweeping all partitions", extra={"commits": found.commits})
            partitions = tuple(sweep_partitions(conn))
        tasks = dispatch(app, conn, partitions)
        save_fan_out(conn, found)
    log.info("fanned out", extra={"commits": found.commits, "partitions": len(partitions), "tasks_published": tasks})
    return {"commits": found.commits, "partitions": len(partitions), "tasks": tasks}


def sweep_once(app: TidemarkApp) -> dict[str, int]:
    """Dispatch every partition that has pending events."""
    with app.database.connection() as conn:
        partitions = tuple(sweep_partitions(conn))
        tasks = dispatch(app, conn, partitions)
    if partitions:
        log.info("swept", extra={"partitions": len(partitions), "tasks_published": tasks})
    return {"partitions": len(partitions), "tasks": tasks}


def register(app: TidemarkApp) -> tuple[Any, Any]:
    """Make the tasks known to the app; returns `fan_out` and `sweep`. Without Celery's retry: the next tick is one."""

    @app.task(name="tasks.fan_out", shared=False)
    def fan_out() -> dict[str, Any]:
        """Find partitions with new commits and queue their materialization."""
        return with_retries(app.settings, lambda: fan_out_once(app))

    @app.task(name="tasks.sweep", shared=False)
    def sweep() -> dict[str, Any]:
        """Probe every partition and queue those with pending events."""
        return with_retries(app.settings, lambda: sweep_once(app))

    return fan_out, sweep
