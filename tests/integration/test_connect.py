"""Connections without the pool: they end soon on a frozen server, and no error of any connection holds a password."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import PoolTimeout
from sqlalchemy.exc import DBAPIError

from config.errors import SettingsError, TidemarkError, TransientDatabaseError
from config.settings import Settings
from db.materialize import materialize
from db.migrate import bring_up, upgrade
from db.pool import Database, connect
from db.topics import create_topic, partition_ids
from tests.servers import PostgresServer
from tests.support import frozen

# What a command gives a server, and what its user gives the command.
TIMEOUT = 4
PATIENCE = 5


@pytest.fixture(scope="module")
def server(server_directory: Path, postgres_bin: Path | None) -> Iterator[PostgresServer]:
    with PostgresServer(server_directory / "frozen", bin_dir=postgres_bin).start() as started:
        upgrade(started.url())
        yield started


def named(server: PostgresServer) -> str:
    return f"Postgres at {conninfo_to_dict(server.url())['host']}:5432, database tidemark"


@contextmanager
def soon() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < PATIENCE


FROZEN_USES: dict[str, Callable[[str], object]] = {
    "migrate": lambda url: upgrade(url, timeout=TIMEOUT),
    "connect": lambda url: connect(url, Settings(), timeout=TIMEOUT).__enter__(),
}


@pytest.mark.parametrize("use", FROZEN_USES)
def test_a_frozen_server_is_told_by_who_connects(use: str, server: PostgresServer) -> None:
    with frozen(server.pid), soon(), pytest.raises(TransientDatabaseError, match="TIDEMARK_DATABASE_URL") as caught:
        FROZEN_USES[use](server.url())
    assert named(server) in str(caught.value)


def transaction(conn: Connection[Any]) -> None:
    with conn.transaction():
        conn.execute("select 1")


STATEMENTS: dict[str, Callable[[Connection[Any]], object]] = {
    "a statement": lambda conn: conn.execute("select 1"),
    "a transaction": transaction,
    "a pipeline": lambda conn: materialize(conn, [1]),
}


@pytest.mark.parametrize(("use", "timeout"), [*zip(STATEMENTS, (TIMEOUT, 1, 1), strict=True)])
def test_a_server_that_freezes_is_told_by_who_waits(
    use: str, timeout: float, server: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing waits for it again on the way out, or logs it as well (but for psycopg's pipelines)."""
    with connect(server.url(), Settings(), timeout=timeout) as conn:
        with frozen(server.pid), soon(), pytest.raises(TransientDatabaseError, match="frozen") as caught:
            STATEMENTS[use](conn)
        assert named(server) in str(caught.value)
        assert "TIDEMARK_DATABASE_URL" in str(caught.value)
        assert conn.closed
    assert len(caplog.records) == (use == "a pipeline")


def test_a_statement_may_take_longer_than_the_time_out(server: PostgresServer) -> None:
    """Where the server shows that it lives."""
    with connect(server.url(), Settings(), timeout=0.2) as conn:
        assert conn.execute("select 42 from pg_sleep(0.7)").fetchone() == (42,)
        with conn.pipeline():
            assert conn.execute("select 42 from pg_sleep(0.7)").fetchone() == (42,)


def test_but_not_longer_than_the_server_would_let_it(server: PostgresServer) -> None:
    """Somebody else answers for it: a pooler, or as here the postmaster for one frozen backend."""
    settings = Settings(statement_timeout=0.5, lock_timeout=0.5)
    with connect(server.url(), settings, timeout=0.2) as conn:
        pid = conn.info.backend_pid
        with frozen(pid), soon(), pytest.raises(TransientDatabaseError, match="frozen"):
            conn.execute("select 1")


def test_it_is_set_up_like_those_of_the_pool(server: PostgresServer) -> None:
    for timeout in (None, TIMEOUT):
        with connect(server.url(), Settings(lock_timeout=2), timeout=timeout) as conn:
            assert conn.autocommit
            assert conn.execute("show lock_timeout").fetchone() == ("2s",)


SECRET = "pgS3CR3T"

# In each the password ends up where libpq does not expect it, or the server is not there.
UNREADABLE = [
    f"postgresql://tidemark:{SECRET}@127.0.0.1:1/tidemark?ssl_mode=require",
    f"postgresql://tidemark:p@{SECRET}@127.0.0.1:1/tidemark",
    f"postgresql://tidemark:{SECRET}/x@127.0.0.1:1/tidemark",
    f"postgresql://tidemark:12/{SECRET}@127.0.0.1:1/tidemark",
    f"postgresql://tidemark:%{SECRET}@127.0.0.1:1/tidemark",
    f"postgresql:/tidemark:{SECRET}@127.0.0.1:1/tidemark",
    f"postgresql+psycopg://tidemark:{SECRET}@127.0.0.1:1/tidemark",
    f"host=127.0.0.1 port=1 password=a {SECRET}",
    f"host=127.0.0.1 port={SECRET} dbname=tidemark",
]
UNREACHABLE = [
    f"postgresql://tidemark:{SECRET}@127.0.0.1:1/tidemark",
    f"postgresql://tidemark:{SECRET}@nowhere.invalid:1/tidemark",
    f"host=127.0.0.1 port=1 dbname=tidemark password={SECRET}",
]


def from_the_pool(url: str) -> None:
    database = Database(url, Settings(pool_wait=0.3))
    try:
        with database.connection():
            pass
    finally:
        database.close()


USES: dict[str, Callable[[str], object]] = {
    "pool": from_the_pool,
    "connect": lambda url: connect(url, Settings()).__enter__(),
    "upgrade": upgrade,
    "bring_up": bring_up,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("url", UNREADABLE + UNREACHABLE)
def test_no_error_holds_the_password(url: str, use: str, caplog: pytest.LogCaptureFixture) -> None:
    """Neither its text nor those it came from, and no log of the pool's."""
    caplog.set_level(logging.DEBUG)
    with pytest.raises((TidemarkError, PoolTimeout, DBAPIError)) as caught:
        USES[use](url)
    assert isinstance(caught.value, SettingsError) == (url in UNREADABLE)
    seen = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert SECRET not in seen
    if url in UNREACHABLE:
        assert ":1, database tidemark" in str(caught.value)


def test_a_wrong_password_is_told_with_the_server(server: PostgresServer) -> None:
    """What the server says about it is passed on."""
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute("create role locked nologin")
    url = server.url().replace("tidemark@", f"locked:{SECRET}@")
    with pytest.raises(TransientDatabaseError, match='role "locked" is not permitted to log in') as caught:
        connect(url, Settings()).__enter__()
    assert SECRET not in str(caught.value)


def test_topics_are_found_after_a_freeze(server: PostgresServer) -> None:
    """A server that goes on is used as before."""
    with frozen(server.pid):
        pass
    with connect(server.url(), Settings(), timeout=TIMEOUT) as conn:
        create_topic(conn, "orders", 1)
        assert len(partition_ids(conn, "orders")) == 1
