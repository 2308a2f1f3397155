"""The audit: silent on a sound database at work, and loud about every kind of damage."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from threading import Event
from typing import Any, LiteralString

import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.errors import UnknownTopicError
from db import audit as module
from db.audit import AuditResult, Violation, audit
from db.materialize import materialize
from db.retention import retain
from db.topics import set_retention
from tests.integration import conftest
from tests.integration.conftest import make_topic
from tests.support import Connect

OLD = 1_000_000_000_000

Conn = Connection[TupleRow]


commit = partial(conftest.commit, records=10, length=100, timestamp=OLD)


@pytest.fixture
def partition(conn: Conn) -> int:
    """Partition with batches [0, 10) … [90, 100), each an object and a run of its own: object n is in the run n."""
    (p,) = make_topic(conn, "t")
    for i in range(10):
        commit(conn, f"o{i}", [p])
        materialize(conn, [p])
    assert AuditResult(partitions=1, batches=10, violations=(), complete=True) == audit(conn)
    return p


def found(conn: Conn, **arguments: Any) -> list[Violation]:
    return list(audit(conn, from_scratch=True, **arguments).violations)


# What is done to the log; then (invariant, offset, part of the detail) of each violation. Object 11 is pending.
DAMAGE: dict[str, tuple[LiteralString, list[tuple[str, int | None, str]]]] = {
    "gap": (
        (
            "delete from tidemark.runs where start_offset = 30;"
            "delete from tidemark.record_batch_events where id >> 16 = 4"
        ),
        [("gap", 40, "run [40, 50) starts after 30, the end of the one before")],
    ),
    "lost runs": (
        "delete from tidemark.runs where start_offset in (30, 50)",
        [
            ("gap", 40, "starts after 30, the end of the one before (the first of 2)"),
            ("unplaced", 40, "has 1 batches below the end of the run at offset 40, 0 are placed and none is pending"),
        ],
    ),
    "overlap": (
        "update tidemark.runs set start_offset = 25 where start_offset = 30",
        [
            ("overlap", 25, "run [25, 40) starts before 30, the end of the one before"),
            ("records", 25, "run [25, 40) has events with 10 records"),
        ],
    ),
    "lost event": (
        "delete from tidemark.record_batch_events where id >> 16 = 4",
        [
            ("batches", 30, "run [30, 40) has 1 batches, and events 0"),
            ("records", 30, "has events with 0 records"),
            ("byte_size", 30, "ends at byte 400, but its events have 0 after 300"),
        ],
    ),
    "batches": (
        "update tidemark.runs set batches = 2 where start_offset = 30",
        [("batches", 30, "run [30, 40) has 2 batches, and events 1")],
    ),
    "longer": (
        "update tidemark.record_batch_events set n_records = 15 where id >> 16 = 4",
        [("records", 30, "run [30, 40) has events with 15 records")],
    ),
    "end too high": (
        "update tidemark.runs set end_offset = 101 where start_offset = 90",
        [("records", 90, "run [90, 101) has events with 10 records")],
    ),
    "end too low": (
        "update tidemark.runs set end_offset = 95 where start_offset = 90",
        [("records", 90, "run [90, 95) has events with 10 records")],
    ),
    "bytes of a run": (
        "update tidemark.runs set end_bytes = 401 where start_offset = 30",
        [("byte_size", 30, "run [30, 40) ends at byte 401, but its events have 100 after 300 (the first of 2)")],
    ),
    "bytes of an event": (
        "update tidemark.record_batch_events set byte_length = 99 where id >> 16 = 4",
        [("byte_size", 30, "run [30, 40) ends at byte 400, but its events have 99 after 300")],
    ),
    "bytes before the first": (
        "update tidemark.runs set end_bytes = end_bytes + 1",
        [("byte_size", 0, "run [0, 10) ends at byte 101, but its events have 100 after 0")],
    ),
    "time of a run": (
        "update tidemark.runs set max_timestamp = max_timestamp + 1 where start_offset = 30",
        [
            (
                "max_timestamp",
                30,
                "1000000000001, but its events have 1000000000000 after 1000000000000 (the first of 2)",
            )
        ],
    ),
    "time of the first": (
        "update tidemark.runs set max_timestamp = max_timestamp + 1",
        [("max_timestamp", 0, "has max_timestamp 1000000000001, but its events have 1000000000000 after")],
    ),
    "time of an event": (
        "update tidemark.record_batch_events set max_timestamp = max_timestamp + 1 where id >> 16 = 4",
        [("max_timestamp", 30, "has max_timestamp 1000000000000, but its events have 1000000000001")],
    ),
    "no first run": (
        (
            "delete from tidemark.runs where start_offset = 0;"
            "delete from tidemark.record_batch_events where id >> 16 = 1"
        ),
        [("start_offset", 0, "no run holds the start offset 0, though the log ends at 100")],
    ),
    "no run at the start": (
        (
            "delete from tidemark.runs where start_offset between 10 and 40;"
            "delete from tidemark.record_batch_events where id >> 16 between 1 and 5;"
            "insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, stale_run, partition_id)"
            " select 10, 10, 100, 0, partition_id from tidemark.runs where start_offset = 0"
        ),
        [("start_offset", 10, "no run holds the start offset 10, though the log ends at 100")],
    ),
    "start beyond the end": (
        (
            "insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, partition_id)"
            " select 101, 101, 1000, partition_id from tidemark.runs where start_offset = 0"
        ),
        [("start_offset", 101, "the start offset 101 lies beyond the end offset 100")],
    ),
    "no runs": (
        (
            "insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, partition_id)"
            " select 100, 100, 1000, partition_id from tidemark.runs where start_offset = 0;"
            "delete from tidemark.runs; delete from tidemark.record_batch_events where id >> 16 < 11"
        ),
        [("start_offset", 100, "the start offset 100 lies beyond the end offset 0")],
    ),
    "bytes of the start": (
        (
            "insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, partition_id)"
            " select 10, 10, 99, partition_id from tidemark.runs where start_offset = 0;"
            "delete from tidemark.runs where start_offset = 0;"
            "delete from tidemark.record_batch_events where id >> 16 = 1"
        ),
        [("byte_size", 10, "run [10, 20) ends at byte 200, but its events have 100 after 99")],
    ),
    "negative size": (
        (
            "insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, partition_id)"
            " select 100, 100, 1001, partition_id from tidemark.runs where start_offset = 0"
        ),
        [("byte_size", 100, "1001 bytes lie before the start offset 100, but 1000 before the end")],
    ),
    "missing object": (
        "delete from tidemark.objects where key in ('o2', 'o5')",
        [("object", 20, "a batch of the run at offset 20 refers to object 3, which does not exist (the first of 2)")],
    ),
    "placed twice": (
        (
            "insert into tidemark.runs (start_offset, end_offset, end_bytes, max_timestamp, first_tx, last_tx,"
            " partition_id, batches) select 100, 110, 1100, max_timestamp, first_tx, last_tx, partition_id, batches"
            " from tidemark.runs where start_offset = 90"
        ),
        [
            ("position", 100, "does not go on from the position"),
            ("batch_count", 90, "object 10 ('o9'), first in the run at offset 90, brought 1 batches here, there are 2"),
            ("object_count", 90, "brought 1 batches, 0 are deleted and 2 here"),
        ],
    ),
    "placed again as late": (
        (
            "insert into tidemark.runs (start_offset, end_offset, end_bytes, max_timestamp, first_tx, last_tx, seen_tx,"
            " seen_id, partition_id, batches) select 100, 110, 1100, r.max_timestamp, r.first_tx, r.last_tx, n.last_tx,"
            " 9223372036854775807, r.partition_id, r.batches from tidemark.runs r, tidemark.runs n"
            " where r.start_offset = 30 and n.start_offset = 90"
        ),
        [
            ("batch_count", 30, "object 4 ('o3'), first in the run at offset 30, brought 1 batches here, there are 2"),
            ("object_count", 30, "brought 1 batches, 0 are deleted and 2 here"),
        ],
    ),
    "another's events": (
        (
            "update tidemark.runs r set first_tx = o.first_tx, last_tx = o.last_tx from tidemark.runs o"
            " where r.start_offset = 30 and o.start_offset = 20"
        ),
        [
            ("position", 30, "run [30, 40) with events ("),
            ("batch_count", 20, "object 3 ('o2'), first in the run at offset 20, brought 1 batches here, there are 2"),
            ("object_count", 20, "brought 1 batches, 0 are deleted and 2 here"),
            ("unplaced", 40, "has 1 batches below the end of the run at offset 40, 0 are placed"),
        ],
    ),
    "late run that moves the position": (
        "update tidemark.runs set seen_tx = last_tx, seen_id = 5 << 16 where start_offset = 30",
        [("position", 30, "does not go on from the position (")],
    ),
    "deleted too often": (
        "insert into tidemark.deleted_batches select id, 1, 1 from tidemark.objects where key = 'o4'",
        [
            (
                "object_count",
                40,
                "object 5 ('o4'), first in the run at offset 40, brought 1 batches, 1 are deleted and 1 here",
            )
        ],
    ),
    "dead too early": (
        "insert into tidemark.dead_objects (object_id) select id from tidemark.objects where key = 'o4'",
        [("dead_object", 40, "object 5 ('o4'), first in the run at offset 40, is in dead_objects")],
    ),
    "cursor ahead": (
        "update tidemark.runs set last_tx = pg_current_xact_id()::text::bigint + 1000 where start_offset = 90",
        [
            ("cursor", 90, "of the cursor is not over in snapshot"),
            ("batches", 90, "run [90, 100) has 1 batches, and events 2"),
            ("records", 90, "has events with 20 records"),
            ("byte_size", 90, "ends at byte 1000, but its events have 200 after 900"),
        ],
    ),
    "in flight": (
        (
            "insert into tidemark.passes (tx, in_flight) values (9, '{5,3}');"
            "update tidemark.runs set pass_tx = 9 where start_offset = 90"
        ),
        [("in_flight", 90, "in_flight {5,3} of pass 9 is not ascending")],
    ),
    "waiting for what is placed": (
        (
            "update tidemark.runs r set late = array[o.first_tx] from tidemark.runs o"
            " where r.start_offset = 90 and o.start_offset = 30"
        ),
        [
            (
                "object_count",
                30,
                "object 4 ('o3'), first in the run at offset 30, brought 1 batches, 0 are deleted and 2 here",
            )
        ],
    ),
    "skipped": (
        (
            "update tidemark.runs r set last_tx = e.tx, skipped = array[e.tx]"
            " from tidemark.record_batch_events e where e.id >> 16 = 11 and r.start_offset = 90"
        ),
        [("unplaced", 90, "has 1 batches below the end of the run at offset 90, 0 are placed and none is pending")],
    ),
    "passed over between runs": (
        (
            "update tidemark.record_batch_events e set tx = r.last_tx + 1"
            " from tidemark.runs r where e.id >> 16 = 11 and r.start_offset = 30;"
            "update tidemark.record_batch_events set tx = tx + 2 where id >> 16 between 5 and 10;"
            "update tidemark.runs set first_tx = first_tx + 2, last_tx = last_tx + 2 where start_offset >= 40"
        ),
        [("unplaced", 40, "has 1 batches below the end of the run at offset 40, 0 are placed and none is pending")],
    ),
    "pending without object": (
        "delete from tidemark.objects where id = 11",
        [("object", None, "a pending event refers to object 11, which does not exist")],
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
    assert {v.invariant for v in audit(conn).violations} >= {v.invariant for v in violations}


def test_an_object_over_several_partitions_is_counted_over_all(conn: Conn) -> None:
    ids = make_topic(conn, "t", partitions=3)
    commit(conn, "o", [*ids, ids[0]])
    materialize(conn, ids[:2])
    assert found(conn) == []
    # Neither placed nor pending any more.
    conn.execute("delete from tidemark.record_batch_events where partition_id = %s", (ids[2],))
    violations = found(conn)
    assert {(v.invariant, v.partition_id, v.offset) for v in violations} == {("object_count", p, 0) for p in ids[:2]}
    assert all("brought 4 batches, 0 are deleted and 3 here" in v.detail for v in violations)
    # A stretch that does not hold all of them cannot tell.
    assert found(conn, batch_limit=1) == []


def test_an_end_offset_that_went_back_is_remembered(conn: Conn, partition: int) -> None:
    conn.execute("delete from tidemark.runs where start_offset = 90")
    (violation,) = audit(conn).violations
    assert (violation.invariant, violation.offset) == ("end_offset", 90)
    assert "went back: batches up to 100 were audited" in violation.detail


def test_a_run_that_grew_after_it_was_audited(conn: Conn, partition: int) -> None:
    conn.execute("update tidemark.runs set end_offset = 105 where start_offset = 90")
    (violation,) = audit(conn).violations
    assert (violation.invariant, violation.offset) == ("overlap", 90)
    assert violation.detail == "run [90, 105) ends beyond 100, where it was audited"
    # It is read again then.
    assert [(v.invariant, v.offset) for v in audit(conn).violations] == [("records", 90)]


def test_only_what_is_new_is_read(conn: Conn, partition: int) -> None:
    assert audit(conn).batches == 0
    commit(conn, "more", [partition, partition])
    materialize(conn, [partition])
    assert AuditResult(partitions=1, batches=2, violations=(), complete=True) == audit(conn)
    assert audit(conn, from_scratch=True).batches == 12


def test_a_gap_at_the_seam_of_two_audits(conn: Conn, partition: int) -> None:
    for key in ("more", "still more"):
        commit(conn, key, [partition])
        materialize(conn, [partition])
    conn.execute("delete from tidemark.runs where start_offset = 100")
    (gap,) = [v for v in audit(conn).violations if v.invariant == "gap"]
    assert (gap.offset, "after 100" in gap.detail) == (110, True)


@pytest.mark.parametrize("limit", [1, 3, 10, 11])
def test_damage_is_found_in_stretches_of_any_length(conn: Conn, partition: int, limit: int) -> None:
    conn.execute("delete from tidemark.runs where start_offset = 50")
    result = audit(conn, from_scratch=True, batch_limit=limit)
    assert (result.batches, result.complete) == (9, True)
    assert [(v.invariant, v.offset) for v in result.violations] == [("gap", 60), ("unplaced", 60)]
    assert [v.invariant for v in audit(conn, batch_limit=limit).violations] == ["gap", "unplaced"]


def test_late_transactions_cuts_and_retention(conn: Conn, connect: Connect) -> None:
    """Nothing is wrong at any step; and each lost piece of a late transaction is found, in stretches of any length."""
    (p,) = make_topic(conn, "t")
    late = [connect(autocommit=False) for _ in range(3)]
    for n, writer in enumerate(late):
        commit(writer, f"late{n}", [p] * 150)
        commit(conn, f"o{n}", [p] * 150)
    steps: Sequence[Callable[[], object]] = (
        lambda: materialize(conn, [p], events_per_partition=400),
        late[1].commit,
        lambda: materialize(conn, [p], strategy="window"),
        late[2].rollback,
        lambda: commit(conn, "more", [p] * 10),
        lambda: materialize(conn, [p]),
        late[0].commit,
        lambda: materialize(conn, [p], events_per_partition=70),
        lambda: materialize(conn, [p], events_per_partition=10),
        lambda: materialize(conn, [p]),
    )
    for step in steps:
        step()
        assert audit(conn).violations == ()
        assert [found(conn, batch_limit=limit) for limit in (1, 100, 1000)] == [[]] * 3
    rows = conn.execute("select start_offset, seen_tx is not null from tidemark.runs order by 1").fetchall()
    assert sum(is_late for _, is_late in rows) == 3 + 5
    conn.execute("create temp table whole as select * from tidemark.runs")
    for (start_offset, is_late), (_, is_next_late) in pairwise(rows[1:]):
        conn.execute("delete from tidemark.runs where start_offset = %s", (start_offset,))
        # A late run behind it says where the position is: only its start tells that something is missing.
        expected = {"gap"} if is_next_late and not is_late else {"gap", "unplaced"}
        assert {v.invariant for v in found(conn, batch_limit=100)} >= expected
        conn.execute("insert into tidemark.runs select * from whole where start_offset = %s", (start_offset,))
    assert found(conn) == []
    for limit in (50_000, 40_000, 30_000, 20_000, 1):
        set_retention(conn, "t", retention_ms=None, retention_bytes=limit)
        assert retain(conn).deleted > 0
        assert [found(conn, batch_limit=n) for n in (1, 100, 1000)] == [[]] * 3


def test_stopped_it_goes_round(conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP", 2)
    ids = make_topic(conn, "t", partitions=7)
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
    ids = [*make_topic(conn, "a", partitions=2), *make_topic(conn, "b", partitions=3)]
    commit(conn, "o", ids)
    materialize(conn, ids)
    conn.execute("update tidemark.runs set end_bytes = 1 where partition_id = any(%s)", (ids[:1],))
    assert AuditResult(partitions=3, batches=3, violations=(), complete=True) == audit(conn, topic="b")
    assert [v.partition_id for v in audit(conn, topic="a").violations] == [ids[0]]
    assert audit(conn).partitions == 5
    with pytest.raises(UnknownTopicError):
        audit(conn, topic="c")


def test_nothing_to_read_is_not_complete(conn: Conn) -> None:
    """Without topics, without records, and with records that have no offset yet; but so it is with nothing new."""
    nothing = AuditResult(partitions=0, batches=0, violations=(), complete=False)
    assert audit(conn) == nothing
    ids = make_topic(conn, "t", partitions=3)
    assert audit(conn, topic="t") == replace(nothing, partitions=3)
    commit(conn, "o", ids[:1])
    assert audit(conn) == replace(nothing, partitions=3)
    assert audit(conn, stop=lambda: True) == replace(nothing, partitions=3)
    materialize(conn, ids)
    for batches in (1, 0):
        assert AuditResult(partitions=3, batches=batches, violations=(), complete=True) == audit(conn)


def test_it_ends_with_enough_violations(conn: Conn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GROUP", 2)
    monkeypatch.setattr(module, "_VIOLATIONS", 3)
    make_topic(conn, "t", partitions=50)
    conn.execute(
        "insert into tidemark.log_starts (start_offset, deleted_to, start_bytes, partition_id) "
        "select 1, 1, 0, id from tidemark.topic_partitions"
    )
    result = audit(conn)
    assert (len(result.violations) < 8, result.complete) == (True, False)


def test_an_expired_batch_is_not_a_lost_one(conn: Conn) -> None:
    ids = make_topic(conn, "t", partitions=2)
    for n in range(5):
        commit(conn, f"o{n}", [*ids, ids[0]])
        materialize(conn, ids)
    set_retention(conn, "t", retention_ms=None, retention_bytes=250)
    assert retain(conn).deleted == 6 + 2
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
    """Commits, stragglers, rollbacks, materialization in small bites and retention, under audit all along."""
    ids = make_topic(conn, "t", partitions=4)
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
