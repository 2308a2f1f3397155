"""Fan-out and sweep: who finds which work."""

from typing import Any

import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

import db.discover
from db.arrays import Int4Array
from db.discover import Committed, Pending, find_committed, save_fan_out, sweep
from db.materialize import materialize
from db.statements import run, statements
from tests.integration.conftest import commit, make_topic
from tests.support import Connect


@pytest.fixture
def ids(conn: Connection[TupleRow]) -> list[int]:
    return make_topic(conn, partitions=5)


def found(committed: Committed) -> dict[int, int]:
    return {pending.partition_id: pending.events for pending in committed.partitions}


def fan_out(conn: Connection[Any]) -> dict[int, int]:
    committed = find_committed(conn)
    save_fan_out(conn, committed)
    return found(committed)


def test_partitions_of_new_commits(conn: Connection[TupleRow], ids: list[int]) -> None:
    assert fan_out(conn) == {}
    commit(conn, "a", [ids[0], ids[1], ids[0]])
    commit(conn, "b", [ids[1]])
    committed = find_committed(conn)
    assert found(committed) == {ids[0]: 2, ids[1]: 2}
    assert (committed.commits, committed.complete) == (2, True)
    save_fan_out(conn, committed)
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
    save_fan_out(conn, committed)
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
        save_fan_out(conn, committed)
    late.execute("commit")
    commit(conn, "c", ids[2:3])
    assert fan_out(conn) == {ids[2]: 1, ids[3]: 1}


def test_the_state_never_goes_back(conn: Connection[TupleRow], ids: list[int]) -> None:
    old = find_committed(conn)
    commit(conn, "a", ids[:1])
    fan_out(conn)
    save_fan_out(conn, old)
    assert fan_out(conn) == {}


