"""Trim deletes what has its batch, and nothing else."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from psycopg import Connection, sql
from psycopg.rows import TupleRow

import db.trim
from db.commit import commit_object
from db.materialize import materialize
from db.topics import create_topic, partition_ids
from db.trim import TrimResult, trim
from tests.support import Connect


@pytest.fixture
def ids(conn: Connection[TupleRow]) -> list[int]:
    create_topic(conn, "orders", 3)
    return partition_ids(conn, "orders")


def commit(conn: Connection[Any], key: str, partitions: Sequence[int]) -> None:
    count = len(partitions)
    commit_object(conn, key, partitions, [1] * count, [0] * count, [1] * count, [0] * count)


def left(conn: Connection[Any]) -> list[str]:
    """Object keys of the events that are still there, in their order."""
    rows = conn.execute(
        "select o.key from tidemark.record_batch_events e join tidemark.objects o on o.id = e.object_id "
        "order by e.partition_id, e.xid, e.id"
    ).fetchall()
    return [row[0] for row in rows]


def test_consumed_events_go(conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", [ids[0]] * 3 + [ids[2]])
    materialize(conn, ids)
    commit(conn, "b", ids[1:2])
    assert trim(conn) == TrimResult(deleted=4, partitions=2, next_partition_id=None)
    assert left(conn) == ["b"]
    assert conn.execute("select count(*) from tidemark.record_batches").fetchone() == (4,)


def test_pending_events_stay(conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", [ids[0]] * 3)
    assert trim(conn).deleted == 0
    materialize(conn, ids, events_per_partition=2)
    assert trim(conn).deleted == 2
    assert materialize(conn, ids).events_processed == 1


def test_events_of_late_transactions_stay(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """They lie below the cursor, and only in_flight tells that they are pending."""
    late = connect()
    late.execute("begin")
    commit(late, "late", ids[:1])
    commit(conn, "early", ids[:1])
    materialize(conn, ids)
    assert trim(conn).deleted == 1
    late.execute("commit")
    assert trim(conn).deleted == 0
    assert left(conn) == ["late"]
    assert materialize(conn, ids).events_processed == 1
    assert trim(conn).deleted == 1
    assert left(conn) == []


def test_a_materialization_that_is_not_committed_frees_nothing(
    connect: Connect, conn: Connection[TupleRow], ids: list[int]
) -> None:
    commit(conn, "a", ids)
    worker = connect()
    worker.execute("begin")
    worker.execute("update tidemark.topic_partitions set seen_xid = '1000000', seen_id = 1")
    assert trim(conn).deleted == 0
    worker.execute("rollback")


def test_work_is_bounded_and_resumed(conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", [i for i in ids for _ in range(5)])
    materialize(conn, ids)
    stops = iter([False, False, True])
    first = trim(conn, delete_batch=2, stop=lambda: next(stops))
    # The third batch ends in the second partition, so that one comes again.
    assert first == TrimResult(deleted=6, partitions=2, next_partition_id=ids[1] - 1)
    assert len(left(conn)) == 9
    second = trim(conn, delete_batch=2, after_partition_id=ids[1] - 1, stop=lambda: True)
    assert second == TrimResult(deleted=2, partitions=1, next_partition_id=ids[1] - 1)
    assert trim(conn, delete_batch=2, after_partition_id=ids[1] - 1) == TrimResult(
        deleted=7, partitions=2, next_partition_id=None
    )
    assert left(conn) == []


def test_thin_partitions_share_transactions(conn: Connection[TupleRow]) -> None:
    """10,000 of them, one a transaction, take ten seconds."""
    create_topic(conn, "thin", 300)
    ids = partition_ids(conn, "thin")
    commit(conn, "a", [i for i in ids for _ in range(2)])
    materialize(conn, ids)
    turns = iter([False, False, False])
    # A fourth question would end the test.
    result = trim(conn, delete_batch=200, stop=lambda: next(turns))
    assert (result.deleted, result.partitions, left(conn)) == (600, 300, [])


def test_a_transaction_looks_at_a_bounded_number_of_partitions(
    conn: Connection[TupleRow], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all of them have nothing but pending events."""
    monkeypatch.setattr(db.trim, "_PARTITIONS", 2)
    commit(conn, "a", ids)
    materialize(conn, ids[2:])
    first = trim(conn, stop=lambda: True)
    assert first == TrimResult(deleted=0, partitions=0, next_partition_id=ids[1])
    assert trim(conn, after_partition_id=ids[1]).deleted == 1


