"""Fan-out and sweep: who finds which work."""

from collections.abc import Sequence
from typing import Any

import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

import db.discover
from db.commit import commit_object
from db.discover import Committed, Pending, find_committed, save_seen, sweep
from db.materialize import materialize
from db.topics import create_topic, partition_ids
from tests.support import Connect


@pytest.fixture
def ids(conn: Connection[TupleRow]) -> list[int]:
    create_topic(conn, "orders", 5)
    return partition_ids(conn, "orders")


def commit(conn: Connection[Any], key: str, partitions: Sequence[int]) -> None:
    count = len(partitions)
    commit_object(conn, key, partitions, [1] * count, [0] * count, [1] * count, [0] * count)


def found(committed: Committed) -> dict[int, int]:
    return {pending.partition_id: pending.events for pending in committed.partitions}


def fan_out(conn: Connection[Any]) -> dict[int, int]:
    committed = find_committed(conn)
    save_seen(conn, committed.snapshot)
    return found(committed)


def test_partitions_of_new_commits(conn: Connection[TupleRow], ids: list[int]) -> None:
    assert fan_out(conn) == {}
    commit(conn, "a", [ids[0], ids[1], ids[0]])
    commit(conn, "b", [ids[1]])
    committed = find_committed(conn)
    assert found(committed) == {ids[0]: 2, ids[1]: 2}
    assert (committed.commits, committed.complete) == (2, True)
    save_seen(conn, committed.snapshot)
    assert fan_out(conn) == {}
    commit(conn, "c", [ids[2]])
    assert fan_out(conn) == {ids[2]: 1}


def test_a_lost_answer_is_found_again(conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", ids[:1])
    assert found(find_committed(conn)) == found(find_committed(conn)) == {ids[0]: 1}


def test_a_commit_that_was_open_below_the_snapshot(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    late, later = connect(), connect()
    late.execute("begin")
    commit(late, "late", ids[:1])
    commit(conn, "early", ids[1:2])
    later.execute("begin")
    commit(later, "later", ids[2:3])
    assert fan_out(conn) == {ids[1]: 1}
    late.execute("commit")
    assert fan_out(conn) == {ids[0]: 1}
    assert fan_out(conn) == {}
    commit(conn, "again", ids[3:4])
    later.execute("commit")
    assert fan_out(conn) == {ids[2]: 1, ids[3]: 1}
    assert fan_out(conn) == {}


def test_a_commit_between_finding_and_saving(conn: Connection[TupleRow], ids: list[int]) -> None:
    committed = find_committed(conn)
    commit(conn, "between", ids[:1])
    save_seen(conn, committed.snapshot)
    assert fan_out(conn) == {ids[0]: 1}


@pytest.mark.parametrize("later_saves_first", [True, False])
def test_two_fan_outs_at_once(
    later_saves_first: bool,  # noqa: FBT001
    connect: Connect,
    conn: Connection[TupleRow],
    ids: list[int],
) -> None:
    """Each finds everything since the last saved state; in whatever order they save, nothing is skipped."""
    late = connect()
    late.execute("begin")
    commit(late, "late", ids[3:4])
    commit(conn, "a", ids[:1])
    one = find_committed(conn)
    commit(conn, "b", ids[1:2])
    two = find_committed(connect())
    assert found(one) == {ids[0]: 1}
    assert found(two) == {ids[0]: 1, ids[1]: 1}
    for committed in (two, one) if later_saves_first else (one, two):
        save_seen(conn, committed.snapshot)
    late.execute("commit")
    commit(conn, "c", ids[2:3])
    assert fan_out(conn) == {ids[2]: 1, ids[3]: 1}


def test_the_state_never_goes_back(conn: Connection[TupleRow], ids: list[int]) -> None:
    old = find_committed(conn).snapshot
    commit(conn, "a", ids[:1])
    fan_out(conn)
    save_seen(conn, old)
    assert fan_out(conn) == {}


def test_a_limit_below_the_number_of_commits_is_told(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    for number in range(5):
        commit(conn, f"object {number}", [ids[number]])
    assert not find_committed(conn, limit=3).complete
    assert set(found(find_committed(conn, limit=3))) == set(ids[:3])
    assert find_committed(conn, limit=6).complete


def test_rolled_back_commits_are_not_found(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    gone = connect()
    gone.execute("begin")
    commit(gone, "gone", ids)
    fan_out(conn)
    gone.execute("rollback")
    assert fan_out(conn) == {}


def test_sweep_finds_what_fan_out_lost(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    late = connect()
    late.execute("begin")
    commit(late, "late", [ids[4]] * 2)
    commit(conn, "a", [ids[1], ids[3], ids[3], ids[4]])
    row = conn.execute("select pg_current_snapshot()::text").fetchone()
    assert row
    save_seen(conn, row[0])
    assert list(sweep(conn)) == [
        Pending(partition_id=ids[1], events=1),
        Pending(partition_id=ids[3], events=2),
        Pending(partition_id=ids[4], events=1),
    ]
    materialize(conn, ids)
    assert list(sweep(conn)) == []
    late.execute("commit")
    assert list(sweep(conn)) == [Pending(partition_id=ids[4], events=2)]


@pytest.mark.parametrize("page", [1, 2, 4, 5, 6])
def test_sweep_turns_pages(
    page: int, conn: Connection[TupleRow], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db.discover, "_SWEEP_PAGE", page)
    assert list(sweep(conn)) == []
    commit(conn, "a", [ids[0], ids[2], ids[4]])
    assert [pending.partition_id for pending in sweep(conn)] == [ids[0], ids[2], ids[4]]


def test_sweep_counts_no_further_than_it_is_told(
    connect: Connect, conn: Connection[TupleRow], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db.discover, "_COUNT_LIMIT", 3)
    late = connect()
    late.execute("begin")
    commit(late, "late", [ids[0]] * 5)
    commit(conn, "a", ids[:1])
    materialize(conn, ids)
    commit(conn, "b", [ids[0]] * 5)
    late.execute("commit")
    assert list(sweep(conn)) == [Pending(partition_id=ids[0], events=3)]
