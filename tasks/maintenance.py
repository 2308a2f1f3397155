"""Retention and audit, each for as long as a maintenance task may take; the next turn goes on."""

import logging
import random
from collections.abc import Callable
from time import monotonic
from typing import Any

import psycopg

from db.audit import AuditResult
from db.audit import audit as audit_log
from db.retention import retain as retain_log
from db.topics import highest_partition_id
from tasks.app import TidemarkApp
from tasks.retries import with_retries

log = logging.getLogger(__name__)

# More would not help anybody who reads the result in Flower; `celery -A tasks audit` prints all.
_VIOLATIONS_SHOWN = 3


def _starts(conn: psycopg.Connection[Any]) -> tuple[int, int]:
    """Where to begin a round: anywhere, then at the first. What is not done in time is another part each time."""
    return random.randint(0, highest_partition_id(conn)), 0  # noqa: S311 - fairness, not secrecy


def retain(app: TidemarkApp) -> dict[str, int]:
    """Apply the topics' retention limits, as far as the time goes."""
    until = monotonic() + app.settings.maintenance_seconds
    return with_retries(app.settings, lambda: _retain(app, lambda: monotonic() >= until), until=until)


def _retain(app: TidemarkApp, stop: Callable[[], bool]) -> dict[str, int]:
    deleted = log_bytes = objects_freed = 0
    with app.database.connection() as conn:
        for after in _starts(conn):
            result = retain_log(conn, delete_batch=app.settings.delete_batch, after_partition_id=after, stop=stop)
            deleted += result.deleted
            log_bytes += result.log_bytes
            objects_freed += result.objects_freed
            if result.next_partition_id is not None:
                break
    return {"deleted": deleted, "log_bytes": log_bytes, "objects_freed": objects_freed}


def audit(app: TidemarkApp) -> dict[str, Any]:
    """Audit what the last audits did not read; whole logs again are `celery -A tasks audit --from-scratch`."""
    until = monotonic() + app.settings.maintenance_seconds

    def once() -> AuditResult:
        with app.database.connection() as conn:
            return audit_log(conn, stop=lambda: monotonic() >= until)

    result = with_retries(app.settings, once, until=until)
    for violation in result.violations:
        log.error(
            "invariant broken",
            extra={
                "invariant": violation.invariant,
                "partition_id": violation.partition_id,
                "offset": violation.offset,
                "detail": violation.detail,
            },
        )
    return {
        "partitions": result.partitions,
        "batches": result.batches,
        "violations": len(result.violations),
        "first": [violation.detail for violation in result.violations[:_VIOLATIONS_SHOWN]],
        "complete": result.complete,
    }
