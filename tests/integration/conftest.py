"""Factories: topics, commits, apps. Their defaults are what a test does not care about."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import psycopg
import pytest

from db.commit import commit_object
from db.topics import create_topic, partition_ids
from tasks.app import TidemarkApp
from tests.support_commands import Cli, app_for


def make_topic(conn: psycopg.Connection[Any], name: str = "orders", *, partitions: int = 1) -> list[int]:
    """Create a topic; returns the ids of its partitions."""
    create_topic(conn, name, partitions)
    return partition_ids(conn, name)


def commit(
    conn: psycopg.Connection[Any],
    key: str,
    ids: Sequence[int],
    records: int = 1,
    *,
    length: int = 10,
    timestamp: int = 0,
) -> int:
    """Commit an object with a batch for each of `ids`, one behind the other; returns the object's id."""
    n = len(ids)
    offsets = range(0, n * length, length)
    return commit_object(conn, key, ids, [records] * n, offsets, [length] * n, [timestamp] * n)


class MakeApp(Protocol):
    """Makes an app on the test's database and Redis; `changes` are settings. It is closed with the test."""

    def __call__(self, **changes: Any) -> TidemarkApp: ...


@pytest.fixture
def make_app(database_url: str, redis_url: str) -> Iterator[MakeApp]:
    with ExitStack() as stack:

        def make(**changes: Any) -> TidemarkApp:
            return stack.enter_context(app_for(**{"database_url": database_url, "broker_url": redis_url, **changes}))

        yield make


@pytest.fixture
def app(make_app: MakeApp) -> TidemarkApp:
    return make_app()


@pytest.fixture
def cli(app: TidemarkApp) -> Cli:
    return Cli(app)
