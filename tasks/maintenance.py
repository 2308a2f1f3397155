"""The tasks that keep the tables small and the log within its limits."""

import random
from time import monotonic
from typing import Any

from db.trim import trim as trim_events
from tasks.application import TidemarkApp
from tasks.attempts import with_retries


def register(app: TidemarkApp) -> None:
    """Make the tasks known to the app. They have no Celery retry: the next tick is one."""

    @app.task(name="tasks.trim", shared=False)
    def trim() -> dict[str, Any]:
        """Delete consumed events, for as long as a maintenance task may take."""
        return with_retries(app.settings, lambda: trim_once(app))


def trim_once(app: TidemarkApp) -> dict[str, int]:
    """Trim all partitions, from a random one on: whatever does not get done in time is another one each time."""
    until = monotonic() + app.settings.maintenance_seconds
    deleted = partitions = 0
    with app.database.connection() as conn:
        row = conn.execute("select coalesce(max(id), 0) from tidemark.topic_partitions").fetchone()
        middle = random.randint(0, row[0] if row else 0)  # noqa: S311 - fairness, not secrecy
        for after in (middle, 0):
            result = trim_events(
                conn,
                delete_batch=app.settings.delete_batch,
                after_partition_id=after,
                stop=lambda: monotonic() >= until,
            )
            deleted += result.deleted
            partitions += result.partitions
            if result.next_partition_id is not None:
                break
    return {"deleted": deleted, "partitions": partitions}
