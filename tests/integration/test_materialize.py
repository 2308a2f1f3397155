"""The cold path, one interleaving at a time."""

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection, IsolationLevel, errors
from psycopg.pq import TransactionStatus
from psycopg.rows import TupleRow, dict_row

from config.errors import TidemarkError, UnknownPartitionError
from db.arrays import Int4Array
from db.commit import commit_object
from db.materialize import MaterializationMetrics, materialize
from db.migrate import upgrade
from db.statements import run, statements
from tests.integration.conftest import make_topic
from tests.servers import PostgresServer
from tests.support import Connect, wait_until


@pytest.fixture
def ids(conn: Connection[TupleRow]) -> list[int]:
    return make_topic(conn, partitions=3)


def commit(conn: Connection[Any], key: str, partitions: Sequence[int], records: Sequence[int] | None = None) -> int:
    """One batch a partition given; a batch's byte offset is its position in the object."""
    count = len(partitions)
    return commit_object(
        conn, key, partitions, records or [1] * count, range(count), range(10, 10 + count), range(1000, 1000 + count)
    )


def log(conn: Connection[Any], partition_id: int) -> list[tuple[Any, ...]]:
    return conn.execute(
        "select start_offset, n_records, object_key, byte_offset from tidemark.record_batches "
        "where partition_id = %s order by 1",
        (partition_id,),
    ).fetchall()


def keys(conn: Connection[Any], partition_id: int) -> list[str]:
    return [row[2] for row in log(conn, partition_id)]


def head(conn: Connection[Any], partition_id: int) -> tuple[Any, ...]:
    """End offset, bytes, the position, and the transactions below it that were running in the last pass."""
    row = conn.execute(
        "select c.end_offset, c.end_bytes, c.seen_tx, c.seen_id, array("
        "  select x from tidemark.runs r join tidemark.passes s on s.tx = r.pass_tx cross join unnest(s.in_flight) x"
        "  where r.partition_id = c.partition_id and r.end_offset = c.end_offset and x <= c.seen_tx) "
        "from tidemark.cursors(array[%s::int]) c",
        (partition_id,),
    ).fetchone()
    assert row
    return tuple(row)


def everything(conn: Connection[Any]) -> list[list[TupleRow]]:
    return [
        conn.execute(f"select t.*, t.xmin::text from tidemark.{table} t order by t.ctid".encode()).fetchall()
        for table in ("topic_partitions", "runs", "passes", "record_batch_events")
    ]


def waits_for_lock(conn: Connection[Any], *others: Connection[Any]) -> Callable[[], bool]:
    pids = [other.info.backend_pid for other in others]

    def all_wait_for_a_lock() -> bool:
        row = conn.execute(
            "select count(*) from pg_stat_activity where pid = any(%s) and wait_event_type = 'Lock'", (pids,)
        ).fetchone()
        return row == (len(pids),)

    return all_wait_for_a_lock


def lock(conn: Connection[Any], ids: Sequence[int]) -> None:
    """What a materializer does before it places, in a transaction that stays open."""
    conn.execute("begin")
    conn.execute(statements()["transaction_settings"])
    run(conn, "lock_partitions", (Int4Array(ids),))


