"""A database in another cluster: nothing runs until it is rebased, and then nothing is lost, doubled or reordered."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.embedded.postgres import PostgresServer
from config.embedded.wheels import postgres_bin as wheel_bin
from config.errors import ForeignClusterError
from db.commit import commit_object
from db.discover import find_committed, save_seen, sweep
from db.materialize import materialize
from db.migrate import require_current, upgrade
from db.rebase import RebaseResult, rebase
from db.topics import create_topic, partition_ids
from db.trim import trim
from tests.support import Connect

OTHER_CLUSTER = 4711


def commit(conn: Connection[Any], key: str, partitions: Sequence[int]) -> int:
    count = len(partitions)
    return commit_object(conn, key, partitions, [2] * count, range(count), [1] * count, [0] * count)


def log(conn: Connection[Any], partition_id: int) -> list[tuple[Any, ...]]:
    return conn.execute(
        "select b.start_offset, o.key, b.byte_offset from tidemark.record_batches b "
        "join tidemark.objects o on o.id = b.object_id where b.partition_id = %s order by 1",
        (partition_id,),
    ).fetchall()


@pytest.fixture
def ids(conn: Connection[TupleRow]) -> list[int]:
    create_topic(conn, "orders", 2)
    return partition_ids(conn, "orders")


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
    counts = "select (select count(*) from tidemark.objects), (select count(*) from tidemark.record_batches)"
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
    trim(conn)
    assert conn.execute("select count(*) from tidemark.record_batch_events").fetchone() == (0,)
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


def test_rebase(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    with_history(connect, conn, ids)
    conn.execute("update tidemark.cluster set system_identifier = %s", (OTHER_CLUSTER,))
    (own,) = conn.execute("select system_identifier from pg_control_system()").fetchone() or (None,)
    assert rebase(conn) == RebaseResult(was=OTHER_CLUSTER, now=own, pending_events=6)
    continues(conn, ids)


@pytest.mark.parametrize("ahead", [10**6, 2**33])
def test_rebase_of_a_cluster_whose_transaction_ids_are_higher(
    ahead: int, connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    """As after a dump and restore into a young cluster, across an epoch too."""
    with_history(connect, conn, ids)
    shift = "(%s + {0}::text::numeric)::text::xid8"
    shifts: list[tuple[str, str]] = [
        ("record_batch_events", "xid"),
        ("objects", "xid"),
        ("topic_partitions", "seen_xid"),
    ]
    for table, column in shifts:
        conn.execute(f"update tidemark.{table} set {column} = {shift.format(column)}".encode(), (ahead,))
    conn.execute(
        f"update tidemark.topic_partitions set in_flight = array(select {shift.format('x')} from unnest(in_flight) x)",
        (ahead,),
    )
    conn.execute("update tidemark.fan_out_state set seen = %s::pg_snapshot", (f"{ahead + 5000}:{ahead + 5000}:",))
    conn.execute("update tidemark.cluster set system_identifier = %s", (OTHER_CLUSTER,))
    result = rebase(conn)
    assert result
    assert result.pending_events == 6
    save_seen(conn, find_committed(conn).snapshot)
    commit(conn, "seen by fan-out", ids[1:])
    assert [(p.partition_id, p.events) for p in find_committed(conn).partitions] == [(ids[1], 1)]
    drain(conn, ids)
    assert log(conn, ids[0]) == in_order([*PLACED, *PENDING])
    assert log(conn, ids[1]) == in_order([("consumed", 1), ("pending", 0), ("seen by fan-out", 0)])


def test_in_its_own_cluster_nothing_is_done_unless_forced(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    with_history(connect, conn, ids)
    before = conn.execute("select xid::text, id from tidemark.record_batch_events order by 1, 2").fetchall()
    assert rebase(conn) is None
    assert conn.execute("select xid::text, id from tidemark.record_batch_events order by 1, 2").fetchall() == before
    forced = rebase(conn, force=True)
    assert forced
    assert forced.pending_events == 6
    continues(conn, ids)


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
    with PostgresServer.start(server_directory / "second", bin_dir=postgres_bin, settings={"fsync": "off"}) as server:
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
        assert (result.was != result.now, result.pending_events) == (True, 6)
        # Brings the grants, which --no-privileges left behind.
        upgrade(second_server.url())
        continues(restored, ids)
