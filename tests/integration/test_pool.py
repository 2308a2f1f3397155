"""The pool: lazy, one per process, bounded, and never handing out what is broken."""

import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow
from psycopg_pool import PoolTimeout

from config.errors import UnknownTopicError
from config.settings import Settings
from db.pool import Database
from db.topics import partition_ids
from tests.support import wait_until


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url, Settings(pool_open=4, pool_idle=2, pool_wait=5), threads=2)
    yield database
    database.close()


def backends(conn: Connection[Any]) -> set[int]:
    rows = conn.execute(
        "select pid from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() "
        "and backend_type = 'client backend'"
    ).fetchall()
    return {row[0] for row in rows}


def backend(database: Database) -> int:
    with database.connection() as conn:
        return conn.info.backend_pid


def test_nothing_is_opened_before_it_is_asked_for(database: Database, conn: Connection[TupleRow]) -> None:
    assert backends(conn) == set()
    assert backend(database) in backends(conn)


def test_connections_are_reused(database: Database, conn: Connection[TupleRow]) -> None:
    def all_that_were_asked_for_are_open() -> bool:
        stats = database.pool.get_stats()
        return 2 <= stats["pool_size"] == stats["pool_available"] == len(backends(conn))

    backend(database)
    # While the idle ones are being opened, those that were asked for meanwhile may come on top.
    wait_until(all_that_were_asked_for_are_open)
    before = backends(conn)
    assert {backend(database) for _ in range(10)} <= before
    assert backends(conn) == before


def test_no_more_than_the_limit(database_url: str, conn: Connection[TupleRow]) -> None:
    database = Database(database_url, Settings(pool_open=4, pool_idle=2, pool_wait=0.5))
    with ExitStack() as stack:
        held = {stack.enter_context(database.connection()).info.backend_pid for _ in range(4)}
        assert len(held) == 4
        with pytest.raises(PoolTimeout), database.connection():
            pass
    assert backends(conn) >= held
    assert backend(database) in held
    database.close()


def test_session_settings(database: Database) -> None:
    query = "select name, setting from pg_settings where name = any(array['lock_timeout', 'statement_timeout', "
    query += "'idle_in_transaction_session_timeout', 'synchronous_commit', 'TimeZone', 'application_name'])"
    with database.connection() as conn:
        rows = conn.execute(query.encode()).fetchall()
    assert dict(rows) == {
        "lock_timeout": "1000",
        "statement_timeout": "60000",
        "idle_in_transaction_session_timeout": "60000",
        "synchronous_commit": "on",
        "TimeZone": "UTC",
        "application_name": "tidemark",
    }


def test_the_transaction_timeout_where_the_server_has_one(database: Database) -> None:
    with database.connection() as conn:
        row = conn.execute("select setting from pg_settings where name = 'transaction_timeout'").fetchone()
        assert row == (("120000",) if conn.info.server_version >= 170_000 else None)


def test_the_roles_synchronous_commit_is_not_lowered(
    database_url: str, conn: Connection[TupleRow], database: Database
) -> None:
    """Commits and passes raise what is too little by themselves; what is more is the operator's wish."""
    conn.execute(
        "do $$ begin execute format('alter database %I set synchronous_commit = remote_apply', current_database()); "
        "end $$"
    )
    with database.connection() as pooled:
        assert pooled.execute("show synchronous_commit").fetchone() == ("remote_apply",)


def test_connections_that_were_lost_are_replaced(database_url: str, conn: Connection[TupleRow]) -> None:
    """All of them at once, as when Postgres restarts: one pause at most, not one (and a longer one) for each."""
    database = Database(database_url, Settings(pool_open=4, pool_idle=4, pool_wait=20))

    def idle_ones_are_open() -> bool:
        return len(backends(conn)) >= 4

    try:
        backend(database)
        wait_until(idle_ones_are_open)
        for pid in backends(conn):
            conn.execute("select pg_terminate_backend(%s, 5000)", (pid,))
        start = time.monotonic()
        assert backend(database) in backends(conn)
        assert time.monotonic() - start < 3
    finally:
        database.close()


def test_a_connection_lost_while_in_use_harms_no_other(database: Database, conn: Connection[TupleRow]) -> None:
    with pytest.raises(psycopg.OperationalError), database.connection() as pooled:  # noqa: PT012 -- the use is the test
        conn.execute("select pg_terminate_backend(%s, 5000)", (pooled.info.backend_pid,))
        pooled.execute("select 1")
    assert backend(database) in backends(conn)


def test_an_abandoned_transaction_is_not_handed_on(database: Database, conn: Connection[TupleRow]) -> None:
    pool = database.pool
    pooled = pool.getconn()
    pooled.execute("begin")
    pooled.execute("insert into tidemark.topics (name, partitions) values ('abandoned', 1)")
    pool.putconn(pooled)
    for _ in range(4):
        with database.connection() as pooled:
            assert pooled.info.transaction_status == TransactionStatus.IDLE
    assert conn.execute("select count(*) from tidemark.topics").fetchone() == (0,)


def test_lifetime(database_url: str) -> None:
    database = Database(database_url, Settings(pool_lifetime=0.3, pool_open=1))
    try:
        first = backend(database)

        def another_backend() -> bool:
            return backend(database) != first

        wait_until(another_backend, timeout=10)
    finally:
        database.close()


def test_domain_errors_leave_as_ours(database: Database) -> None:
    with pytest.raises(UnknownTopicError), database.connection() as conn:
        conn.execute("select tidemark.partition_ids('gone')")
    with pytest.raises(UnknownTopicError), database.connection() as conn:
        partition_ids(conn, "gone")


def test_it_opens_again_after_a_close(database: Database, conn: Connection[TupleRow]) -> None:
    database.close()
    backend(database)
    database.close()

    def none_is_left() -> bool:
        return not backends(conn)

    wait_until(none_is_left)
    assert backend(database) in backends(conn)


def test_a_fork_opens_connections_of_its_own(database: Database, conn: Connection[TupleRow]) -> None:
    before = backend(database)
    read, write = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of forks in a process with threads, which is what is tried here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        # Nothing of pytest may run in the child, so it leaves without unwinding.
        signal.alarm(20)
        answer = b"failed"
        try:
            own = backend(database)
            answer = str(own).encode()
            database.close()
        finally:
            os.write(write, answer)
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    assert os.waitpid(child, 0)[1] == 0
    assert int(answer) != before
    # The parent's session neither ended nor got the child's answers.
    with database.connection() as pooled:
        assert pooled.execute("select 42").fetchone() == (42,)
    assert before in backends(conn)
