"""Retention: Kafka's rule, bounded transactions, and a log that stays contiguous for everyone who reads it."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from threading import Barrier, Event
from typing import Any

import psycopg
import pytest
from psycopg import Connection, RawCursor
from psycopg.rows import TupleRow

from config.errors import InvalidTopicError, OffsetOutOfRangeError, UnknownTopicError
from db import retention
from db.audit import audit
from db.commit import commit_object
from db.dead_objects import forget_dead_objects, list_dead_objects
from db.execute import run
from db.fetch import fetch_batches
from db.materialize import materialize
from db.retention import RetentionResult, retain
from db.statements import statement
from db.topics import create_topic, partition_ids, set_retention
from tests.support import Connect

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


def head(conn: Conn, partition_id: int) -> tuple[int, int, int]:
    row = conn.execute(
        "select start_offset, end_offset, byte_size from tidemark.topic_partitions where id = %s", (partition_id,)
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
    assert run(conn, "find_expired", (0, 10)).fetchall() == []
    assert head(conn, p) == (0, 2, 10)


def test_time_stops_at_the_first_batch_that_is_young_enough(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    for i, timestamp in enumerate([OLD, OLD, NOW, OLD]):
        commit(conn, f"o{i}", [p], [timestamp])
    materialize(conn, [p])

    assert RetentionResult(deleted=2, log_bytes=20, objects_freed=2, partitions=1) == retain(conn)
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
    for key in ("a", "b"):
        commit(conn, key, [p], [-1])
    materialize(conn, [p])
    assert RetentionResult() == retain(conn)

    conn.execute("update tidemark.objects set committed_at = now() - interval '25 hours' where key = 'a'")
    assert retain(conn).deleted == 1
    assert head(conn, p) == (2, 4, 10)


def test_a_log_can_expire_whole_and_go_on(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    commit(conn, "a", [p], [OLD])
    materialize(conn, [p])
    assert retain(conn).deleted == 1
    assert head(conn, p) == (2, 2, 0)
    assert fetch_batches(conn, p, 2) == []

    commit(conn, "b", [p], [NOW])
    materialize(conn, [p])
    assert RetentionResult() == retain(conn)
    assert head(conn, p) == (2, 4, 10)
    assert sound(conn)


@pytest.mark.parametrize(
    ("limit", "deleted"),
    [(51, 0), (50, 0), (41, 0), (40, 1), (39, 1), (31, 1), (30, 2), (10, 4), (9, 4), (1, 4)],
)
def test_size_keeps_at_least_the_limit(conn: Conn, limit: int, deleted: int) -> None:
    (p,) = topic(conn, size=limit)
    for i in range(5):
        commit(conn, f"o{i}", [p], [OLD])
    materialize(conn, [p])

    assert retain(conn).deleted == deleted
    assert head(conn, p) == (2 * deleted, 10, 50 - 10 * deleted)
    assert sound(conn)


def test_either_limit_is_enough(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY, size=20)
    for i, timestamp in enumerate([OLD, NOW, NOW, NOW, NOW]):
        commit(conn, f"o{i}", [p], [timestamp])
    materialize(conn, [p])
    assert retain(conn).deleted == 3
    assert head(conn, p) == (6, 10, 20)


def test_an_object_is_dead_when_its_last_batch_is_deleted(conn: Conn) -> None:
    a, b = topic(conn, partitions=2, ms=DAY)
    shared = commit(conn, "shared", [a, b, b], [OLD, OLD, NOW])
    lone = commit(conn, "lone", [a], [OLD])
    materialize(conn, [a, b])

    result = retain(conn)
    assert RetentionResult(deleted=3, log_bytes=30, objects_freed=1, partitions=2) == result
    assert [d.id for d in list_dead_objects(conn, older_than_seconds=0)] == [lone]
    assert list_dead_objects(conn, older_than_seconds=60) == []
    assert list_dead_objects(conn, older_than_seconds=0, after_object_id=lone) == []
    rows = conn.execute("select live_batches from tidemark.objects order by id").fetchall()
    assert rows == [(1,), (0,)]
    assert sound(conn)

    # Live, unknown and doubled ids are passed over.
    assert forget_dead_objects(conn, [lone, shared, 999, lone]) == 1
    assert forget_dead_objects(conn, [lone]) == 0
    assert count(conn, "objects") == 1
    assert count(conn, "dead_objects") == 0
    assert sound(conn)
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
    assert (result.deleted, result.partitions, result.next_partition_id) == (120, 5, None)
    assert result.objects_freed == 20 == count(conn, "dead_objects")
    assert left[-1] == 0
    assert all(0 <= before - after <= 7 for before, after in pairwise(left))
    # The first ones share it, one of them has more and goes on alone with all of it.
    assert 120 / 7 <= steps <= 120 / 7 + 12


def test_stopped_it_goes_on_where_it_was(conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "_PAGE", 2)
    monkeypatch.setattr(retention, "_GROUP", 1)
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
    # A position that means nothing is the first one.
    assert len(run(conn, "find_expired", (987654, 10)).fetchall()) == 5


def test_paging_visits_every_limited_partition_once(conn: Conn) -> None:
    limited = {i for n in range(6) for i in topic(conn, f"l{n}", n + 1, ms=DAY)}
    topic(conn, "unlimited", 5)
    for page in (1, 2, 3, 100):
        seen: list[int] = []
        while rows := run(conn, "find_expired", (seen[-1] if seen else 0, page)).fetchall():
            assert len(rows) <= page
            seen += [row[0] for row in rows]
        assert sorted(seen) == sorted(limited)


def test_a_counter_that_would_fall_below_zero_deletes_nothing(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    commit(conn, "a", [p], [OLD])
    materialize(conn, [p])
    conn.execute("update tidemark.topic_partitions set byte_size = 9")
    with pytest.raises(psycopg.errors.CheckViolation):
        retain(conn)
    assert count(conn, "record_batches") == 1


def test_the_start_offset_may_lie_inside_a_batch(conn: Conn) -> None:
    (p,) = topic(conn, ms=DAY)
    for i, timestamp in enumerate([OLD, OLD, NOW]):
        commit(conn, f"o{i}", [p], [timestamp])
    materialize(conn, [p])
    conn.execute("update tidemark.topic_partitions set start_offset = 1")
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


def test_two_retentions_count_shared_objects_down_once_each(conn: Conn, connect: Connect) -> None:
    """Partitions apart, objects shared in opposite order: neither waits for the other in a circle."""
    ids = topic(conn, partitions=2, ms=DAY)
    for i in range(3000):
        commit(conn, f"o{i}", ids, [OLD, OLD])
    materialize(conn, ids)
    conn.execute(
        "update tidemark.record_batches set object_id = (select min(id) + max(id) from tidemark.objects) - object_id "
        "where partition_id = %s",
        (ids[1],),
    )
    barrier = Barrier(2)

    def one(partition_id: int) -> int:
        mine = connect()
        barrier.wait()
        return sum(row[1] for row in retention._delete(mine, [partition_id], 3000))

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(one, ids)) == [3000, 3000]
    assert count(conn, "dead_objects") == 3000
    assert sound(conn)


def test_a_snapshot_from_before_still_reads_the_old_log(conn: Conn, connect: Connect) -> None:
    (p,) = topic(conn, ms=DAY)
    commit(conn, "a", [p], [OLD])
    materialize(conn, [p])
    old = connect(autocommit=False)
    old.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    old.execute("select 1 from tidemark.topics")
    retain(conn)
    assert [b.object_key for b in fetch_batches(old, p, 0)] == ["a"]


def plan(conn: Conn, name: str, *parameters: Any, analyze: bool = True) -> list[dict[str, Any]]:
    """The nodes of a statement's plan."""
    options = b"explain (analyze, buffers, format json) " if analyze else b"explain (format json) "
    cursor = RawCursor(conn)
    row = cursor.execute(options + statement(name), parameters).fetchone()
    assert row is not None

    def nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield node
        for child in node.get("Plans", ()):
            yield from nodes(child)

    return list(nodes(row[0][0]["Plan"]))


