"""Connections: one pool per process, and SQLAlchemy's engine on top of the same pool.

The pool opens its first connection when one is asked for, never before: a connection that crosses a fork is
shared by two processes and corrupts both. `Database` remembers the process it was opened in and opens anew in another.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool
from sqlalchemy import Engine, create_engine
from sqlalchemy.pool import NullPool

from config.settings import Settings
from db.translate import domain_errors

# TransactionTimeout exists since this version.
_TRANSACTION_TIMEOUT_SINCE = 170_000
_RECONNECT_SECONDS = 5.0


def session_settings(settings: Settings, server_version: int) -> dict[str, str]:
    """What every connection of ours sets: bounds for waits, statements and transactions."""
    values = {
        "application_name": "tidemark",
        "timezone": "UTC",
        "lock_timeout": f"{settings.lock_timeout * 1000:.0f}ms",
        "statement_timeout": f"{settings.statement_timeout * 1000:.0f}ms",
        # A client that is gone must not hold a partition's lock.
        "idle_in_transaction_session_timeout": f"{settings.statement_timeout * 1000:.0f}ms",
        # Invariant 4, whatever the role's or database's default: an offset that was seen must survive a crash.
        "synchronous_commit": "on",
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
            kwargs={"autocommit": True},
            # Kept when idle: never more than there are threads to use them.
            min_size=min(settings.pool_idle, self._threads, settings.pool_open),
            max_size=settings.pool_open,
            max_lifetime=settings.pool_lifetime,
            timeout=settings.pool_wait,
            # The pool doubles its pauses between attempts; giving up early, the next caller tries at once.
            reconnect_timeout=_RECONNECT_SECONDS,
            configure=self._configure,
            # One round trip, so that a connection the server closed meanwhile is replaced and not handed out.
            check=ConnectionPool.check_connection,
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
        with domain_errors(), self.pool.connection() as conn:
            yield conn

    @property
    def engine(self) -> Engine:
        """SQLAlchemy on the same pool: it gets a connection, and closing it hands it back."""
        return create_engine("postgresql+psycopg://", creator=self._transactional, poolclass=NullPool)

    def _transactional(self) -> psycopg.Connection[Any]:
        conn = self.pool.getconn()
        # SQLAlchemy begins transactions by itself; the pool resets this when the connection is back.
        conn.autocommit = False
        return conn

    def close(self) -> None:
        """Close this process's connections."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.close()
