"""The servers all tests share, and a database of its own for each test that wants one."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.rows import TupleRow
from redis import Redis

from tests.servers import PostgresServer, RedisServer, directory_for_servers
from tests.support import Connect

_TEMPLATE = "tidemark_template"

# The shared server is never crashed (tests that crash one start their own), so nothing needs to reach the disk.
_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "200", "max_wal_size": "256MB"}


@pytest.fixture(scope="session")
def server_directory() -> Iterator[Path]:
    with directory_for_servers() as directory:
        yield directory


@pytest.fixture(scope="session")
def postgres_bin() -> Path | None:
    return _path_from("TIDEMARK_TEST_POSTGRES_BIN")


@pytest.fixture(scope="session")
def redis_binary() -> Path | None:
    return _path_from("TIDEMARK_TEST_REDIS_BIN")


def _path_from(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


@pytest.fixture(scope="session")
def postgres_server(server_directory: Path, postgres_bin: Path | None) -> Iterator[PostgresServer]:
    with PostgresServer(server_directory / "postgres", bin_dir=postgres_bin, settings=_SETTINGS).start() as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(server_directory: Path, redis_binary: Path | None) -> Iterator[RedisServer]:
    with RedisServer(server_directory / "redis", binary=redis_binary).start() as server:
        yield server


@pytest.fixture(scope="session")
def template_database(postgres_server: PostgresServer) -> str:
    """Migrate once; every test clones the result."""
    from db.migrate import upgrade  # noqa: PLC0415 -- tests of the servers alone run without the db package

    name = sql.Identifier(_TEMPLATE)
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(name))
        upgrade(postgres_server.url(_TEMPLATE))
        # A connection to the template would make cloning fail.
        admin.execute(sql.SQL("alter database {} with allow_connections false").format(name))
    return _TEMPLATE


@pytest.fixture
def database_url(postgres_server: PostgresServer, template_database: str) -> Iterator[str]:
    name = f"test_{uuid4().hex[:12]}"
    database, template = sql.Identifier(name), sql.Identifier(template_database)
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        # To copy the files takes two thirds of the time that the default does, which writes each page to the WAL.
        admin.execute(sql.SQL("create database {} template {} strategy file_copy").format(database, template))
    yield postgres_server.url(name)
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(database))


@pytest.fixture
def connect(database_url: str) -> Iterator[Connect]:
    with ExitStack() as stack:

        def open_one(*, autocommit: bool = True) -> Connection[TupleRow]:
            connection = psycopg.connect(database_url, autocommit=autocommit)
            # Not the connection's own context manager, which would commit what a test left open.
            stack.callback(connection.close)
            return connection

        yield open_one


@pytest.fixture
def conn(connect: Connect) -> Connection[TupleRow]:
    return connect()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    with Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url