def test_batches_get_contiguous_offsets_in_commit_order(conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", [ids[0], ids[1], ids[0]], [5, 7, 3])
    commit(conn, "b", [ids[0]], [2])
    materialize(conn, ids)
    assert log(conn, ids[0]) == [(0, 5, "a", 0), (5, 3, "a", 2), (8, 2, "b", 0)]
    assert log(conn, ids[1]) == [(0, 7, "a", 1)]
    assert log(conn, ids[2]) == []
    assert head(conn, ids[0])[:2] == (10, 10 + 12 + 10)


def test_batches_carry_what_was_committed(conn: Connection[TupleRow], ids: list[int]) -> None:
    object_id = commit_object(conn, "a", [ids[0]], [4], [2**40], [2**31 - 1], [-1])
    materialize(conn, ids)
    assert conn.execute(
        "select partition_id, start_offset, n_records, object_id, byte_offset, byte_length, max_timestamp_ms "
        "from tidemark.record_batches"
    ).fetchall() == [(ids[0], 0, 4, object_id, 2**40, 2**31 - 1, -1)]


def test_metrics_are_exact(conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", [ids[0], ids[1], ids[0], ids[0]], [5, 7, 3, 1])
    metrics = materialize(conn, ids, events_per_partition=2)
    assert (metrics.events_processed, metrics.partitions_processed, metrics.records) == (3, 2, 15)
    assert (metrics.log_bytes, metrics.transactions, metrics.errors, metrics.error_rate) == (10 + 11 + 12, 1, 0, 0.0)
    assert metrics.backlog_partition_ids == (ids[0],)
    assert metrics.processing_time_ms > metrics.lock_wait_time_ms > 0

    rest = materialize(conn, ids, events_per_partition=2)
    assert (rest.events_processed, rest.partitions_processed, rest.backlog_partition_ids) == (1, 1, ())
    nothing = materialize(conn, ids)
    assert (
        nothing.as_dict()
        == MaterializationMetrics(
            processing_time_ms=nothing.processing_time_ms,
            lock_wait_time_ms=nothing.lock_wait_time_ms,
            transactions=1,
            batch_events=20_000 * len(ids),
        ).as_dict()
    )

    total = metrics + rest + nothing
    assert (total.events_processed, total.records, total.transactions, total.backlog_partition_ids) == (4, 16, 3, ())


def test_lock_wait_is_measured(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", ids)
    blocker, worker = connect(), connect()
    lock(blocker, ids[:1])
    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(materialize, worker, ids)
        waiting = waits_for_lock(conn, worker)
        wait_until(waiting)
        blocker.execute("select pg_sleep(0.2)")
        blocker.rollback()
        metrics = outcome.result(10)
    assert metrics.events_processed == 3
    assert metrics.processing_time_ms > metrics.lock_wait_time_ms > 200


@pytest.mark.parametrize("each", [1, 65])
def test_transaction_size_is_close_to_what_was_written(each: int, conn: Connection[TupleRow]) -> None:
    size = "select pg_relation_size('tidemark.runs') + pg_indexes_size('tidemark.runs')"
    ids = make_topic(conn, "wide", partitions=2_000)
    for number in range(each):
        commit(conn, f"object {number}", ids)
    before = conn.execute(size).fetchone()
    metrics = materialize(conn, ids)
    after = conn.execute(size).fetchone()
    assert before
    assert after
    assert sum(moved.runs for moved in metrics.moved) == 2_000 * (1 if each == 1 else 2)
    assert metrics.transaction_size_bytes == pytest.approx(after[0] - before[0], rel=0.15)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 100])
def test_limit(limit: int, conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", [ids[0]] * 4 + [ids[1]])
    metrics = materialize(conn, ids, events_per_partition=limit)
    assert len(log(conn, ids[0])) == min(limit, 4)
    assert len(log(conn, ids[1])) == 1
    assert metrics.backlog_partition_ids == ((ids[0],) if limit < 4 else ())
    while materialize(conn, ids, events_per_partition=limit).events_processed:
        pass
    assert log(conn, ids[0]) == [(i, 1, "a", i) for i in range(4)]


@pytest.mark.parametrize(("partitions", "limit"), [([], 1), ([1], 0), ([1], -1)])
def test_nothing_to_do_is_the_callers_mistake(
    partitions: list[int], limit: int, conn: Connection[TupleRow], ids: list[int]
) -> None:
    with pytest.raises(ValueError, match="pass at least one"):
        materialize(conn, partitions, events_per_partition=limit)


@pytest.mark.parametrize("unknown", [0, -1, 10_000, 2**31 - 1, 2**31, 2**70])
def test_an_unknown_partition_changes_nothing(unknown: int, conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", ids)
    before = everything(conn)
    with pytest.raises(UnknownPartitionError, match=str(unknown)):
        materialize(conn, [*ids, unknown])
    after = everything(conn)
    assert [[row[:-1] for row in table] for table in after] == [[row[:-1] for row in table] for table in before]
    assert materialize(conn, ids).events_processed == 3


def test_partitions_may_be_given_twice(conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", ids)
    assert materialize(conn, [*ids, *ids]).events_processed == 3


def test_a_connection_with_another_row_factory(conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", ids)
    conn.row_factory = dict_row  # type: ignore[assignment]
    assert materialize(conn, ids).events_processed == 3


def test_a_lower_transaction_that_commits_later(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """The defect of every bare `id > last` cursor."""
    late = connect()
    late.execute("begin")
    commit(late, "late", [ids[0]] * 2)
    commit(conn, "early", ids[:1])
    assert materialize(conn, ids).events_processed == 1
    assert len(head(conn, ids[0])[4]) == 1
    late.execute("commit")
    commit(conn, "after", ids[:1])
    assert materialize(conn, ids, events_per_partition=3).events_processed == 3
    assert keys(conn, ids[0]) == ["early", "late", "late", "after"]
    assert head(conn, ids[0])[4] == []


def test_a_pass_with_late_events_only_keeps_the_cursor(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    late = connect()
    late.execute("begin")
    commit(late, "late", ids[:1])
    commit(conn, "early", ids[:1])
    materialize(conn, ids)
    before = head(conn, ids[0])
    late.execute("commit")
    metrics = materialize(conn, ids, events_per_partition=1)
    assert (metrics.events_processed, metrics.backlog_partition_ids) == (1, ())
    after = head(conn, ids[0])
    assert after[2:4] == before[2:4]
    assert after[4] == []
    assert materialize(conn, ids).events_processed == 0
    assert keys(conn, ids[0]) == ["early", "late"]


def test_several_late_transactions_keep_their_order(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    late = [connect() for _ in range(4)]
    for number, other in enumerate(late):
        other.execute("begin")
        commit(other, f"late {number}", ids[:1])
    commit(conn, "early", ids[:1])
    materialize(conn, ids)
    for other in (late[3], late[1]):
        other.execute("commit")
    materialize(conn, ids)
    assert len(head(conn, ids[0])[4]) == 2
    late[2].execute("rollback")
    late[0].execute("commit")
    materialize(conn, ids)
    assert keys(conn, ids[0]) == ["early", "late 1", "late 3", "late 0"]


def test_a_transaction_that_starts_below_and_spans_a_limit(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    """The cursor stops inside a transaction's events while a lower one is open."""
    late = connect()
    late.execute("begin")
    commit(late, "late", ids[:1])
    commit(conn, "a", [ids[0]] * 3)
    materialize(conn, ids, events_per_partition=2)
    late.execute("commit")
    assert materialize(conn, ids, events_per_partition=2).events_processed == 2
    assert keys(conn, ids[0]) == ["a", "a", "late", "a"]


def test_the_lowest_transaction_is_its_own_without_events(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    """A transaction that has an id, and events only after the cursor has passed it."""
    late = connect()
    late.execute("begin")
    late.execute("select pg_current_xact_id()")
    commit(conn, "early", ids[:1])
    materialize(conn, ids)
    commit(late, "late", ids[:1])
    late.execute("commit")
    assert materialize(conn, ids).events_processed == 1
    assert keys(conn, ids[0]) == ["early", "late"]


def test_a_rolled_back_transaction_gets_no_offset(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    gone = connect()
    gone.execute("begin")
    commit(gone, "gone", ids[:1])
    commit(conn, "early", ids[:1])
    materialize(conn, ids)
    gone.execute("rollback")
    assert materialize(conn, ids).events_processed == 0
    commit(conn, "after", ids[:1])
    materialize(conn, ids)
    assert log(conn, ids[0]) == [(0, 1, "early", 0), (1, 1, "after", 0)]
    assert head(conn, ids[0])[4] == []


def test_savepoints(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """Subtransactions have ids of their own; events carry the transaction's."""
    late = connect()
    late.execute("begin; savepoint one")
    commit(late, "kept 1", ids[:1])
    late.execute("release one; savepoint two")
    commit(late, "dropped", ids[:1])
    commit(conn, "early", ids[:1])
    materialize(conn, ids)
    assert len(head(conn, ids[0])[4]) == 1
    late.execute("rollback to two")
    commit(late, "kept 2", ids[:1])
    commit(conn, "between", ids[:1])
    materialize(conn, ids)
    late.execute("commit")
    materialize(conn, ids)
    assert keys(conn, ids[0]) == ["early", "between", "kept 1", "kept 2"]


def test_more_subtransactions_than_a_snapshot_holds(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    """Beyond 64 the server no longer lists them; the top transaction must still be in the snapshot."""
    late = connect()
    late.execute("begin")
    for number in range(100):
        late.execute(f"savepoint s{number}".encode())
        commit(late, f"late {number}", ids[:1])
    commit(conn, "early", ids[:1])
    materialize(conn, ids)
    late.execute("commit")
    materialize(conn, ids)
    assert keys(conn, ids[0]) == ["early", *(f"late {number}" for number in range(100))]


def test_a_long_transaction_elsewhere_stalls_nothing(
    connect: Connect, conn: Connection[TupleRow], ids: list[int], postgres_server: PostgresServer
) -> None:
    """The defect of a watermark. The other transaction is in another database of the cluster."""
    with psycopg.connect(postgres_server.url()) as other:
        other.execute("select pg_current_xact_id()")
        for number in range(5):
            commit(conn, f"object {number}", ids[:1])
            assert materialize(conn, ids).events_processed == 1
        assert len(head(conn, ids[0])[4]) == 1
        other.rollback()
    commit(conn, "last", ids[:1])
    materialize(conn, ids)
    assert head(conn, ids[0])[4] == []


def test_in_flight_is_bounded_by_the_open_transactions(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    others = [connect() for _ in range(10)]
    for turn in range(20):
        for other in others:
            other.execute("begin")
            other.execute("select pg_current_xact_id()")
        commit(conn, f"object {turn}", ids[:1])
        materialize(conn, ids)
        assert len(head(conn, ids[0])[4]) == len(others)
        for other in others:
            other.execute("rollback")


@pytest.fixture(scope="module")
def two_phase_url(server_directory: Path, postgres_bin: Path | None) -> Iterator[str]:
    """A server which allows prepared transactions; by default none does."""
    with PostgresServer(
        server_directory / "two-phase",
        bin_dir=postgres_bin,
        settings={"max_prepared_transactions": "210", "fsync": "off"},
    ).start() as server:
        upgrade(server.url())
        yield server.url()


def test_prepared_transactions(two_phase_url: str) -> None:
    with psycopg.connect(two_phase_url, autocommit=True) as conn:
        ids = make_topic(conn, partitions=1)
        conn.execute("begin")
        commit(conn, "prepared", ids)
        conn.execute("prepare transaction 'one'")
        commit(conn, "early", ids)
        assert materialize(conn, ids).events_processed == 1
        assert len(head(conn, ids[0])[4]) == 1
        conn.execute("commit prepared 'one'")
        assert materialize(conn, ids).events_processed == 1
        assert keys(conn, ids[0]) == ["early", "prepared"]


def test_two_hundred_open_transactions_cost_a_pass_one_row(two_phase_url: str) -> None:
    """And its runs nothing: a list in each of them made passes of many partitions 25 times as slow."""
    opened, with_events = 200, {3, 50, 77, 78, 199}
    with psycopg.connect(two_phase_url, autocommit=True) as conn:
        ids = make_topic(conn, "wide", partitions=200)
        commit(conn, "before", ids)
        materialize(conn, ids)
        for number in range(opened):
            conn.execute("begin")
            conn.execute("select pg_current_xact_id()")
            if number in with_events:
                commit(conn, f"open {number}", ids[:2])
            conn.execute(f"prepare transaction 'open {number}'".encode())
        conn.execute("truncate tidemark.passes")
        passes = "select array_agg(cardinality(in_flight) order by tx) from tidemark.passes"
        for turn in range(1, 3):
            commit(conn, f"main {turn}", ids)
            assert materialize(conn, ids).events_processed == len(ids)
            assert conn.execute(passes).fetchone() == ([opened] * turn,)
        lists = "select count(*) from tidemark.runs where late is not null or skipped <> '{}'"
        assert conn.execute(lists).fetchone() == (0,)
        assert materialize(conn, ids).events_processed == 0
        assert conn.execute(passes).fetchone() == ([opened] * 2,)

        # Some end: what the others may bring is remembered on.
        for number in range(opened // 2):
            ends = "rollback" if number == 50 else "commit"
            conn.execute(f"{ends} prepared 'open {number}'".encode())
        assert materialize(conn, ids).events_processed == 2 * 3
        commit(conn, "main 3", ids)
        assert materialize(conn, ids).events_processed == len(ids)
        for number in reversed(range(opened // 2, opened)):
            conn.execute(f"commit prepared 'open {number}'".encode())
        assert materialize(conn, ids).events_processed == 2
        for i in ids[:2]:
            expected = ["before", "main 1", "main 2", "open 3", "open 77", "open 78", "main 3", "open 199"]
            assert keys(conn, i) == expected
        assert keys(conn, ids[2]) == ["before", "main 1", "main 2", "main 3"]


def test_without_waiting_the_rest_is_served(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", ids)
    blocker = connect()
    lock(blocker, ids[1:2])
    # Waiting would be an error.
    conn.execute("set lock_timeout = '1ms'")
    done = materialize(conn, ids, wait=False)
    assert (done.events_processed, done.busy_partition_ids, done.as_dict()["busy_partitions"]) == (2, (ids[1],), 1)
    assert [keys(conn, i) for i in ids] == [["a"], [], ["a"]]
    commit(conn, "b", ids)
    with pytest.raises(UnknownPartitionError, match="1000000"):
        materialize(conn, [*ids, 1_000_000], wait=False)
    assert [keys(conn, i) for i in ids] == [["a"], [], ["a"]]
    alone = materialize(conn, ids[1:2], wait=False)
    assert (alone.events_processed, alone.partitions_processed, alone.busy_partition_ids) == (0, 0, (ids[1],))
    blocker.rollback()
    done = materialize(conn, ids, wait=False)
    assert (done.events_processed, done.busy_partition_ids) == (4, ())
    assert [keys(conn, i) for i in ids] == [["a", "b"]] * 3


def test_a_failure_while_placing_changes_nothing(conn: Connection[TupleRow], ids: list[int]) -> None:
    conn.execute(
        "create function fail() returns trigger language plpgsql as $$ begin "
        f"if new.partition_id = {ids[2]} then raise exception 'disk on fire'; end if; return new; end $$".encode()
    )
    conn.execute("create trigger fail before insert on tidemark.runs for each row execute function fail()")
    commit(conn, "a", ids)
    with pytest.raises(psycopg.Error, match="disk on fire"):
        materialize(conn, ids)
    assert all(head(conn, i) == (0, 0, 0, 2**63 - 1, []) for i in ids)
    assert all(log(conn, i) == [] for i in ids)
    conn.execute("drop trigger fail on tidemark.runs")
    assert materialize(conn, ids).events_processed == 3


def test_a_killed_materializer_leaves_nothing_behind(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    commit(conn, "a", ids)
    victim = connect()
    lock(victim, ids)
    run(victim, "place_incremental", (10,))
    conn.execute("select pg_terminate_backend(%s)", (victim.info.backend_pid,))
    assert materialize(conn, ids).events_processed == 3
    assert [keys(conn, i) for i in ids] == [["a"]] * 3


@pytest.mark.parametrize("isolation", [None, IsolationLevel.REPEATABLE_READ, IsolationLevel.SERIALIZABLE])
def test_a_second_materializer_waits_and_then_sees_what_the_first_did(
    isolation: IsolationLevel | None, connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    """Whatever isolation the connection prefers."""
    commit(conn, "a", [ids[0]] * 4)
    first, second = connect(), connect()
    second.isolation_level = isolation
    lock(first, ids[:1])
    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(materialize, second, ids[:1])
        wait_until(waits_for_lock(conn, second))
        run(first, "place_incremental", (3,))
        commit(conn, "meanwhile", ids[:1])
        first.commit()
        assert outcome.result(10).events_processed == 2
    assert log(conn, ids[0]) == [*((i, 1, "a", i) for i in range(4)), (4, 1, "meanwhile", 0)]


def test_many_materializers_queue_for_one_partition(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    commit(conn, "a", [ids[0]] * 10)
    blocker, workers = connect(), [connect() for _ in range(5)]
    lock(blocker, ids[:1])
    with ThreadPoolExecutor(5) as threads:
        outcomes = [threads.submit(materialize, w, ids, events_per_partition=3) for w in workers]
        wait_until(waits_for_lock(conn, *workers))
        blocker.rollback()
        processed = [outcome.result(10).events_processed for outcome in outcomes]
    assert sorted(processed) == [0, 1, 3, 3, 3]
    assert log(conn, ids[0]) == [(i, 1, "a", i) for i in range(10)]


def test_opposite_orders_do_not_deadlock(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """The lock is taken in the order of ids, whatever the order of arguments: the second waits with nothing locked."""
    commit(conn, "a", ids)
    first, second = connect(), connect()
    lock(first, ids[:1])
    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(materialize, second, list(reversed(ids)))
        wait_until(waits_for_lock(conn, second))
        # Had the second begun at the other end, this would be the deadlock.
        run(first, "lock_partitions", (Int4Array(list(reversed(ids))),))
        first.rollback()
        assert outcome.result(10).events_processed == 3


def test_commits_and_foreign_keys_do_not_wait_for_a_materializer(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    materializer = connect()
    lock(materializer, ids)
    conn.execute("set lock_timeout = '1s'")
    commit(conn, "a", ids)
    conn.execute("select from tidemark.topic_partitions for key share")
    materializer.rollback()


def test_a_lock_that_is_not_given_in_time(
    connect: Connect, conn: Connection[TupleRow], ids: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """One error, and no complaint of psycopg's about the statement that was not run for it."""
    commit(conn, "a", ids)
    blocker = connect()
    lock(blocker, ids[:1])
    conn.execute("set lock_timeout = '50ms'")
    with pytest.raises(errors.LockNotAvailable):
        materialize(conn, ids)
    assert conn.info.transaction_status == TransactionStatus.IDLE
    assert [record.getMessage() for record in caplog.records] == []
    blocker.rollback()
    assert materialize(conn, ids).events_processed == 3


def test_a_transaction_whose_snapshot_is_old_is_refused(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    worker = connect()
    worker.execute("begin isolation level repeatable read")
    worker.execute("select count(*) from tidemark.record_batch_events")
    commit(conn, "a", ids)
    before = everything(conn)
    with pytest.raises((psycopg.Error, TidemarkError, ValueError)):
        materialize(worker, ids)
    worker.rollback()
    assert everything(conn) == before


def test_commits_in_the_materializing_transaction_are_neither_lost_nor_doubled(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    """No snapshot lists its own transaction, so the cursor could pass it unnoticed. Refusing is fine, losing is not."""
    both = connect()
    both.execute("begin")
    commit(both, "before", ids[:1])
    commit(conn, "other", ids[:1])
    try:
        materialize(both, ids)
    except (psycopg.Error, TidemarkError, ValueError, RuntimeError):
        both.rollback()
        return
    commit(both, "after", ids[:1])
    both.commit()
    materialize(conn, ids)
    commit(conn, "last", ids[:1])
    materialize(conn, ids)
    assert sorted(keys(conn, ids[0])) == ["after", "before", "last", "other"]


def test_the_planner_settings_end_with_the_transaction(conn: Connection[TupleRow], ids: list[int]) -> None:
    conn.execute("set enable_seqscan = on")
    materialize(conn, ids)
    assert conn.execute("show enable_seqscan").fetchone() == ("on",)


def test_a_transaction_takes_two_round_trips(conn: Connection[TupleRow], ids: list[int], tmp_path: Path) -> None:
    """A small transaction consists of little else; and nothing is planned again, whatever was committed meanwhile."""
    materialize(conn, ids)
    commit(conn, "a", ids)
    with (tmp_path / "trace").open("wb") as file:
        conn.pgconn.trace(file.fileno())
        done = materialize(conn, ids)
        conn.pgconn.untrace()
    assert done.events_processed == 3
    messages = [line.split(b"\t") for line in (tmp_path / "trace").read_bytes().splitlines()]
    directions = b"".join(fields[1] for fields in messages)
    assert len(re.findall(b"F+B+", directions)) == 2
    assert not [fields for fields in messages if fields[3] == b"Parse"]
