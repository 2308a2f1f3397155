"""Retention: Kafka's rule, whole runs, bounded transactions, and a log that stays contiguous for everyone who reads."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import median
from threading import Barrier, Event
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import Connection, RawCursor
from psycopg.rows import TupleRow

from config.errors import InvalidTopicError, OffsetOutOfRangeError, UnknownTopicError
from db import retention
from db.arrays import Int4Array
from db.audit import audit
from db.commit import commit_object
from db.fetch import fetch_batches
from db.materialize import materialize
from db.objects import forget_dead_objects, list_dead_objects
from db.retention import RetentionResult, delete_records, retain
from db.statements import run, statements
from db.topics import create_topic, partition_ids, set_retention
from tests.support import Connect, wait_until

DAY = 86_400_000
NOW = int(time.time() * 1000)
OLD = NOW - 10 * DAY

Conn = Connection[TupleRow]


def topic(conn: Conn, name: str = "t", partitions: int = 1, **limits: int) -> list[int]:
    create_topic(conn, name, partitions)
    set_retention(conn, name, retention_ms=limits.get("ms"), retention_bytes=limits.get("size"))
    return partition_ids(conn, name)


def commit(conn: Conn, key: str, ids: Sequence[int], timestamps: Sequence[int], size: int = 10) -> int:
    """One object with a batch of two records for each of `ids`."""
    n = len(ids)
    return commit_object(conn, key, ids, [2] * n, [size * i for i in range(n)], [size] * n, timestamps)


def log(conn: Conn, ids: Sequence[int], timestamps: Sequence[int], start: int = 0) -> None:
    """An object for each timestamp, with a batch in each partition, which is a run of its own."""
    for i, timestamp in enumerate(timestamps, start):
        commit(conn, f"o{i}", ids, [timestamp] * len(ids))
        materialize(conn, ids)


def head(conn: Conn, partition_id: int) -> tuple[int, int, int]:
    row = conn.execute(
        "select start_offset, end_offset, byte_size from tidemark.named_partitions where partition_id = %s",
        (partition_id,),
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def count(conn: Conn, table: str) -> int:
    row = conn.execute(f"select count(*) from tidemark.{table}").fetchone()
    assert row is not None
    return int(row[0])


def sound(conn: Conn) -> bool:
    result = audit(conn, from_scratch=True)
    assert result.violations == ()
    return result.complete


def test_topics_without_limits_are_left_alone(conn: Conn) -> None:
    (p,) = topic(conn)
    commit(conn, "a", [p], [OLD])
    materialize(conn, [p])

    assert RetentionResult() == retain(conn)
    assert run(conn, "find_expired", (0, 10)).fetchall() == [(p, [])]
    assert head(conn, p) == (0, 2, 10)


def test_time_stops_at_the_first_batch_that_is_young_enough(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    log(conn, [p], [OLD, OLD, NOW, OLD])

    assert RetentionResult(deleted=2, log_bytes=20, objects_freed=2) == retain(conn)
    assert head(conn, p) == (4, 8, 20)
    assert [b.object_key for b in fetch_batches(conn, p, 4)] == ["o2", "o3"]
    with pytest.raises(OffsetOutOfRangeError):
        fetch_batches(conn, p, 3)
    assert RetentionResult() == retain(conn)
    assert sound(conn)


@pytest.mark.parametrize("limit", [2**63 - 1, 20 * DAY])
def test_what_is_younger_than_the_limit_stays(conn: Conn, limit: int) -> None:
    (p,) = topic(conn, ms=limit)
    commit(conn, "a", [p], [OLD])
    materialize(conn, [p])
    assert RetentionResult() == retain(conn)


def test_a_batch_without_timestamp_is_as_old_as_its_commit(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    log(conn, [p], [-1, -1])
    assert RetentionResult() == retain(conn)

    conn.execute("update tidemark.objects set committed_at = now() - interval '25 hours' where key = 'o0'")
    assert retain(conn).deleted == 1
    assert head(conn, p) == (2, 4, 10)


@pytest.mark.parametrize("timestamp", [NOW + 3650 * DAY, 253402300799999], ids=["in ten years", "the greatest"])
def test_a_batch_is_not_younger_than_its_commit(conn: Conn, timestamp: int) -> None:
    """One with a time far in the future must not keep the log for ever."""
    (p,) = topic(conn, ms=DAY)
    log(conn, [p], [timestamp, OLD, NOW])
    assert RetentionResult() == retain(conn)
    conn.execute("update tidemark.objects set committed_at = now() - interval '25 hours' where key = 'o0'")
    # Nor do those behind it wait for the running maximum to be old.
    assert retain(conn).deleted == 2
    assert head(conn, p) == (4, 6, 10)
    assert sound(conn)


def test_what_cannot_be_dated_stays(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    log(conn, [p], [-1, NOW])
    conn.execute("delete from tidemark.objects")
    assert RetentionResult() == retain(conn)
    # What dates itself needs no commit.
    (q,) = topic(conn, "u", ms=DAY)
    log(conn, [q], [OLD], start=2)
    conn.execute("delete from tidemark.objects")
    assert retain(conn).deleted == 1


@pytest.mark.parametrize("young", range(3))
def test_a_run_goes_when_all_its_batches_may(conn: Conn, young: int) -> None:
    (p,) = topic(conn, ms=DAY)
    commit(conn, "a", [p] * 3, [NOW if i == young else OLD for i in range(3)])
    materialize(conn, [p])
    assert RetentionResult() == retain(conn)
    assert head(conn, p) == (0, 6, 30)


def runs(conn: Conn) -> list[int]:
    return [row[0] for row in conn.execute("select start_offset from tidemark.runs order by 1").fetchall()]


def test_a_log_can_expire_whole_and_go_on(conn: Conn) -> None:
    """Again and again. The newest run stays, being the cursor; it goes with the next ones."""
    (p,) = topic(conn, ms=DAY)
    for end in (4, 8, 12):
        log(conn, [p], [OLD, OLD], start=end)
        assert retain(conn).deleted == 2
        assert head(conn, p) == (end, end, 0)
        assert fetch_batches(conn, p, end) == []
        assert runs(conn) == [end - 2]
        assert count(conn, "record_batch_events") == 0
        assert RetentionResult() == retain(conn)
        assert materialize(conn, [p]).events_processed == 0
        assert sound(conn)

    log(conn, [p], [OLD, NOW])
    # With nothing to delete it is left beside what came after it.
    set_retention(conn, "t", retention_ms=20 * DAY, retention_bytes=None)
    assert RetentionResult() == retain(conn)
    assert runs(conn) == [10, 12, 14]
    assert head(conn, p) == (12, 16, 20)
    assert [b.object_key for b in fetch_batches(conn, p, 12)] == ["o0", "o1"]
    assert sound(conn)
    set_retention(conn, "t", retention_ms=DAY, retention_bytes=None)
    assert retain(conn).deleted == 1
    assert runs(conn) == [14]
    assert count(conn, "log_starts") == 1
    assert sound(conn)


def test_late_runs_and_what_they_skipped_go_with_the_others(conn: Conn, connect: Connect) -> None:
    """Their events lie between those of runs that are before and behind them in the log."""
    (p,) = topic(conn, size=1)
    late = [connect(autocommit=False) for _ in range(3)]
    for i, writer in enumerate(late):
        commit(writer, f"late{i}", [p, p], [OLD, OLD])
        commit(conn, f"o{i}", [p], [OLD])
    materialize(conn, [p])
    late[1].commit()
    materialize(conn, [p])
    log(conn, [p], [OLD, OLD], start=3)
    late[0].commit()
    materialize(conn, [p])
    late[2].rollback()
    log(conn, [p], [OLD], start=5)
    order = ["o0", "o1", "o2", "late1", "late1", "o3", "o4", "late0", "late0", "o5"]
    assert [b.object_key for b in fetch_batches(conn, p, 0)] == order
    assert sound(conn)
    for start, limit in ((3, 70), (5, 50), (6, 40), (7, 30), (9, 10), (9, 1)):
        set_retention(conn, "t", retention_ms=None, retention_bytes=limit)
        retain(conn)
        assert head(conn, p) == (2 * start, 20, 100 - 10 * start)
        assert [b.object_key for b in fetch_batches(conn, p, 2 * start)] == order[start:]
        assert count(conn, "record_batch_events") == 10 - start
        assert sound(conn)


@pytest.mark.parametrize(
    ("limit", "deleted"),
    [(51, 0), (50, 0), (41, 0), (40, 1), (39, 1), (31, 1), (30, 2), (10, 4), (9, 4), (1, 4)],
)
def test_size_keeps_at_least_the_limit(conn: Conn, limit: int, deleted: int) -> None:
    (p,) = topic(conn, size=limit)
    log(conn, [p], [OLD] * 5)

    assert retain(conn).deleted == deleted
    assert head(conn, p) == (2 * deleted, 10, 50 - 10 * deleted)
    assert sound(conn)


def test_either_limit_is_enough(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY, size=20)
    log(conn, [p], [OLD, NOW, NOW, NOW, NOW])
    assert retain(conn).deleted == 3
    assert head(conn, p) == (6, 10, 20)


def test_an_object_is_dead_when_its_last_batch_is_deleted(conn: Conn) -> None:
    a, b = topic(conn, partitions=2, ms=DAY)
    shared = commit(conn, "shared", [a, b], [OLD, OLD])
    materialize(conn, [a, b])
    commit(conn, "more", [b], [NOW])
    lone = commit(conn, "lone", [a], [OLD])
    materialize(conn, [a])

    conn.execute("update tidemark.record_batch_events set max_timestamp = %s where partition_id = %s", (NOW, b))
    assert RetentionResult(deleted=2, log_bytes=20, objects_freed=1) == retain(conn)
    assert [d.id for d in list_dead_objects(conn, older_than_seconds=0)] == [lone]
    assert list_dead_objects(conn, older_than_seconds=60) == []
    assert list_dead_objects(conn, older_than_seconds=0, after_object_id=lone) == []
    rows = conn.execute("select object_id, batches from tidemark.deleted_batches order by object_id").fetchall()
    assert rows == [(shared, 1), (lone, 1)]

    # Live, unknown and doubled ids are passed over.
    assert forget_dead_objects(conn, [lone, shared, 999, lone]) == 1
    assert forget_dead_objects(conn, [lone]) == 0
    assert count(conn, "objects") == 2
    assert (count(conn, "dead_objects"), count(conn, "deleted_batches")) == (0, 1)
    assert commit(conn, "shared", [a, b], [OLD, OLD]) == shared
    # The key is free again: another object, with offsets of its own.
    assert commit(conn, "lone", [a], [NOW]) not in (lone, shared)


def test_a_pending_event_keeps_its_object_alive(conn: Conn) -> None:
    a, b = topic(conn, partitions=2, ms=DAY)
    shared = commit(conn, "shared", [a, b], [OLD, OLD])
    materialize(conn, [a])
    assert retain(conn).objects_freed == 0
    assert forget_dead_objects(conn, [shared]) == 0
    materialize(conn, [b])
    assert retain(conn).objects_freed == 1


def test_an_object_of_which_too_much_was_deleted_is_kept(conn: Conn) -> None:
    """Something is wrong with it: nothing is deleted from storage on the strength of that."""
    a, b = topic(conn, partitions=2, ms=DAY)
    wrong = commit(conn, "wrong", [a, b], [OLD, NOW])
    materialize(conn, [a, b])
    conn.execute("insert into tidemark.deleted_batches values (%s, 1, 2)", (wrong,))
    assert RetentionResult(deleted=1, log_bytes=10) == retain(conn)
    conn.execute("insert into tidemark.dead_objects (object_id) values (%s)", (wrong,))
    assert forget_dead_objects(conn, [wrong]) == 0


def test_transactions_are_bounded_and_every_one_leaves_a_contiguous_log(conn: Conn, connect: Connect) -> None:
    ids = topic(conn, partitions=5, ms=DAY)
    for i in range(20):
        commit(conn, f"o{i}", [*ids, ids[0]], [OLD] * 6)
        materialize(conn, ids)
    reader, left, steps = connect(), [count(conn, "record_batches")], 0

    def look() -> bool:
        nonlocal steps
        steps += 1
        left.append(count(reader, "record_batches"))
        assert sound(reader)
        return False

    result = retain(conn, delete_batch=7, stop=look)
    assert (result.deleted, result.next_partition_id) == (120, None)
    assert result.objects_freed == 20 == count(conn, "dead_objects")
    assert left[-1] == 0
    assert all(0 <= before - after <= 7 for before, after in pairwise(left))
    assert 120 / 7 <= steps <= 120 / 7 + 12


def test_a_run_larger_than_a_transaction_may_be_goes_alone(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    commit(conn, "o", [p] * 130, [OLD] * 130)
    materialize(conn, [p])
    deleted = [retention._delete(conn, [p], 10)[0].batches for _ in range(4)]
    assert deleted == [64, 64, 2, 0]
    assert sound(conn)


def test_stopped_it_goes_on_where_it_was(conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_PAGE", 2)
    monkeypatch.setattr(retention, "_SHARE", 5_000)
    ids = [*topic(conn, "a", 3, ms=DAY), *topic(conn, "b", 1), *topic(conn, "c", 2, ms=DAY)]
    commit(conn, "o", ids, [OLD] * 6)
    materialize(conn, ids)

    deleted, after, calls = 0, 0, 0
    while True:
        result = retain(conn, after_partition_id=after, stop=lambda: True)
        deleted, calls = deleted + result.deleted, calls + 1
        if result.next_partition_id is None:
            break
        after = result.next_partition_id
    assert deleted == 5
    assert calls < 12
    assert head(conn, ids[3]) == (0, 2, 10)


def test_paging_finds_every_expired_partition_once(conn: Conn) -> None:
    old = [i for n in range(6) for i in topic(conn, f"l{n}", n + 1, ms=DAY)]
    others = [*topic(conn, "unlimited", 5), *topic(conn, "young", 3, ms=30 * DAY)]
    log(conn, [*old, *others], [OLD])
    topic(conn, "empty", 3, ms=DAY, size=1)
    for page in (1, 2, 3, 100):
        seen: list[int] = []
        after = 0
        while True:
            ((last, expired),) = run(conn, "find_expired", (after, page)).fetchall()
            if last is None:
                break
            assert after < last <= after + page
            seen += expired
            after = last
        assert seen == old


def test_the_start_offset_may_lie_inside_a_batch(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    log(conn, [p], [OLD, OLD, NOW])
    delete_records(conn, p, 1)
    assert sound(conn)
    assert retain(conn).deleted == 2
    assert head(conn, p) == (4, 6, 10)
    assert sound(conn)


def read(conn: Conn, ids: Sequence[int]) -> None:
    """Fetch from the start of each log, which may have moved on by then."""
    for p in ids:
        start, end, _ = head(conn, p)
        try:
            batches = fetch_batches(conn, p, start)
        except OffsetOutOfRangeError:
            continue
        assert batches or start == end
        position = start
        for batch in batches:
            assert batch.start_offset == position
            assert batch.object_key is not None
            position += batch.n_records


def test_readers_and_materialization_meanwhile(conn: Conn, connect: Connect) -> None:
    """Two retentions beside commits, materialization, snapshots and readers: no deadlock, nothing lost or doubled."""
    ids = topic(conn, partitions=8, ms=DAY, size=10**9)
    done = Event()
    until = time.monotonic() + 4
    committed = 0

    def loop(step: Callable[[Conn], Any]) -> int:
        mine, turns = connect(), 0
        while not done.is_set():
            step(mine)
            turns += 1
        return turns

    def forget(mine: Conn) -> int:
        return forget_dead_objects(mine, [d.id for d in list_dead_objects(mine, older_than_seconds=0)])

    def check(mine: Conn) -> None:
        assert audit(mine, from_scratch=True).violations == ()

    steps: Sequence[Callable[[Conn], Any]] = (
        lambda mine: retain(mine, delete_batch=13),
        lambda mine: retain(mine, delete_batch=40, after_partition_id=ids[2]),
        lambda mine: materialize(mine, ids[:5]),
        lambda mine: materialize(mine, ids[3:]),
        lambda mine: read(mine, ids),
        check,
        forget,
    )
    with ThreadPoolExecutor(len(steps)) as threads:
        running = [threads.submit(loop, step) for step in steps]
        try:
            while time.monotonic() < until and not any(f.done() for f in running):
                order = ids if committed % 2 else ids[::-1]
                commit(conn, f"o{committed}", order, [OLD] * 8)
                committed += 1
        finally:
            done.set()
        assert all(f.result() > 0 for f in running)
    materialize(conn, ids)
    while retain(conn).deleted:
        pass
    assert [head(conn, p) for p in ids] == [(2 * committed, 2 * committed, 0)] * 8
    # A thousand at a time.
    while forget(conn):
        pass
    assert count(conn, "objects") == 0


def waits_for_a_lock(conn: Conn, pid: int) -> Callable[[], bool]:
    def a_session_waits_for_a_lock() -> bool:
        row = conn.execute("select wait_event_type from pg_stat_activity where pid = %s", (pid,)).fetchone()
        return row == ("Lock",)

    return a_session_waits_for_a_lock


def test_two_retentions_that_finish_an_object_at_one_moment(conn: Conn, connect: Connect) -> None:
    """The second counts what the first deleted, which it could not see when it deleted its own."""
    a, b = topic(conn, partitions=2, ms=DAY)
    shared = commit(conn, "shared", [a, b], [OLD, OLD])
    materialize(conn, [a, b])
    first, second = connect(), connect()
    with ThreadPoolExecutor(1) as threads:
        with first.transaction():
            run(first, "transaction_settings")
            run(first, "lock_free_partitions", (Int4Array([a]),))
            run(first, "delete_expired", (10,))
            run(first, "lock_spent_objects")
            assert run(first, "free_spent_objects").rowcount == 0
            other = threads.submit(retention._delete, second, [b], 10)
            wait_until(waits_for_a_lock(conn, second.info.backend_pid))
        deleted, freed = other.result()
    assert (deleted.batches, deleted.log_bytes, deleted.unfinished, freed) == (1, 10, [], 1)
    assert [d.id for d in list_dead_objects(conn, older_than_seconds=0)] == [shared]
    assert sound(conn)


def test_two_retentions_at_once_free_each_object_once(conn: Conn, connect: Connect) -> None:
    """Partitions apart, objects shared in opposite order: neither waits for the other in a circle."""
    ids = topic(conn, partitions=2, ms=DAY)
    for i in range(3000):
        commit(conn, f"o{i}", ids, [OLD, OLD])
    conn.execute(
        "update tidemark.record_batch_events e set id = ((o.low + o.high - (e.id >> 16)) << 16) + (e.id & 65535) "
        "from (select min(id) as low, max(id) as high from tidemark.objects) o where e.partition_id = %s",
        (ids[1],),
    )
    materialize(conn, ids)
    barrier = Barrier(2)

    def one(partition_id: int) -> tuple[int, int]:
        mine = connect()
        barrier.wait()
        deleted, freed = retention._delete(mine, [partition_id], 3000)
        return deleted.batches, freed

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(one, ids))
    assert sorted(results) == [(3000, 0), (3000, 3000)]
    assert count(conn, "dead_objects") == 3000
    assert sound(conn)


def test_a_partition_that_somebody_has_locked_is_passed_over(conn: Conn, connect: Connect) -> None:
    ids = topic(conn, partitions=3, ms=DAY)
    log(conn, ids, [OLD])
    conn.execute("set lock_timeout = '1s'")
    other = connect(autocommit=False)
    other.execute("select from tidemark.topic_partitions where id = %s for no key update", (ids[1],))
    assert RetentionResult(deleted=2, log_bytes=20) == retain(conn)
    other.rollback()
    assert RetentionResult(deleted=1, log_bytes=10, objects_freed=1) == retain(conn)


def test_a_snapshot_from_before_still_reads_the_old_log(conn: Conn, connect: Connect) -> None:
    (p,) = topic(conn, ms=DAY)
    commit(conn, "a", [p], [OLD])
    materialize(conn, [p])
    old = connect(autocommit=False)
    old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    old.execute("select 1 from tidemark.topics")
    retain(conn)
    assert [b.object_key for b in fetch_batches(old, p, 0)] == ["a"]


def plan(conn: Conn, name: str, *parameters: Any) -> list[dict[str, Any]]:
    """The nodes of a statement's plan, as it is run; the first one's buffers are those of all."""
    cursor = RawCursor(conn)
    run(conn, "transaction_settings")
    cursor.execute(b"prepare checked as " + statements()[name])
    values = f"({', '.join(str(parameter) for parameter in parameters)})" if parameters else ""
    row = conn.execute(f"explain (analyze, buffers, format json) execute checked {values}".encode()).fetchone()
    cursor.execute("deallocate checked")
    assert row is not None

    def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield node
        for child in node.get("Plans", ()):
            yield from nodes(child)

    return list(nodes(row[0][0]["Plan"]))


def buffers(nodes: list[dict[str, Any]]) -> int:
    return int(nodes[0]["Shared Hit Blocks"] + nodes[0]["Shared Read Blocks"])


def scans(nodes: list[dict[str, Any]], table: str) -> list[dict[str, Any]]:
    return [n for n in nodes if "Scan" in n["Node Type"] and n.get("Relation Name") == table]


def rows_read(nodes: list[dict[str, Any]], table: str) -> float:
    """With what a filter took away."""
    found = scans(nodes, table)
    return float(sum((n["Actual Rows"] + n.get("Rows Removed by Filter", 0)) * n["Actual Loops"] for n in found))


def fill(conn: Conn, partition_id: int, batches: int) -> None:
    commit_object(
        conn,
        f"big{partition_id}",
        [partition_id] * batches,
        [1] * batches,
        [0] * batches,
        [1] * batches,
        [OLD] * (batches // 2) + [NOW] * (batches - batches // 2),
    )
    materialize(conn, [partition_id])


def test_the_probe_reads_one_run(conn: Conn) -> None:
    ids = topic(conn, partitions=20, ms=DAY)
    for p in ids:
        fill(conn, p, 1024)
    conn.execute("analyze tidemark.record_batch_events, tidemark.runs, tidemark.topic_partitions, tidemark.topics")
    for deleted in (0, 20 * 512):
        with conn.transaction(force_rollback=True):
            nodes = plan(conn, "find_expired", 0, 1000)
        assert {n["Index Name"] for n in scans(nodes, "runs")} == {"runs_pkey"}
        assert rows_read(nodes, "record_batch_events") == 20 * (1 if deleted else 64)
        # Also over the dead index entries of what was deleted before.
        assert buffers(nodes) <= 20 * 30
        if not deleted:
            assert retain(conn).deleted == 20 * 512


@pytest.mark.parametrize("analyzed", [False, True])
def test_a_page_costs_what_is_in_it(conn: Conn, *, analyzed: bool) -> None:
    """However many topics there are."""
    conn.execute(
        "insert into tidemark.topics (name, partitions, retention_ms) "
        "select 't' || n, 4, 1e9 from generate_series(1, 20000) n"
    )
    conn.execute(
        "insert into tidemark.topic_partitions (topic_id, partition) "
        "select t.id, n from tidemark.topics t, generate_series(0, 3) n"
    )
    if analyzed:
        conn.execute("analyze")
    for after in (0, 40_000):
        with conn.transaction(force_rollback=True):
            assert buffers(plan(conn, "find_expired", after, 1000)) <= 1000 * 14


@pytest.mark.parametrize("analyzed", [False, True])
def test_deleting_reads_what_it_deletes(conn: Conn, *, analyzed: bool) -> None:
    ids = topic(conn, partitions=4, ms=DAY)
    if not analyzed:
        conn.execute("analyze")  # as empty
    for p in ids:
        fill(conn, p, 6400)
    if analyzed:
        conn.execute("analyze")
    with conn.transaction(force_rollback=True):
        run(conn, "transaction_settings")
        run(conn, "lock_free_partitions", (Int4Array(ids[:2]),))
        nodes = plan(conn, "delete_expired", 640)
        # Looked at for their times, and deleted. One run more is looked at, of which one batch is too young.
        assert rows_read(nodes, "record_batch_events") <= 2 * (2 * 640 + 64 * 641 - 64 * 10)
        assert {n["Index Name"] for n in scans(nodes, "runs")} == {"runs_pkey"}
        for name in ("lock_spent_objects", "free_spent_objects"):
            nodes = plan(conn, name)
            assert {n["Index Name"] for n in scans(nodes, "objects")} == {"objects_pkey"}
            assert rows_read(nodes, "objects") == 2


def test_limits_are_set_and_refused(conn: Conn) -> None:
    topic(conn, ms=5, size=6)
    row = conn.execute("select retention_ms, retention_bytes from tidemark.topics").fetchone()
    assert row == (5, 6)
    for limit in (-1, 2**63):
        with pytest.raises(InvalidTopicError, match=f"{limit} bytes is out of range"):
            set_retention(conn, "t", retention_ms=None, retention_bytes=limit)
    with pytest.raises(UnknownTopicError, match="'nix'"):
        set_retention(conn, "nix", retention_ms=None, retention_bytes=None)
    set_retention(conn, "t", retention_ms=None, retention_bytes=None)
    row = conn.execute("select retention_ms, retention_bytes from tidemark.topics").fetchone()
    assert row == (None, None)


def test_many_thin_partitions_share_transactions(conn: Conn) -> None:
    ids = topic(conn, partitions=1000, ms=DAY)
    commit(conn, "o", ids, [OLD] * 1000)
    materialize(conn, ids)
    transactions = 0

    def step() -> bool:
        nonlocal transactions
        transactions += 1
        return False

    assert retain(conn, stop=step).deleted == 1000
    # 78 partitions in each, which may have 64 batches; and one page.
    assert transactions == 13 + 1
    assert count(conn, "dead_objects") == 1


def test_a_held_snapshot_slows_nothing(conn: Conn, connect: Connect) -> None:
    """What is deleted under it stays in the tables and indexes; no statement walks over that."""
    (p,) = topic(conn, size=20)
    held = connect(autocommit=False)
    held.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    held.execute("select 1 from tidemark.topics")

    def call(function: LiteralString) -> int:
        row = conn.execute(f"explain (analyze, buffers, format json) select tidemark.{function}").fetchone()
        assert row is not None
        return buffers([row[0][0]["Plan"]])

    def turn(i: int) -> dict[str, int]:
        log(conn, [p], [OLD] * 2, start=2 * i)
        cost = {}
        with conn.transaction(force_rollback=True):
            cost["find"] = buffers(plan(conn, "find_expired", 0, 1000))
            cost["commit"] = call(
                f"commit_object('x', array[{p}], array[2], array[0::bigint], array[10], array[0::bigint])"
            )
            run(conn, "lock_free_partitions", (Int4Array([p]),))
            cost["place"] = buffers(plan(conn, "place_incremental", 100))
            cost["fetch"] = call(f"fetch_batches({p}, {head(conn, p)[0]}, 1000, 10)")
            cost["delete"] = buffers(plan(conn, "delete_expired", 100))
            cost["lock"] = buffers(plan(conn, "lock_spent_objects"))
            cost["free"] = buffers(plan(conn, "free_spent_objects"))
        assert retain(conn).deleted == (2 if i else 0)
        start, end, size = head(conn, p)
        assert (end - start, size) == (4, 20)
        return cost

    costs = [turn(i) for i in range(400)]
    assert count(conn, "runs") == 2
    # Medians: now and then a row begins a new page. Indexes may have grown by a level, a page for each descent;
    # who walks over what was deleted in between reads nearly twice as many.
    early, late = ({name: median(c[name] for c in some) for name in some[0]} for some in (costs[100:140], costs[-40:]))
    assert {name: late[name] for name in early if late[name] > early[name] * 1.4 + 4} == {}
