"""What was answered survives a crash (invariant 4), whatever a role, session or pooler has for synchronous_commit.

The server here reaches the disk, and by itself only every ten seconds: what a commit does not flush, a crash takes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.settings import STRATEGIES, Strategy
from db.fetch import fetch_batches
from db.materialize import materialize
from db.migrate import upgrade
from tests.integration.conftest import commit, make_topic
from tests.servers import PostgresServer
from tests.support import Connect, wait_until

WEAK = ["off", "local"]
LEVELS = [*WEAK, "on", "remote_write", "remote_apply"]


@pytest.fixture(scope="module")
def server(server_directory: Path, postgres_bin: Path | None) -> Iterator[PostgresServer]:
    settings = {
        "fsync": "on",
        "wal_writer_delay": "10s",
        "bgwriter_lru_maxpages": "0",
        "autovacuum": "off",
        "max_prepared_transactions": "5",
    }
    with PostgresServer(server_directory / "durable", bin_dir=postgres_bin, settings=settings).start() as started:
        upgrade(started.url())
        yield started


@pytest.fixture(scope="module")
def database_url(server: PostgresServer) -> str:
    return server.url()


@pytest.fixture
def ids(conn: Connection[TupleRow]) -> list[int]:
    name = uuid4().hex
    return make_topic(conn, name, partitions=2)


@pytest.fixture
def key() -> str:
    return uuid4().hex


def show(conn: Connection[Any]) -> str:
    row = conn.execute("show synchronous_commit").fetchone()
    assert row
    return str(row[0])


@pytest.fixture
def role_that_does_not_wait(server: PostgresServer) -> Iterator[None]:
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute("alter role tidemark set synchronous_commit = off")
    yield
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute("alter role tidemark reset synchronous_commit")


def crash(server: PostgresServer) -> Connection[TupleRow]:
    server.kill()
    server.restart()
    return psycopg.connect(server.url(), autocommit=True)


@pytest.mark.parametrize("level", LEVELS)
def test_a_commit_raises_the_level_for_its_transaction(
    level: str, connect: Connect, conn: Connection[TupleRow], ids: list[int], key: str
) -> None:
    block = connect(autocommit=False)
    block.execute(f"set synchronous_commit = {level}".encode())
    block.commit()
    expected = "on" if level in WEAK else level
    for _ in ("the first", "a replay"):
        commit(block, key, ids)
        assert show(block) == expected
        block.commit()
        assert show(block) == level
        block.rollback()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_so_does_materializing(
    strategy: Strategy, level: str, connect: Connect, conn: Connection[TupleRow], ids: list[int], key: str
) -> None:
    table = f"levels_{key}"
    conn.execute(f"create table {table} (level text)".encode())
    conn.execute(
        f"create function {table}() returns trigger language plpgsql as $$ begin "
        f"insert into {table} values (current_setting('synchronous_commit')); return null; end $$".encode()
    )
    conn.execute(f"create trigger note after insert on tidemark.runs execute function {table}()".encode())
    try:
        commit(conn, key, ids)
        worker = connect()
        worker.execute(f"set synchronous_commit = {level}".encode())
        assert materialize(worker, ids, strategy=strategy).events_processed == 2
        assert show(worker) == level
        levels = conn.execute(f"select level from {table}".encode()).fetchall()
        assert levels == [("on" if level in WEAK else level,)]
    finally:
        conn.execute("drop trigger note on tidemark.runs")


@pytest.mark.usefixtures("role_that_does_not_wait")
def test_a_commit_survives_a_crash(server: PostgresServer, connect: Connect, ids: list[int], key: str) -> None:
    broker = connect()
    assert show(broker) == "off"
    object_id = commit(broker, key, ids)
    with crash(server) as conn:
        assert conn.execute("select id from tidemark.objects where key = %s", (key,)).fetchone() == (object_id,)
        assert materialize(conn, ids).events_processed == 2


def asynchronously(conn: Connection[Any], key: str, ids: Sequence[int]) -> int:
    """A commit that is visible, and that a crash would take."""
    with conn.transaction():
        object_id = commit(conn, key, ids)
        conn.execute("set local synchronous_commit = off")
    return object_id


@pytest.mark.parametrize("replayed", [True, False])
def test_a_replay_makes_the_first_commit_durable(
    replayed: bool,  # noqa: FBT001
    server: PostgresServer,
    connect: Connect,
    conn: Connection[TupleRow],
    ids: list[int],
    key: str,
) -> None:
    """It writes nothing, so by itself it would wait for nothing. (And without it the commit is gone, as intended.)"""
    # A sequence writes to the log now and then; not in the replay, or that would be what makes it wait.
    for number in range(3):
        commit(conn, f"{key}/{number}", ids)
    first = asynchronously(connect(), key, ids)
    if replayed:
        assert commit(connect(), key, ids) == first
    with crash(server) as after:
        found = after.execute("select id from tidemark.objects where key = %s", (key,)).fetchone()
        assert found == ((first,) if replayed else None)


@pytest.mark.usefixtures("role_that_does_not_wait")
def test_an_offset_that_was_read_means_the_same_after_a_crash(
    server: PostgresServer, connect: Connect, ids: list[int], key: str
) -> None:
    """A transaction that is prepared outlives the crash, and would get the offsets if they were lost."""
    other = connect(autocommit=False)
    commit(other, f"{key}/prepared", ids[:1], records=5)
    other.execute(f"prepare transaction '{key}'".encode())
    other.commit()
    commit(connect(), f"{key}/committed", ids[:1], records=3)
    worker = connect()
    assert show(worker) == "off"
    assert materialize(worker, ids).events_processed == 1
    seen = fetch_batches(connect(), ids[0], 0)
    assert [batch.object_key for batch in seen] == [f"{key}/committed"]
    with crash(server) as conn:
        conn.execute(f"commit prepared '{key}'".encode())
        assert materialize(conn, ids).events_processed == 1
        again = fetch_batches(conn, ids[0], 0)
        assert again[:1] == seen
        assert [batch.object_key for batch in again] == [f"{key}/committed", f"{key}/prepared"]


def set_standbys(conn: Connection[Any], names: str) -> None:
    conn.execute("set synchronous_commit = local")
    conn.execute(f"alter system set synchronous_standby_names = '{names}'".encode())
    conn.execute("select pg_reload_conf()")
    wait_until(lambda: conn.execute("show synchronous_standby_names").fetchone() == (names,))


def waits_for_a_standby(conn: Connection[Any], other: Connection[Any]) -> Callable[[], bool]:
    def waits() -> bool:
        row = conn.execute(
            "select wait_event from pg_stat_activity where pid = %s", (other.info.backend_pid,)
        ).fetchone()
        return row == ("SyncRep",)

    return waits


def test_a_replay_waits_for_the_standby_like_the_first_commit(
    connect: Connect, conn: Connection[TupleRow], ids: list[int], key: str
) -> None:
    """The first one's session is ended while it waits; what it committed is visible by that, and on no standby."""
    for number in range(3):
        commit(conn, f"{key}/{number}", ids)
    first, second = connect(), connect()
    set_standbys(conn, "nobody")
    try:
        with ThreadPoolExecutor(2) as threads:
            lost = threads.submit(commit, first, key, ids)
            wait_until(waits_for_a_standby(conn, first))
            conn.execute("select pg_terminate_backend(%s)", (first.info.backend_pid,))
            with pytest.raises(psycopg.Error):
                lost.result(10)
            (object_id,) = conn.execute("select id from tidemark.objects where key = %s", (key,)).fetchone() or (None,)
            assert object_id
            outcome = threads.submit(commit, second, key, ids)
            try:
                wait_until(lambda: outcome.done() or waits_for_a_standby(conn, second)())
                assert not outcome.done()
            finally:
                set_standbys(conn, "")
            assert outcome.result(10) == object_id
    finally:
        set_standbys(conn, "")
