"""Runs statements from the SQL files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg import RawCursor
from psycopg.rows import TupleRow, tuple_row

from db import arrays
from db.statements import statement


def run(
    conn: psycopg.Connection[Any], name: str, parameters: Sequence[Any] = (), *, prepare: bool | None = None
) -> RawCursor[TupleRow]:
    """Execute `db/sql/<name>.sql`; `prepare=False` plans it for these very parameters each time."""
    cursor = RawCursor(conn, row_factory=tuple_row)
    arrays.register(cursor.adapters)
    cursor.execute(statement(name), parameters, prepare=prepare)
    return cursor


def pin_plans(conn: psycopg.Connection[Any]) -> None:
    """First in a transaction that materializes or deletes: its isolation level, and the planner's settings.

    Read committed is what makes materializing safe: its snapshot must be taken after the lock was waited for.
    """
    conn.execute("set transaction isolation level read committed", prepare=True)
    run(conn, "transaction_settings", prepare=True)


@contextmanager
def pipelined(conn: psycopg.Connection[Any]) -> Iterator[None]:
    """A transaction whose statements are sent without waiting for the answers of those before, on an idle connection.

    The server runs one after the other, each in a snapshot of its own, and none after one that failed. psycopg's
    `conn.transaction()` waits at each end of the block as well, which is half of a small transaction's round trips.
    """
    try:
        with conn.pipeline():
            if conn.autocommit:
                conn.execute("begin", prepare=True)
            yield
            conn.execute("commit", prepare=True)
    except BaseException:
        # A connection that is lost has rolled back already, and the error at hand says why.
        with suppress(psycopg.OperationalError):
            conn.rollback()
        raise
