"""The audit: silent on a sound database at work, and loud about every kind of damage."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, LiteralString

import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.errors import UnknownTopicError
from db import audit as module
from db.audit import AuditResult, Violation, audit
from db.commit import commit_object
from db.materialize import materialize
from db.retention import retain
from db.topics import create_topic, partition_ids, set_retention
from db.trim import trim
from tests.support import Connect

OLD = 1_000_000_000_000

Conn = Connection[TupleRow]


def topic(conn: Conn, name: str = "t", partitions: int = 1) -> list[int]:
    create_topic(conn, name, partitions)
    return partition_ids(conn, name)


def commit(conn: Conn, key: str, ids: Sequence[int]) -> int:
    """One object with a batch of ten records and a hundred bytes for each of `ids`."""
    n = len(ids)
    return commit_object(conn, key, ids, [10] * n, [100 * i for i in range(n)], [100] * n, [OLD] * n)


@pytest.fixture
def partition(conn: Conn) -> int:
    """Partition with batches [0, 10) … [90, 100), one object each, and the events still there."""
    (p,) = topic(conn)
    for i in range(10):
        commit(conn, f"o{i}", [p])
    materialize(conn, [p])
    assert AuditResult(partitions=1, batches=10, violations=(), complete=True) == audit(conn)
    return p


def found(conn: Conn, **arguments: Any) -> list[Violation]:
    return list(audit(conn, from_scratch=True, **arguments).violations)


# What is done to the log; then (invariant, offset, part of the detail) of each violation.
DAMAGE: dict[str, tuple[LiteralString, list[tuple[str, int | None, str]]]] = {
    "gap": (
        (
            "delete from tidemark.record_batches where start_offset = 30;"
            "update tidemark.topic_partitions set byte_size = 900;"
            "delete from tidemark.record_batch_events;"
            "delete from tidemark.objects where key = 'o3'"
        ),
        [("gap", 40, "batch [40, 50) of object 5 starts after 30, the end of the one before")],
    ),
    "lost batch": (
        "delete from tidemark.record_batches where start_offset in (30, 50)",
        [
            ("unplaced", None, "of object 4 with 10 records lies below the cursor and has no batch (the first of 2)"),
            ("gap", 40, "starts after 30, the end of the one before (the first of 2)"),
            ("byte_size", 0, "byte_size is 1000, the batches from offset 0 to 100 have 800"),
        ],
    ),
    "overlap": (
        "update tidemark.record_batches set start_offset = 25 where start_offset = 30",
        [
            ("overlap", 25, "batch [25, 35) of object 4 starts before 30"),
            ("gap", 40, "starts after 35"),
        ],
    ),
    "longer": (
        (
            "update tidemark.record_batches set n_records = 15 where start_offset = 30;"
            "delete from tidemark.record_batch_events"
        ),
        [("overlap", 40, "batch [40, 50) of object 5 starts before 45")],
    ),
    "empty": (
        (
            "update tidemark.record_batches set n_records = 0 where start_offset = 30;"
            "delete from tidemark.record_batch_events"
        ),
        [("gap", 40, "after 30"), ("records", 30, "batch [30, 30) of object 4 has no records")],
    ),
    "end too high": (
        "update tidemark.topic_partitions set end_offset = 101",
        [("end_offset", 101, "the last batch is [90, 100), the end offset 101")],
    ),
    "end too low": (
        "update tidemark.topic_partitions set end_offset = 90",
        [("end_offset", 90, "the last batch is [90, 100), the end offset 90")],
    ),
    "start back": (
        (
            "delete from tidemark.record_batches where start_offset = 0;"
            "update tidemark.objects set live_batches = 0 where key = 'o0';"
            "update tidemark.topic_partitions set byte_size = 900;"
            "delete from tidemark.record_batch_events"
        ),
        [("start_offset", 0, "the first batch is [10, 20), after the start offset 0")],
    ),
    "start too high": (
        "update tidemark.topic_partitions set start_offset = 10",
        [("start_offset", 10, "the first batch is [0, 10), before the start offset 10")],
    ),
    "no batches": (
        (
            "delete from tidemark.record_batches; delete from tidemark.record_batch_events;"
            "update tidemark.topic_partitions set byte_size = 0"
        ),
        [("start_offset", 0, "there is no batch, though the log is [0, 100)")],
    ),
    "byte size": (
        "update tidemark.topic_partitions set byte_size = 1001",
        [("byte_size", 0, "byte_size is 1001, the batches from offset 0 to 100 have 1000")],
    ),
    "missing object": (
        "delete from tidemark.objects where key in ('o2', 'o5')",
        [("object", 20, "batch at offset 20 refers to object 3, which does not exist (the first of 2)")],
    ),
    "placed twice": (
        (
            "insert into tidemark.record_batches"
            " select 100, object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length"
            " from tidemark.record_batches where start_offset = 90;"
            "update tidemark.topic_partitions set end_offset = 110, byte_size = 1100"
        ),
        [
            ("batch_count", 90, "object 10 ('o9') brought 1 batches, the log holds 2 of it, the first at offset 90"),
            ("live_batches", 90, "object 10 ('o9') has live_batches 1, but at least 2 batches"),
        ],
    ),
    "counted too low": (
        "update tidemark.objects set live_batches = 0 where key = 'o4'",
        [("live_batches", 40, "object 5 ('o4') has live_batches 0, but at least 1 batches")],
    ),
    "counted too high": (
        "update tidemark.objects set live_batches = 2 where key = 'o4'",
        [("live_batches", 40, "has live_batches 2, but 1 batches, one at offset 40, and 0 pending events")],
    ),
    "dead too early": (
        "insert into tidemark.dead_objects (object_id) select id from tidemark.objects where key = 'o4'",
        [("live_batches", 40, "object 5 ('o4') is in dead_objects, its batch at offset 40 is not deleted")],
    ),
    "cursor ahead": (
        "update tidemark.topic_partitions set seen_xid = (pg_current_xact_id()::text::bigint + 1000)::text::xid8",
        [("cursor", None, "is not over in snapshot"), ("unplaced", None, "of object 11 ")],
    ),
    "in flight above": (
        "update tidemark.topic_partitions set in_flight = array['1', seen_xid::text]::xid8[]",
        # Waiting for a transaction that was materialized already.
        [
            ("in_flight", None, "is not all below seen_xid"),
            ("live_batches", 90, "has live_batches 1, but 1 batches, one at offset 90, and 1 pending events"),
        ],
    ),
    "skipped": (
        (
            "update tidemark.topic_partitions p set seen_xid = e.xid, seen_id = e.id"
            " from tidemark.record_batch_events e where e.object_id = 11"
        ),
        [("unplaced", None, "of object 11 with 10 records lies below the cursor and has no batch")],
    ),
    "pending without object": (
        "delete from tidemark.objects where id = 11",
        [("object", None, "refers to object 11, which does not exist")],
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_where_it_is(conn: Conn, partition: int, kind: str) -> None:
    commands, expected = DAMAGE[kind]
    commit(conn, "pending", [partition])
    assert found(conn) == []
    with conn.transaction():
        for command in commands.split(";"):
            conn.execute(command)

    violations = found(conn)
    assert {v.partition_id for v in violations} == {partition}
    assert sorted(v.invariant for v in violations) == sorted(name for name, _, _ in expected)
    for name, offset, detail in expected:
        (violation,) = [v for v in violations if v.invariant == name]
        assert detail in violation.detail
        assert violation.offset == offset
    # And again, without being told to begin at the beginning.
    again = {v.invariant for v in audit(conn).violations}
    assert again >= {v.invariant for v in violations} - {"unplaced", "cursor", "in_flight"}


def test_an_object_over_several_partitions_is_counted_over_all(conn: Conn) -> None:
    ids = topic(conn, partitions=3)
    commit(conn, "o", [*ids, ids[0]])
    materialize(conn, ids[:2])
    assert found(conn) == []
    # Neither placed nor pending any more.
    conn.execute("delete from tidemark.record_batch_events where partition_id = %s", (ids[2],))
    (violation,) = {v.detail for v in found(conn) if v.partition_id == ids[0]}
    assert "has live_batches 4, but 3 batches, one at offset 0, and 0 pending events" in violation
    # A stretch that does not hold all of them cannot tell.
    assert found(conn, batch_limit=1) == []


def test_an_end_offset_that_went_back_is_remembered(conn: Conn, partition: int) -> None:
    with conn.transaction():
        conn.execute("delete from tidemark.record_batches where start_offset = 90")
        conn.execute("delete from tidemark.record_batch_events")
        conn.execute("update tidemark.topic_partitions set end_offset = 90, byte_size = 900")
    (violation,) = audit(conn).violations
    assert (violation.invariant, violation.offset) == ("end_offset", 90)
    assert "went back: batches up to 100 were audited" in violation.detail


def test_only_what_is_new_is_read(conn: Conn, partition: int) -> None:
    assert audit(conn).batches == 0
    commit(conn, "more", [partition, partition])
    materialize(conn, [partition])
    assert AuditResult(partitions=1, batches=2, violations=(), complete=True) == audit(conn)
    assert audit(conn, from_scratch=True).batches == 12


def test_a_gap_at_the_seam_of_two_audits(conn: Conn, partition: int) -> None:
    commit(conn, "more", [partition, partition])
    materialize(conn, [partition])
    conn.execute("delete from tidemark.record_batches where start_offset = 100")
    (gap,) = [v for v in audit(conn).violations if v.invariant == "gap"]
    assert (gap.offset, "after 100" in gap.detail) == (110, True)


@pytest.mark.parametrize("limit", [1, 3, 10, 11])
def test_damage_is_found_in_stretches_of_any_length(conn: Conn, partition: int, limit: int) -> None:
    conn.execute("delete from tidemark.record_batches where start_offset = 50")
    conn.execute("delete from tidemark.record_batch_events")
    result = audit(conn, from_scratch=True, batch_limit=limit)
    assert (result.batches, result.complete) == (9, True)
    assert [(v.invariant, v.offset) for v in result.violations] == [("gap", 60), ("byte_size", 0)]
    assert [v.invariant for v in audit(conn, batch_limit=limit).violations] == ["gap", "byte_size"]


def test_stopped_it_goes_round(conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP", 2)
    ids = topic(conn, partitions=7)
    for n in range(3):
        commit(conn, f"o{n}", ids)
    materialize(conn, ids)

    read = calls = 0
    while read < 21:
        result = audit(conn, batch_limit=4, stop=lambda: True)
        assert not result.complete
        assert result.violations == ()
        assert result.batches <= 4
        read, calls = read + result.batches, calls + 1
        assert calls < 20
    assert audit(conn).batches == 0
    # Also when there is nothing new: each stop is further on.
    seen = set()
    for _ in range(4):
        audit(conn, stop=lambda: True)
        row = conn.execute("select partition_id from tidemark.audit_progress order by audited_at desc").fetchone()
        assert row is not None
        seen.add(row[0])
    assert len(seen) == 4


def test_one_topic(conn: Conn) -> None:
    ids = [*topic(conn, "a", 2), *topic(conn, "b", 3)]
    commit(conn, "o", ids)
    materialize(conn, ids)
    conn.execute("update tidemark.topic_partitions set byte_size = 1 where id = any(%s)", (ids[:1],))
    assert AuditResult(partitions=3, batches=3, violations=(), complete=True) == audit(conn, topic="b")
    assert [v.partition_id for v in audit(conn, topic="a").violations] == [ids[0]]
    assert audit(conn).partitions == 5
    with pytest.raises(UnknownTopicError):
        audit(conn, topic="c")


def test_it_ends_with_enough_violations(conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP", 2)
    monkeypatch.setattr(module, "_VIOLATIONS", 3)
    topic(conn, partitions=50)
    conn.execute("update tidemark.topic_partitions set end_offset = 1")
    result = audit(conn)
    assert (len(result.violations) < 8, result.complete) == (True, False)


def test_an_expired_batch_is_not_a_lost_one(conn: Conn) -> None:
    ids = topic(conn, partitions=2)
    for n in range(5):
        commit(conn, f"o{n}", [*ids, ids[0]])
    materialize(conn, ids)
    set_retention(conn, "t", retention_ms=None, retention_bytes=250)
    assert retain(conn).deleted == 7 + 2
    assert found(conn) == []
    assert audit(conn).violations == ()


def test_it_locks_nothing_and_holds_no_snapshot(conn: Conn, connect: Connect, partition: int) -> None:
    """It runs beside a transaction that holds every row lock there is, and leaves none behind."""
    other = connect(autocommit=False)
    other.execute("select from tidemark.topic_partitions for update")
    other.execute("select from tidemark.objects for update")
    conn.execute("set lock_timeout = '1s'")
    assert audit(conn, from_scratch=True).violations == ()
    assert conn.info.transaction_status.name == "IDLE"


def test_nothing_is_wrong_with_a_database_at_work(conn: Conn, connect: Connect) -> None:
    """Commits, stragglers, rollbacks, materialization in small bites, trim and retention, under audit all along."""
    ids = topic(conn, partitions=4)
    set_retention(conn, "t", retention_ms=None, retention_bytes=2000)
    done = Event()

    def loop(step: Callable[[Conn, int], Any], *, autocommit: bool = True) -> int:
        mine, turns = connect(autocommit=autocommit), 0
        while not done.is_set():
            step(mine, turns)
            turns += 1
        return turns

    def straggle(mine: Conn, turn: int) -> None:
        commit(mine, f"s{turn}", [*ids, *ids])
        time.sleep(0.03)
        if turn % 3:
            mine.commit()
        else:
            mine.rollback()

    def check(limit: int) -> Callable[[Conn, int], None]:
        def step(mine: Conn, turn: int) -> None:
            assert audit(mine, from_scratch=turn % 2 == 0, batch_limit=limit).violations == ()

        return step

    jobs = (
        (lambda mine, turn: commit(mine, f"c{turn}", ids), True),
        (straggle, False),
        (lambda mine, _: materialize(mine, ids, events_per_partition=7), True),
        (lambda mine, _: materialize(mine, ids[1:3], events_per_partition=3), True),
        (lambda mine, _: trim(mine, delete_batch=11), True),
        (lambda mine, _: retain(mine, delete_batch=9), True),
        (check(100_000), True),
        (check(17), True),
    )
    with ThreadPoolExecutor(len(jobs)) as threads:
        running = [threads.submit(loop, step, autocommit=autocommit) for step, autocommit in jobs]
        until = time.monotonic() + 5
        while time.monotonic() < until and not any(f.done() for f in running):
            time.sleep(0.05)
        done.set()
        turns = [f.result() for f in running]
    assert min(turns) > 0
    while materialize(conn, ids).backlog_partition_ids:
        pass
    assert found(conn) == []
