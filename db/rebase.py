"""Lets a database go on in the cluster it was restored into.

Transaction ids are a cluster's own, and new ones may be lower than those in the log: what is added to them is raised,
so that new commits come after all that is there. Nothing else changes. What was pending stays pending, in its order.
Transactions that were running when the backup was taken run nowhere now, so what the backup holds of them is late,
as after any other commit.

All in one transaction: a crash leaves the database as it was, still refusing to run.
"""

from dataclasses import dataclass

from psycopg.errors import LockNotAvailable

from config.errors import TransientDatabaseError
from db.statements import Connection, run, values

LOCK_TIMEOUT = "10s"


@dataclass(frozen=True, kw_only=True, slots=True)
class RebaseResult:
    """Which cluster the database came from (None where nothing says it), and where it is."""

    was: int | None
    now: int


def rebase(conn: Connection, *, force: bool = False) -> RebaseResult | None:
    """Rebase the log; None when the database is in its own cluster already and `force` is not given.

    Raises TransientDatabaseError while commits, workers or a backup are under way.
    """
    with conn.transaction():
        # Each reading must see what was written while this waited for the lock.
        conn.execute("set transaction isolation level read committed")
        conn.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'".encode())
        was, now, _ = values(conn, "rebase")
        if was == now and not force:
            return None
        try:
            run(conn, "lock_cluster")
        except LockNotAvailable as error:
            raise TransientDatabaseError(
                f"commits, workers or a backup have been under way for {LOCK_TIMEOUT}: stop them, then try again"
            ) from error
        was, now, base = values(conn, "rebase")
        if was == now and not force:
            return None
        run(conn, "raise_sequences")
        run(conn, "truncate_cluster")
        run(conn, "insert_cluster", (now, base))
    return RebaseResult(was=was, now=now)
