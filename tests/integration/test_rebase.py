"""A database in another cluster: nothing runs until it is rebased, and then nothing is lost, doubled or reordered."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.embedded.host import postgres_bin as wheel_bin
from config.errors import ForeignClusterError, TransientDatabaseError
from db.audit import audit
from db.discover import find_committed, save_fan_out, sweep
from db.materialize import materialize
from db.migrate import require_current, upgrade
from db.producers import init_producer
from db.rebase import RebaseResult, rebase
from db.statements import run
from db.topics import create_topic, partition_ids
from tests.integration import conftest
from tests.integration.conftest import make_topic
from tests.servers import PostgresServer
from tests.support import Connect, wait_until

OTHER_CLUSTER = 4711


commit = partial(conftest.commit, records=2, length=1)


def log(conn: Connection[Any], partition_id: int) -> list[tuple[Any, ...]]:
    return conn.execute(
        "select start_offset, object_key, byte_offset from tidemark.record_batches where partition_id = %s order by 1",
        (partition_id,),
    ).fetchall()


@pytest.fixture
def ids(conn: Connection[TupleRow]) -> list[int]:
    return make_topic(conn, partitions=2)


def with_history(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """A log with consumed, pending and late events: what a backup catches in the middle of things."""
    late = connect()
    late.execute("begin")
    commit(late, "late", [ids[0]] * 2)
    commit(conn, "consumed", [ids[0], ids[1], ids[0]])
    materialize(conn, ids, events_per_partition=1)
    materialize(conn, ids, events_per_partition=1)
    commit(conn, "half", [ids[0]] * 3)
    materialize(conn, ids[:1], events_per_partition=1)
    late.execute("commit")
    commit(conn, "pending", [ids[1], ids[0]])


# What with_history leaves, in the order in which it must come: late ones first.
PLACED = [("consumed", 0), ("consumed", 2), ("half", 0)]
PENDING = [("late", 0), ("late", 1), ("half", 1), ("half", 2), ("pending", 1)]


def in_order(expected: list[tuple[str, int]]) -> list[tuple[Any, ...]]:
    return [(2 * i, *batch) for i, batch in enumerate(expected)]


def drain(conn: Connection[Any], ids: list[int]) -> None:
    while materialize(conn, ids, events_per_partition=2).events_processed:
        pass


def refuses(conn: Connection[Any], ids: list[int]) -> None:
    counts = "select (select count(*) from tidemark.objects), (select count(*) from tidemark.runs)"
    before = conn.execute(counts).fetchone()
    calls: list[Callable[[], object]] = [lambda: commit(conn, "refused", ids), lambda: materialize(conn, ids)]
    for call in calls:
        with pytest.raises(ForeignClusterError, match="celery -A tasks rebase"):
            call()
    assert conn.execute(counts).fetchone() == before


def continues(conn: Connection[Any], ids: list[int]) -> None:
    """After a rebase: what was pending first and in order, then what is new; nothing twice, nothing lost."""
    assert {p.partition_id: p.events for p in sweep(conn)} == {ids[0]: 5, ids[1]: 1}
    commit(conn, "new", ids)
    drain(conn, ids)
    assert log(conn, ids[0]) == in_order([*PLACED, *PENDING, ("new", 0)])
    assert log(conn, ids[1]) == in_order([("consumed", 1), ("pending", 0), ("new", 1)])
    assert list(sweep(conn)) == []
    assert audit(conn).violations == ()
    # A replay is still known.
    commit(conn, "pending", [ids[1], ids[0]])
    commit(conn, "newer", ids[:1])
    drain(conn, ids)
    assert log(conn, ids[0])[-1][1] == "newer"
    assert len(log(conn, ids[0])) == len(PLACED) + len(PENDING) + 2


def test_another_cluster_is_refused(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    with_history(connect, conn, ids)
    conn.execute("update tidemark.cluster set system_identifier = %s", (OTHER_CLUSTER,))
    refuses(conn, ids)


def now_of(conn: Connection[Any]) -> int:
    (own,) = conn.execute("select system_identifier from pg_control_system()").fetchone() or (0,)
    return int(own)


def test_rebase(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    with_history(connect, conn, ids)
    conn.execute("update tidemark.cluster set system_identifier = %s", (OTHER_CLUSTER,))
    assert rebase(conn) == RebaseResult(was=OTHER_CLUSTER, now=now_of(conn))
    continues(conn, ids)


def test_history_is_neither_read_nor_written(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """One row changes, whatever there is."""
    with_history(connect, conn, ids)
    rows = "select ctid, xmin::text, * from tidemark.{} order by 1"
    tables = ("record_batch_events", "runs", "passes", "objects", "fan_outs", "topic_partitions", "sweeps")
    before = [conn.execute(rows.format(table).encode()).fetchall() for table in tables]
    assert rebase(conn, force=True)
    assert [conn.execute(rows.format(table).encode()).fetchall() for table in tables] == before


@pytest.mark.parametrize("ahead", [10**6, 2**33])
def test_rebase_of_a_cluster_whose_transaction_ids_are_higher(
    ahead: int, connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    """As after a dump and restore into a young cluster, across an epoch too."""
    conn.execute("update tidemark.cluster set tx_base = %s", (ahead,))
    with_history(connect, conn, ids)
    # Its fan-out saw all of it, and knows of a transaction that never ended.
    found = find_committed(conn)
    save_fan_out(conn, replace(found, seen_tx=found.seen_tx + 5, in_flight=[found.seen_tx + 4]))
    conn.execute("update tidemark.cluster set system_identifier = %s, tx_base = 0", (OTHER_CLUSTER,))
    assert rebase(conn)
    commit(conn, "seen by fan-out", ids[1:])
    assert [(p.partition_id, p.events) for p in find_committed(conn).partitions] == [(ids[1], 1)]
    drain(conn, ids)
    assert log(conn, ids[0]) == in_order([*PLACED, *PENDING])
    assert log(conn, ids[1]) == in_order([("consumed", 1), ("pending", 0), ("seen by fan-out", 0)])


def test_without_the_row_of_the_cluster(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """As when tables were restored one by one."""
    conn.execute("update tidemark.cluster set tx_base = 1000000")
    with_history(connect, conn, ids)
    conn.execute("delete from tidemark.cluster")
    refuses(conn, ids)
    assert rebase(conn) == RebaseResult(was=None, now=now_of(conn))
    continues(conn, ids)


def test_in_its_own_cluster_nothing_is_done_unless_forced(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    with_history(connect, conn, ids)
    before = conn.execute("select ctid, * from tidemark.cluster").fetchall()
    assert rebase(conn) is None
    assert conn.execute("select ctid, * from tidemark.cluster").fetchall() == before
    assert rebase(conn, force=True)
    continues(conn, ids)


def test_commits_that_are_under_way_are_waited_for(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    """And one that comes meanwhile waits, and never goes on at the old base."""
    under_way, early, meanwhile = connect(autocommit=False), connect(autocommit=False), connect()
    commit(under_way, "under way", ids[:1])
    early.execute("set transaction isolation level repeatable read")
    early.execute("select 1 from tidemark.topics")
    with ThreadPoolExecutor(2) as pool:
        rebasing = pool.submit(rebase, conn, force=True)
        wait_until(lambda: waiting(connect(), conn))
        coming = pool.submit(commit, meanwhile, "meanwhile", ids[:1])
        wait_until(lambda: waiting(connect(), meanwhile))
        assert not rebasing.done()
        under_way.commit()
        assert rebasing.result(10)
        with pytest.raises(ForeignClusterError):
            coming.result(10)
    # A snapshot from before finds no base at all, not the old one.
    with pytest.raises(ForeignClusterError):
        commit(early, "early", ids[:1])
    early.rollback()
    commit(meanwhile, "meanwhile", ids[:1])
    drain(conn, ids)
    assert [key for _, key, _ in log(conn, ids[0])] == ["under way", "meanwhile"]


def waiting(watcher: Connection[Any], conn: Connection[Any]) -> bool:
    with watcher:
        row = watcher.execute(
            "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s", (conn.info.backend_pid,)
        ).fetchone()
    return bool(row and row[0])


def test_a_pass_under_way_is_waited_for(
    connect: Connect, conn: Connection[TupleRow], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(conn, "a", ids)
    placing = connect(autocommit=False)
    run(placing, "lock_partitions", (ids,))
    monkeypatch.setattr("db.rebase.LOCK_TIMEOUT", "300ms")
    with pytest.raises(TransientDatabaseError, match="stop them"):
        rebase(conn, force=True)
    # Nothing to do is told at once.
    assert rebase(conn) is None
    placing.rollback()
    assert rebase(conn, force=True)


def test_sequences_that_were_left_behind(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """As after a restore of data alone, or a switch to a logical replica."""
    with_history(connect, conn, ids)
    save_fan_out(conn, find_committed(conn))
    list(sweep(conn))
    producer = init_producer(conn)
    for table in ("objects", "topic_partitions", "fan_outs", "sweeps", "producers", "collections"):
        conn.execute(f"alter sequence tidemark.{table}_id_seq restart with 1".encode())
    conn.execute("update tidemark.cluster set system_identifier = %s", (OTHER_CLUSTER,))
    assert rebase(conn)
    continues(conn, ids)
    create_topic(conn, "more", 2)
    assert min(partition_ids(conn, "more")) > max(ids)
    assert init_producer(conn).producer_id > producer.producer_id
    found = find_committed(conn)
    save_fan_out(conn, found)
    assert find_committed(conn).partitions == ()
    # Where they are right they stay.
    before = conn.execute("select nextval('tidemark.objects_id_seq')").fetchone()
    assert before
    assert rebase(conn, force=True)
    assert conn.execute("select nextval('tidemark.objects_id_seq')").fetchone() == (before[0] + 1,)


def test_rebasing_twice(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    with_history(connect, conn, ids)
    for _ in range(2):
        conn.execute("update tidemark.cluster set system_identifier = %s", (OTHER_CLUSTER,))
        assert rebase(conn)
    continues(conn, ids)


def test_twice_with_commits_and_a_half_read_transaction_between(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    with_history(connect, conn, ids)
    rebase(conn, force=True)
    commit(conn, "between", ids)
    materialize(conn, ids, events_per_partition=2)
    rebase(conn, force=True)
    drain(conn, ids)
    assert log(conn, ids[0]) == in_order([*PLACED, *PENDING, ("between", 0)])
    assert log(conn, ids[1]) == in_order([("consumed", 1), ("pending", 0), ("between", 1)])


def test_a_transaction_older_than_the_rebase(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """It had its id before, and commits after."""
    late = connect()
    late.execute("begin")
    late.execute("select pg_current_xact_id()")
    with_history(connect, conn, ids)
    rebase(conn, force=True)
    drain(conn, ids)
    commit(late, "older", ids[:1])
    late.execute("commit")
    drain(conn, ids)
    assert log(conn, ids[0]) == in_order([*PLACED, *PENDING, ("older", 0)])


@pytest.fixture
def second_server(server_directory: Path, postgres_bin: Path | None) -> Iterator[PostgresServer]:
    with PostgresServer(server_directory / "second", bin_dir=postgres_bin, settings={"fsync": "off"}).start() as server:
        yield server


def test_dump_and_restore(
    connect: Connect,
    conn: Connection[TupleRow],
    ids: list[int],
    database_url: str,
    second_server: PostgresServer,
    postgres_bin: Path | None,
) -> None:
    """The real thing: pg_dump here, restored into a cluster that has used hardly any transaction ids."""
    with_history(connect, conn, ids)
    programs = postgres_bin or wheel_bin()
    dump = subprocess.run(
        [programs / "pg_dump", "--no-privileges", "-d", database_url], capture_output=True, check=True, timeout=30
    ).stdout
    subprocess.run(
        [programs / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", second_server.url()],
        input=dump,
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=30,
    )
    with psycopg.connect(second_server.url(), autocommit=True) as restored:
        require_current(restored)
        refuses(restored, ids)
        result = rebase(restored)
        assert result
        assert result.was != result.now
        # Brings the grants, which --no-privileges left behind.
        upgrade(second_server.url())
        continues(restored, ids)
