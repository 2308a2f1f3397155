"""Connections: one pool per process, and single connections for commands.

The pool opens its first connection when one is asked for, never before: a connection that crosses a fork is shared by
two processes and corrupts both. `Database` remembers the process it was opened in, and opens a new pool in another.

psycopg_pool alone is slow to notice that Postgres is back after an outage. It checks its idle connections one by one
and pauses twice as long after each dead one, so ten of them outlast any time-out. And when it gives up an attempt to
connect, no other attempt follows for the callers that wait. So here the first dead connection empties the pool,
attempts to connect are short, and a waiting caller asks again every second, which starts the next attempt.

No error of this module holds a password. libpq repeats an address that it cannot read, so its words are not passed on.
"""

import os
import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from math import inf
from threading import Lock
from time import monotonic
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import PGconn, Ping
from psycopg_pool import ConnectionPool, PoolTimeout

from config.errors import SettingsError, TransientDatabaseError
from config.settings import Settings
from db.statements import Connection, run
from db.translate import domain_errors

# How long a connection without the pool may take to be made, when its caller sets no time-out.
CONNECT_SECONDS = 10
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
# libpq waits no shorter.
_LEAST_CONNECT_SECONDS = 2


def read_address(url: str) -> dict[str, Any]:
    """The parts of a database's address; SettingsError, which repeats nothing of it, when it cannot be read."""
    try:
        parts = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        parts = {}
    is_url = url.startswith(("postgresql://", "postgres://"))
    # Where a password is not percent-encoded, the rest of it is taken for the host, the port or the database.
    misread = is_url and any("@" in str(parts.get(name, "")) for name in ("host", "dbname"))
    if (url and not parts) or misread or not re.fullmatch(r"[\d,]*", str(parts.get("port") or "")):
        raise SettingsError(
            "the database's address (TIDEMARK_DATABASE_URL) cannot be read. Write "
            "postgresql://user:password@host:port/database, with special characters of the password percent-encoded "
            "(@ as %40, / as %2F), and after a ? only parameters that libpq knows, such as sslmode."
        ) from None
    return parts


def _server(parts: dict[str, Any]) -> str:
    host, port = parts.get("host") or "the default host", parts.get("port") or 5432
    return f"Postgres at {host}:{port}, database {parts.get('dbname') or parts.get('user') or 'by default'}"


class _WatchedConnection(psycopg.Connection[Any]):
    """A connection that does not wait for ever for a server that is frozen or cut off.

    Such a server keeps its sockets open, and its own time-outs do not fire. So when no answer has come for `patience`
    seconds, it is asked for a sign of life on a new connection. A statement that merely takes long goes on, up to
    `limit` seconds: by then the server would have cancelled it. (A pooler in between gives signs of life of its own.)
    """

    patience = inf
    limit = inf

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        return super().wait(self._watch(gen), *args, **kwargs)

    def _watch(self, gen: Any) -> Generator[Any, Any, Any]:
        began = monotonic()
        look = began + self.patience
        try:
            state = next(gen)
            while True:
                # psycopg comes back every tenth of a second, also when nothing is there to read.
                ready = yield state
                now = monotonic()
                if not ready and now > look and (now - began > self.limit or not self._is_alive()):
                    info = self.info
                    server = _server({"host": info.host, "port": info.port, "dbname": info.dbname})
                    # What cleans up behind this error must not wait again.
                    self.pgconn.finish()
                    raise TransientDatabaseError(
                        f"{server}: no answer and no sign of life, it is frozen or cut off. Look after the server that "
                        f"TIDEMARK_DATABASE_URL names."
                    )
                if ready or now > look:
                    look = monotonic() + self.patience
                state = gen.send(ready)
        except StopIteration as done:
            return done.value

    def _is_alive(self) -> bool:
        question = make_conninfo(
            host=self.info.host,
            hostaddr=self.info.hostaddr or None,
            port=self.info.port,
            connect_timeout=max(_LEAST_CONNECT_SECONDS, int(self.patience)),
        )
        return PGconn.ping(question.encode()) in {Ping.OK, Ping.REJECT}


