"""Gives the cursors a meaning again after the database was restored into another cluster.

Transaction ids are a cluster's own: after a dump and restore, the ids in cursors and events stand for nothing, and new
commits would sort before old ones. All in one transaction: a crash leaves the database as it was, still refusing to
run.
"""

from dataclasses import dataclass
from typing import Any

import psycopg

from db.statements import statement
from db.translate import domain_errors


@dataclass(frozen=True, kw_only=True, slots=True)
class RebaseResult:
    """Which cluster the database came from, where it is, and the events that still wait for an offset."""

    was: int
    now: int
    pending_events: int


def rebase(conn: psycopg.Connection[Any], *, force: bool = False) -> RebaseResult | None:
    """Rebase the cursors; None when the database is in its own cluster already and `force` is not given."""
    with domain_errors(), conn.transaction():
        # What it classifies must be read after the locks were waited for.
        conn.execute("set transaction isolation level read committed")
        conn.execute("set local lock_timeout = '10s'")
        row = conn.execute(
            "select c.system_identifier, s.system_identifier "
            "from tidemark.cluster c, pg_control_system() s for update of c"
        ).fetchone()
        assert row is not None  # noqa: S101 - the migration puts the row there
        was, now = row
        if was == now and not force:
            return None
        conn.execute(statement("rebase"))
        left = conn.execute("select count(*) from tidemark.record_batch_events").fetchone()
    assert left is not None  # noqa: S101 - an aggregate returns a row
    return RebaseResult(was=was, now=now, pending_events=left[0])