def test_a_limit_below_the_number_of_commits_is_told(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    for number in range(5):
        commit(conn, f"object {number}", [ids[number]])
    assert not find_committed(conn, limit=3).complete
    # Then the sweep is cheaper than to add them up.
    assert found(find_committed(conn, limit=3)) == {}
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
    fan_out(conn)
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


def test_wide_commits_are_bounded_by_what_they_touched(
    conn: Connection[TupleRow], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few commits of very many batches each must not take fan-out to the statement timeout, again and again."""
    monkeypatch.setattr(db.discover, "_BATCHES", 9)
    commit(conn, "a", ids)
    assert find_committed(conn).complete
    commit(conn, "b", ids)
    committed = find_committed(conn)
    assert (committed.complete, committed.partitions) == (False, ())
    save_fan_out(conn, committed)
    commit(conn, "c", ids[:1])
    assert fan_out(conn) == {ids[0]: 1}


def test_counts_beyond_32_bits(conn: Connection[TupleRow], ids: list[int]) -> None:
    for number in range(2):
        conn.execute(
            "insert into tidemark.objects (tx, batches, key, content_hash, partition_ids, batch_counts) "
            "select pg_current_xact_id()::text::bigint, 1, %s, '', %s, array[2147483647]",
            (f"object {number}", ids[:1]),
        )
    assert fan_out(conn) == {ids[0]: 2 * (2**31 - 1)}


@pytest.mark.parametrize("budget", [1, 2, 3, 100])
def test_sweep_is_bounded_in_events_as_well(
    budget: int, conn: Connection[TupleRow], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a large backlog a page ends early, and the next one goes on behind it."""
    monkeypatch.setattr(db.discover, "_SWEEP_EVENTS", budget)
    commit(conn, "a", [ids[0]] * 5 + [ids[2]] * 3 + [ids[4]])
    found = list(sweep(conn))
    assert [pending.partition_id for pending in found] == [ids[0], ids[2], ids[4]]
    assert all(1 <= pending.events <= max(budget, 1) for pending in found)
    row = run(conn, "find_pending", (0, 1_000, 5_000, budget)).fetchall()
    assert sum(max(r[1], 1) for r in row) <= budget


def passes(conn: Connection[Any]) -> list[int]:
    return [row[0] for row in conn.execute("select tx from tidemark.passes order by tx").fetchall()]


def settled(conn: Connection[Any]) -> TupleRow:
    row = conn.execute("select settled_tx, unsettled from tidemark.sweeps order by id desc limit 1").fetchone()
    assert row
    return tuple(row)


def test_a_round_deletes_the_passes_nobody_needs(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """Else every idle partition would be asked for transactions that are long over, at each turn."""
    others = [connect() for _ in range(5)]
    for other in others:
        other.execute("begin")
        other.execute("select pg_current_xact_id()")
    commit(conn, "a", ids)
    materialize(conn, ids)
    assert len(passes(conn)) == 1
    assert list(sweep(conn)) == []
    # They are still open.
    assert len(passes(conn)) == 1
    for other in others:
        other.rollback()
    assert list(sweep(conn)) == []
    assert passes(conn) == []
    assert settled(conn)[1] == []


def test_what_is_pending_is_not_settled(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """Late events that a round has found are still found by the next ones, until they have their offsets."""
    late, other = connect(), connect()
    for number, writer in enumerate((late, other)):
        writer.execute("begin")
        commit(writer, f"late {number}", ids[number : number + 1])
    commit(conn, "early", ids[:2])
    materialize(conn, ids)
    late.execute("commit")
    for _ in range(3):
        assert list(sweep(conn)) == [Pending(partition_id=ids[0], events=1)]
        assert len(passes(conn)) == 1
    other.execute("commit")
    # The rounds have passed its transaction; it is found all the same, and placed.
    assert [pending.partition_id for pending in sweep(conn)] == ids[:2]
    assert materialize(conn, ids).events_processed == 2
    assert list(sweep(conn)) == []
    assert passes(conn) == []
    commit(conn, "last", ids)
    assert materialize(conn, ids).events_processed == len(ids)


def test_a_pass_that_began_before_the_round(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """It still sees a transaction running that is over when the round begins, and commits behind the round's back."""
    late, worker = connect(), connect()
    late.execute("begin")
    commit(late, "late", ids[:1])
    commit(conn, "early", ids[:1])
    worker.execute("begin")
    worker.execute(statements()["transaction_settings"])
    run(worker, "lock_partitions", (Int4Array(ids[:1]),))
    run(worker, "place_incremental", (100,))
    late.execute("commit")
    assert [pending.partition_id for pending in sweep(conn)] == ids[:1]
    worker.commit()
    list(sweep(conn))
    assert len(passes(conn)) == 1
    assert materialize(conn, ids[:1]).events_processed == 1
    assert list(sweep(conn)) == []
    assert passes(conn) == []


def test_a_round_that_is_left_settles_nothing(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", ids)
    before = settled(conn)
    assert next(iter(sweep(conn))).partition_id == ids[0]
    assert settled(conn) == before


def test_collecting_goes_on_where_it_stopped(
    connect: Connect, conn: Connection[TupleRow], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db.discover, "_COLLECT", 2)
    other = connect()
    for number in range(5):
        other.execute("begin")
        other.execute("select pg_current_xact_id()")
        commit(conn, f"object {number}", ids[:1])
        materialize(conn, ids[:1])
        other.rollback()
    assert len(passes(conn)) == 5
    list(sweep(conn))
    assert passes(conn) == []


def test_state_is_one_row(conn: Connection[TupleRow], ids: list[int]) -> None:
    for number in range(5):
        commit(conn, f"object {number}", ids)
        fan_out(conn)
        list(sweep(conn))
    assert conn.execute("select count(*) from tidemark.fan_outs").fetchone() == (1,)
    assert conn.execute("select count(*) from tidemark.sweeps").fetchone() == (1,)


def test_the_sweep_finds_passes_by_their_key(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """They pile up while a transaction is open; a plan for a few of them would read all for each partition."""

    def sequential_scans() -> TupleRow | None:
        conn.execute("select pg_stat_force_next_flush()")
        return conn.execute(
            "select seq_scan from pg_stat_user_tables where schemaname = 'tidemark' and relname = 'passes'"
        ).fetchone()

    other = connect()
    other.execute("begin")
    other.execute("select pg_current_xact_id()")
    commit(conn, "a", ids)
    materialize(conn, ids)
    conn.execute("analyze tidemark.passes")
    before = sequential_scans()
    assert list(sweep(conn)) == []
    assert sequential_scans() == before
