"""Retention, purge and audit, each for as long as a maintenance task may take; the next turn goes on."""

import logging
import random
from dataclasses import asdict
from time import monotonic
from typing import Any

from db.audit import AuditResult
from db.audit import audit as audit_log
from db.producers import expire_producers
from db.retention import purge as purge_log
from db.retention import retain as retain_log
from db.topics import highest_partition_id
from tasks.app import TidemarkApp
from tasks.retries import with_retries

log = logging.getLogger(__name__)

# More would not help anybody who reads the result in Flower; `celery -A tasks audit` prints all.
_VIOLATIONS_SHOWN = 3


def retain(app: TidemarkApp) -> dict[str, int]:
    until = monotonic() + app.settings.maintenance_seconds
    stop, size = lambda: monotonic() >= until, app.settings.delete_batch

    def once() -> dict[str, int]:
        total = {"deleted": 0, "log_bytes": 0, "objects_freed": 0}
        with app.database.connection() as conn:
            # Begin anywhere, then at the first. What is not done in time is another part each time.
            for after in (random.randint(0, highest_partition_id(conn)), 0):  # noqa: S311 - fairness, not secrecy
                result = retain_log(conn, delete_batch=size, after_partition_id=after, stop=stop)
                total = {name: so_far + getattr(result, name) for name, so_far in total.items()}
                if result.next_partition_id is not None:
                    break
            total["producers_expired"] = 0
            # From anywhere, then from the last one, as above. One page each at least, also where no time is left.
            for first in (random.randint(0, highest_partition_id(conn)), 2**31 - 1):  # noqa: S311 - as above
                total["producers_expired"] += expire_producers(
                    conn, silent_seconds=app.settings.producer_seconds, from_partition_id=first, stop=stop
                )
        return total

    return with_retries(app.settings, once, until=until)


def purge(app: TidemarkApp) -> dict[str, int]:
    """Delete what is left of deleted topics."""
    until = monotonic() + app.settings.maintenance_seconds

    def once() -> dict[str, int]:
        with app.database.connection() as conn:
            done = purge_log(conn, delete_batch=app.settings.delete_batch, stop=lambda: monotonic() >= until)
        return {"deleted": done.deleted, "log_bytes": done.log_bytes, "objects_freed": done.objects_freed}

    return with_retries(app.settings, once, until=until)


def audit(app: TidemarkApp) -> dict[str, Any]:
    """Audit what the last audits did not read; whole logs again are `celery -A tasks audit --from-scratch`."""
    until = monotonic() + app.settings.maintenance_seconds

    def once() -> AuditResult:
        with app.database.connection() as conn:
            return audit_log(conn, stop=lambda: monotonic() >= until)

    result = with_retries(app.settings, once, until=until)
    for violation in result.violations:
        log.error("invariant broken", extra=asdict(violation))
    return {
        "partitions": result.partitions,
        "batches": result.batches,
        "violations": len(result.violations),
        "first": [violation.detail for violation in result.violations[:_VIOLATIONS_SHOWN]],
        "complete": result.complete,
    }
