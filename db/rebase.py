"""Lets a database go on in the cluster it was restored into.

Transaction ids are a cluster's own, and new ones may be lower than those in the log: what is added to them is raised,
so that new commits come after all that is there. Nothing else changes. What was pending stays pending, in its order.
Transactions that were running when the backup was taken run nowhere now, so what the backup holds of them is late,
as after any other commit.

All in one transaction: a crash leaves the database as it was, still refusing to run.
"""

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.errors import LockNotAvailable

from config.errors import TransientDatabaseError
from db.statements import run
from db.translate import domain_errors

LOCK_TIMEOUT = "10s"


@dataclass(frozen=True, kw_only=True, slots=True)
class RebaseResult:
    """Which cluster the database came from (None where nothing says it), and where it is."""

    was: int | None
    now: int


def rebase(conn: psycopg.Connection[Any], *, force: bool = False) -> RebaseResult | None:
    """Rebase the log; None when the database is in its own cluster already and `force` is not given.

    Raises TransientDatabaseError while commits, workers or a backup are under way.
    """
    with domain_errors(), conn.transaction():
        # Each reading must see what was written while this waited for the lock.
        conn.execute("set transaction isolation level read committed")
        conn.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'".encode())
        was, now, _ = _read(conn)
        if was == now and not force:
            return None
        try:
            # Commits and passes have read it, so they are waited for; those that come wait for us.
            conn.execute("lock table tidemark.cluster in access exclusive mode")
        except LockNotAvailable as error:
            raise TransientDatabaseError(
                f"commits, workers or a backup have been under way for {LOCK_TIMEOUT}: stop them, then try again"
            ) from error
        was, now, base = _read(conn)
        if was == now and not force:
            return None
        run(conn, "raise_sequences")
        # Not updated: a snapshot from before would go on with the old base. From a truncated table it gets no row, also
        # not the old one, and tx_base() refuses.
        conn.execute("truncate tidemark.cluster")
        conn.execute("insert into tidemark.cluster (system_identifier, tx_base) values (%s, %s)", (now, base))
    return RebaseResult(was=was, now=now)


def _read(conn: psycopg.Connection[Any]) -> tuple[int | None, int, int]:
    row = run(conn, "rebase").fetchone()
    assert row is not None  # noqa: S101 - a row of scalars
    return row[0], row[1], row[2]