def batch_scans(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [n for n in nodes if "Scan" in n["Node Type"] and n.get("Relation Name") == "record_batches"]


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


def test_the_probe_reads_one_batch_by_the_primary_key(conn: Conn) -> None:
    ids = topic(conn, partitions=20, ms=DAY)
    for p in ids:
        fill(conn, p, 500)
    conn.execute("analyze tidemark.record_batches, tidemark.topic_partitions, tidemark.topics")

    scans = batch_scans(plan(conn, "find_expired", 0, 1000))
    assert [s["Index Name"] for s in scans] == ["record_batches_pkey"]
    assert (scans[0]["Actual Rows"], scans[0]["Actual Loops"]) == (1, 20)
    # Also over the dead index entries of what was deleted before.
    retain(conn)
    scans = batch_scans(plan(conn, "find_expired", 0, 1000))
    assert scans[0]["Shared Hit Blocks"] + scans[0]["Shared Read Blocks"] <= 20 * 5


@pytest.mark.parametrize("analyzed", [False, True])
def test_deleting_reads_what_it_deletes(conn: Conn, *, analyzed: bool) -> None:
    ids = topic(conn, partitions=4, ms=DAY)
    if not analyzed:
        conn.execute("analyze tidemark.record_batches, tidemark.objects")  # as empty
    for p in ids:
        fill(conn, p, 5000)
    if analyzed:
        conn.execute("analyze tidemark.record_batches, tidemark.objects")
    with conn.transaction(force_rollback=True):
        conn.execute(statement("transaction_settings"))
        conn.execute("set local enable_hashjoin = off")
        nodes = plan(conn, "delete_expired", ids[:2], 50)
    scans = batch_scans(nodes)
    assert {s["Index Name"] for s in scans} == {"record_batches_pkey"}
    assert sum(s["Actual Rows"] * s["Actual Loops"] for s in scans) <= 2 * (50 + 50 + 1)
    objects = [n for n in nodes if n.get("Relation Name") == "objects" and "Scan" in n["Node Type"]]
    assert {n["Index Name"] for n in objects} == {"objects_pkey"}


def test_limits_are_set_and_refused(conn: Conn) -> None:
    topic(conn, ms=5, size=6)
    row = conn.execute("select retention_ms, retention_bytes from tidemark.topics").fetchone()
    assert row == (5, 6)
    for limit in (0, -1, 2**63):
        with pytest.raises(InvalidTopicError, match="retention_bytes"):
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
    assert transactions == 5
    assert count(conn, "dead_objects") == 1