def test_starting_behind_the_last_partition_there_can_be(conn: Connection[TupleRow]) -> None:
    assert trim(conn, after_partition_id=2**31 - 1) == TrimResult(deleted=0, partitions=0, next_partition_id=None)


def test_stopping_in_the_middle_of_a_partition_loses_no_place(conn: Connection[TupleRow], ids: list[int]) -> None:
    """Going on from `next_partition_id` deletes the rest of the partition that was interrupted."""
    commit(conn, "a", [ids[1]] * 5)
    materialize(conn, ids)
    result = trim(conn, delete_batch=2, stop=lambda: True)
    assert result.deleted == 2
    while result.next_partition_id is not None:
        result = trim(conn, delete_batch=2, after_partition_id=result.next_partition_id, stop=lambda: True)
    assert left(conn) == []


def test_each_transaction_deletes_at_most_a_batch(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    conn.execute("create table deletes (xid xid8, n bigint)")
    conn.execute(
        "create function note() returns trigger language plpgsql as "
        "$$ begin insert into deletes select pg_current_xact_id(), count(*) from gone; return null; end $$"
    )
    conn.execute(
        "create trigger note after delete on tidemark.record_batch_events referencing old table as gone "
        "for each statement execute function note()"
    )
    commit(conn, "a", [i for i in ids for _ in range(7)])
    materialize(conn, ids)
    trim(conn, delete_batch=3)
    rows = conn.execute("select sum(n)::int from deletes group by xid order by 1").fetchall()
    assert max(row[0] for row in rows) == 3
    assert sum(row[0] for row in rows) == 21


def test_two_trimmers_at_once(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    commit(conn, "a", [ids[0]] * 4)
    materialize(conn, ids)
    first, second = connect(), connect()
    first.execute("begin")
    (pid,) = ids[:1]
    commit(conn, "b", ids[:1])
    assert run_trim(first, pid) == 2
    second.execute("set lock_timeout = '2s'")
    first.execute("commit")
    assert trim(second, delete_batch=2).deleted == 2
    assert left(conn) == ["b"]


def run_trim(conn: Connection[Any], partition_id: int) -> int:
    """One batch of two, as a trimmer that does not get to its commit."""
    assert conn.info.transaction_status.name == "INTRANS"
    before = len(left(conn))
    stops = iter([True])
    trim(conn, delete_batch=2, after_partition_id=partition_id - 1, stop=lambda: next(stops))
    return before - len(left(conn))


@pytest.mark.parametrize("analyzed", [False, True])
def test_a_batch_reads_no_more_than_it_deletes(
    analyzed: bool,  # noqa: FBT001
    connect: Connect,
    conn: Connection[TupleRow],
    ids: list[int],
) -> None:
    """Whatever the statistics say: a queue's are always out of date."""
    if analyzed:
        conn.execute("analyze tidemark.record_batch_events")
    commit(conn, "a", [ids[0]] * 20_000)
    materialize(conn, ids)
    worker = connect()
    with worker.transaction():
        trim(worker, delete_batch=200, stop=lambda: True)
        row = worker.execute(
            "select seq_tup_read + idx_tup_fetch from pg_stat_xact_user_tables where relname = 'record_batch_events'"
        ).fetchone()
    assert row
    assert row[0] <= 3 * 200


def test_a_run_does_not_reread_what_it_deleted(connect: Connect, conn: Connection[TupleRow], ids: list[int]) -> None:
    """Under an old snapshot dead rows stay: each batch must start behind those of the one before."""
    commit(conn, "a", [ids[0]] * 40_000)
    materialize(conn, ids, events_per_partition=40_000)
    reader, worker = connect(), connect()
    reader.execute("begin isolation level repeatable read")
    reader.execute("select 1")
    touched: list[int] = []

    def note() -> bool:
        row = worker.execute(
            "select heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read "
            "from pg_statio_user_tables where relname = 'record_batch_events'"
        ).fetchone()
        assert row
        touched.append(row[0])
        return False

    # Counters reach the statistics at once, and are read anew each time.
    flush = sql.SQL("select pg_stat_force_next_flush()")
    worker.execute("set stats_fetch_consistency = none")

    def flushed() -> bool:
        worker.execute(flush)
        worker.execute("select 1")
        return note()

    flushed()
    trim(worker, delete_batch=100, stop=flushed)
    batches = [after - before for before, after in pairwise(touched)]
    assert len(batches) == 400
    early, late = sum(batches[10:20]), sum(batches[380:390])
    assert late < 1.5 * early, f"ten batches touched {early} pages, ten later ones {late}"
    reader.rollback()
