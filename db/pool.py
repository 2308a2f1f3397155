"""Connections: one pool per process, and SQLAlchemy's engine on top of the same pool.

The pool opens its first connection when one is asked for, never before: a connection that crosses a fork is
shared by two processes and corrupts both. `Database` remembers the process it was opened in and opens anew in another.

After an outage psycopg_pool alone is slow to notice that Postgres is back. It checks its idle connections one by one
and pauses twice as long after each dead one, so ten of them outlast any time-out; and who waits while it gives up
connecting waits for nobody. So here the first dead connection empties the pool, attempts to connect are short, and a
waiting caller asks again every second, which starts the next attempt.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from time import monotonic
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import ConnectionPool, PoolTimeout
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

from config.settings import Settings
from db.translate import domain_errors

# TransactionTimeout exists since this version.
_TRANSACTION_TIMEOUT_SINCE = 170_000
# One attempt to connect, and one more after this; then the next caller's turn makes the next.
_RECONNECT_SECONDS = 0.5
_TURN_SECONDS = 1.0
# What libpq would wait for without end: a host that is gone answers nothing, not even with a refusal.
_NETWORK = {
    "connect_timeout": 5,
    "keepalives_idle": 30,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


def _make_autocommit(conn: psycopg.Connection[Any]) -> None:
    # SQLAlchemy's connections begin transactions by themselves; the next user of this one expects none.
    conn.autocommit = True


def session_settings(settings: Settings, server_version: int) -> dict[str, str]:
    """What every connection of ours sets: bounds for waits, statements and transactions."""
    values = {
        "application_name": "tidemark",
        "timezone": "UTC",
        "lock_timeout": f"{settings.lock_timeout * 1000:.0f}ms",
        "statement_timeout": f"{settings.statement_timeout * 1000:.0f}ms",
        # A client that is gone must not hold a partition's lock.
        "idle_in_transaction_session_timeout": f"{settings.statement_timeout * 1000:.0f}ms",
    }
    if server_version >= _TRANSACTION_TIMEOUT_SINCE:
        values["transaction_timeout"] = f"{settings.transaction_timeout * 1000:.0f}ms"
    return values


class Database:
    """Lazily opened connections to one database. `threads` is how many of this process's threads may ask at once."""

    def __init__(self, url: str, settings: Settings, *, threads: int | None = None) -> None:
        self._url = url
        self._settings = settings
        self._threads = settings.pool_open if threads is None else threads
        self._lock = Lock()
        self._pid: int | None = None
        self._pool: ConnectionPool[psycopg.Connection[Any]] | None = None

    @property
    def url(self) -> str:
        return self._url

    @property
    def pool(self) -> "ConnectionPool[psycopg.Connection[Any]]":
        """This process's pool, opened at the first call."""
        with self._lock:
            if self._pool is None or self._pid != os.getpid():
                # After a fork the parent's pool is left alone: closing it here would end the parent's sessions.
                self._pool = self._open()
                self._pid = os.getpid()
            return self._pool

    def _open(self) -> "ConnectionPool[psycopg.Connection[Any]]":
        settings = self._settings
        return ConnectionPool(
            self._url,
            # What the URL says goes first.
            kwargs={**_NETWORK, **conninfo_to_dict(self._url), "autocommit": True},
            # Kept when idle: never more than there are threads to use them.
            min_size=min(settings.pool_idle, self._threads, settings.pool_open),
            max_size=settings.pool_open,
            max_lifetime=settings.pool_lifetime,
            timeout=settings.pool_wait,
            reconnect_timeout=_RECONNECT_SECONDS,
            configure=self._configure,
            reset=_make_autocommit,
            close_returns=True,
            open=True,
            name="tidemark",
        )

    def _configure(self, conn: psycopg.Connection[Any]) -> None:
        for name, value in session_settings(self._settings, conn.info.server_version).items():
            conn.execute("select set_config(%s, %s, false)", (name, value))

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """An autocommit connection from the pool; driver errors leave as Tidemark's own where they are such."""
        pool = self.pool
        with domain_errors():
            conn = self._acquire(pool)
            try:
                with conn:
                    yield conn
            finally:
                pool.putconn(conn)

    def _acquire(self, pool: "ConnectionPool[psycopg.Connection[Any]]") -> psycopg.Connection[Any]:
        """A connection that answered just now; PoolTimeout when there is none within the settings' `pool_wait`."""
        deadline = monotonic() + self._settings.pool_wait
        while True:
            try:
                conn = pool.getconn(timeout=min(_TURN_SECONDS, deadline - monotonic()))
            except PoolTimeout:
                if monotonic() < deadline:
                    continue
                raise PoolTimeout(
                    f"no connection to Postgres within {self._settings.pool_wait:g} s: it is not reachable, or all "
                    f"{self._settings.pool_open} connections of this process are in use"
                ) from None
            try:
                # One round trip, so that a connection the server closed meanwhile is replaced and not handed out.
                pool.check_connection(conn)
            except psycopg.Error:
                pool.putconn(conn)
                # What ended this one has most likely ended the others.
                pool.drain()
            except BaseException:
                pool.putconn(conn)
                raise
            else:
                return conn

    @property
    def engine(self) -> Engine:
        """SQLAlchemy on the same pool: it gets a connection, and closing it hands it back."""
        return create_engine("postgresql+psycopg://", creator=self._transactional, poolclass=NullPool)

    def _transactional(self) -> psycopg.Connection[Any]:
        conn = self._acquire(self.pool)
        # SQLAlchemy begins transactions by itself; the pool undoes this when the connection is back.
        conn.autocommit = False
        return conn

    def close(self) -> None:
        """Close this process's connections."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.close()