def open_connection(url: str, *, autocommit: bool = True, timeout: float | None = None) -> Connection:
    """One connection without the pool. A server that is away is reported at once, where the pool would try again.

    `timeout` in seconds, 4 or more, is how long the server may show no sign of life, now and at each later answer.

    Raises SettingsError for an address that cannot be read, TransientDatabaseError when there is no connection.
    """
    parts = read_address(url)
    patience = CONNECT_SECONDS if timeout is None else timeout / 2
    try:
        # Half of the time for an attempt: a host often has two addresses.
        conn = (psycopg.Connection if timeout is None else _WatchedConnection).connect(
            url, autocommit=autocommit, connect_timeout=max(_LEAST_CONNECT_SECONDS, int(patience))
        )
    except psycopg.OperationalError as error:
        reason = str(error).partition("\n")[0]
        raise TransientDatabaseError(
            f"{_server(parts)}: {reason}. Start it, or correct TIDEMARK_DATABASE_URL."
        ) from None
    if isinstance(conn, _WatchedConnection):
        conn.patience = patience
    return conn


@contextmanager
def connect(url: str, settings: Settings, *, timeout: float | None = None) -> Iterator[Connection]:
    """An autocommit connection without the pool (see `open_connection`), set up like those of the pool."""
    with closing(open_connection(url, timeout=timeout)) as conn, domain_errors():
        if isinstance(conn, _WatchedConnection):
            conn.limit = settings.statement_timeout + conn.patience
        _configure(conn, settings)
        yield conn


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


def _configure(conn: Connection, settings: Settings) -> None:
    values = session_settings(settings, conn.info.server_version)
    run(conn, "session_settings", (list(values), list(values.values())))


class Database:
    """Lazily opened connections to one database. `threads` is how many of this process's threads may ask at once."""

    def __init__(self, url: str, settings: Settings, *, threads: int | None = None) -> None:
        self._url = url
        self._settings = settings
        self._threads = settings.pool_open if threads is None else threads
        self._lock = Lock()
        self._pid: int | None = None
        self._pool: ConnectionPool[Connection] | None = None

    @property
    def pool(self) -> "ConnectionPool[Connection]":
        """This process's pool, opened at the first call; SettingsError for an address that cannot be read."""
        settings = self._settings
        with self._lock:
            # After a fork the parent's pool is left alone: closing it here would end the parent's sessions.
            if self._pool is None or self._pid != os.getpid():
                self._pool = ConnectionPool(
                    self._url,
                    # What the URL says goes first.
                    kwargs={**_NETWORK, **read_address(self._url), "autocommit": True},
                    # Kept when idle: never more than there are threads to use them.
                    min_size=min(settings.pool_idle, self._threads, settings.pool_open),
                    max_size=settings.pool_open,
                    max_lifetime=settings.pool_lifetime,
                    timeout=settings.pool_wait,
                    reconnect_timeout=_RECONNECT_SECONDS,
                    configure=lambda conn: _configure(conn, settings),
                    open=True,
                    name="tidemark",
                )
                self._pid = os.getpid()
            return self._pool

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """An autocommit connection from the pool; driver errors leave as Tidemark's own where they stand for one."""
        pool = self.pool
        conn = self._acquire(pool)
        try:
            with domain_errors(), conn:
                yield conn
        finally:
            pool.putconn(conn)

    def _acquire(self, pool: "ConnectionPool[Connection]") -> Connection:
        """A connection that answered just now; PoolTimeout when there is none within the settings' `pool_wait`."""
        deadline = monotonic() + self._settings.pool_wait
        while True:
            try:
                conn = pool.getconn(timeout=min(_TURN_SECONDS, deadline - monotonic()))
            except PoolTimeout:
                if monotonic() < deadline:
                    continue
                raise PoolTimeout(
                    f"{_server(read_address(self._url))}: no connection within {self._settings.pool_wait:g} s. It is "
                    f"not reachable, or all {self._settings.pool_open} connections of this process are in use."
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

    def close(self) -> None:
        """Close this process's connections."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None and self._pid == os.getpid():
            pool.close()
