"""Topics: creating, growing and deleting them, and deleting records."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from uuid import UUID

import psycopg
import pytest

from config.errors import (
    InvalidTopicError,
    OffsetOutOfRangeError,
    TopicExistsError,
    UnknownPartitionError,
    UnknownTopicError,
)
from db.audit import audit
from db.commit import Batch, commit_batches, commit_object
from db.discover import find_committed, sweep
from db.fetch import fetch_batches
from db.materialize import materialize
from db.receipts import receipts
from db.retention import RetentionResult, delete_records, purge, retain
from db.status import describe_partitions, read_status
from db.topics import Topic, add_partitions, create_topic, delete_topic, list_topics, partition_ids, set_retention
from tasks.app import TidemarkApp
from tasks.drain import serve
from tests.integration.conftest import commit, make_topic
from tests.support import Connect

Conn = psycopg.Connection[Any]
ID = UUID("01234567-89ab-cdef-0123-456789abcdef")
# Of a partition, wherever it could have left something.
TABLES = ("topic_partitions", "record_batch_events", "runs", "log_starts", "producer_batches", "audit_progress")


def left(conn: Conn, ids: list[int]) -> dict[str, int]:
    """Rows of these partitions, by table."""
    found = {}
    for table in TABLES:
        column = "id" if table == "topic_partitions" else "partition_id"
        query = f"select count(*) from tidemark.{table} where {column} = any (%s)"
        row = conn.execute(query.encode(), (ids,)).fetchone()
        assert row is not None
        found[table] = row[0]
    return {table: rows for table, rows in found.items() if rows}


def purge_all(conn: Conn) -> RetentionResult:
    """As the task does, again and again."""
    done = RetentionResult()
    while conn.execute("select from tidemark.deleted_partitions where purged_at is null").rowcount:
        more = purge(conn)
        done = RetentionResult(
            deleted=done.deleted + more.deleted,
            log_bytes=done.log_bytes + more.log_bytes,
            objects_freed=done.objects_freed + more.objects_freed,
        )
    return done


# --- Creating


def test_a_topic_under_an_id_of_the_callers_with_limits(conn: Conn) -> None:
    assert create_topic(conn, "orders", 2, topic_id=ID, retention_ms=0, retention_bytes=5) == ID
    [topic] = list_topics(conn)
    assert (topic.id, topic.name, topic.partition_ids) == (ID, "orders", partition_ids(conn, "orders"))
    assert (topic.retention_ms, topic.retention_bytes) == (0, 5)
    with pytest.raises(TopicExistsError, match=f"a topic with the id {ID} exists already"):
        create_topic(conn, "payments", 1, topic_id=ID)


@pytest.mark.parametrize(("there", "new"), [("foo.bar", "foo_bar"), ("foo_bar", "foo.bar"), ("a.b_c", "a_b.c")])
def test_names_that_differ_in_dots_and_underscores_alone(conn: Conn, there: str, new: str) -> None:
    create_topic(conn, there, 1)
    with pytest.raises(InvalidTopicError, match=f"topic name '{new}' differs from '{there}' in . and _ alone"):
        create_topic(conn, new, 1)
    create_topic(conn, f"{new}x", 1)
    delete_topic(conn, there)
    create_topic(conn, new, 1)


@pytest.mark.parametrize("limits", [{"retention_ms": -1}, {"retention_bytes": -1}, {"retention_ms": 2**63}])
def test_limits_out_of_range(conn: Conn, limits: dict[str, int]) -> None:
    with pytest.raises(InvalidTopicError, match="out of range"):
        create_topic(conn, "orders", 1, **limits)  # type: ignore[arg-type]  # the id is no limit
    assert list_topics(conn) == []


def test_a_list_in_pages(conn: Conn) -> None:
    for name in ("b", "a", "d", "c"):
        create_topic(conn, name, 1)

    def names(found: list[Topic]) -> list[str]:
        return [topic.name for topic in found]

    assert names(list_topics(conn, limit=3)) == ["a", "b", "c"]
    assert names(list_topics(conn, after="c", limit=3)) == ["d"]
    assert list_topics(conn, limit=-1) == []
    [topic] = list_topics(conn, ["b", "missing"])
    assert list_topics(conn, ids=[topic.id, ID]) == [topic]
    assert list_topics(conn, []) == []


def test_zero_retention_deletes_all_that_has_its_offset(conn: Conn) -> None:
    ids = make_topic(conn)
    set_retention(conn, "orders", retention_ms=None, retention_bytes=0)
    commit(conn, "a", ids)
    materialize(conn, ids)
    commit(conn, "b", ids)
    assert retain(conn).deleted == 1
    set_retention(conn, "orders", retention_ms=0, retention_bytes=None)
    materialize(conn, ids)
    assert retain(conn).deleted == 1


# --- Growing


def test_more_partitions(conn: Conn) -> None:
    ids = make_topic(conn, partitions=2)
    grown = add_partitions(conn, "orders", 4)
    assert (grown[:2], len(grown), partition_ids(conn, "orders")) == (ids, 4, grown)
    commit(conn, "a", grown)
    assert materialize(conn, grown).events_processed == 4
    assert [p.partition for p in describe_partitions(conn, ["orders"])] == [0, 1, 2, 3]


@pytest.mark.parametrize("partitions", [-1, 0, 1, 2, 100_001])
def test_partitions_are_never_taken_away(conn: Conn, partitions: int) -> None:
    ids = make_topic(conn, partitions=2)
    with pytest.raises(InvalidTopicError):
        add_partitions(conn, "orders", partitions)
    assert partition_ids(conn, "orders") == ids


@pytest.mark.parametrize("change", [lambda c: add_partitions(c, "no", 3), lambda c: delete_topic(c, "no")])
def test_a_topic_that_is_not_there(conn: Conn, change: Any) -> None:
    with pytest.raises(UnknownTopicError, match="topic 'no' does not exist"):
        change(conn)


# --- Deleting


def test_a_deleted_topic_is_gone_at_once(conn: Conn) -> None:
    ids = make_topic(conn, partitions=2)
    commit(conn, "a", ids)
    materialize(conn, ids)
    commit(conn, "b", ids)
    topic_id = delete_topic(conn, "orders")
    assert list_topics(conn) == []
    with pytest.raises(UnknownPartitionError):
        fetch_batches(conn, ids[0], 0)
    with pytest.raises(UnknownPartitionError):
        commit(conn, "c", ids)
    assert read_status(conn).pending == []
    assert conn.execute("select from tidemark.record_batches").rowcount == 0
    # The name is free, and the new topic is another one.
    assert create_topic(conn, "orders", 1) != topic_id
    assert set(partition_ids(conn, "orders")).isdisjoint(ids)


def test_what_it_held_is_purged_in_bounded_passes(conn: Conn) -> None:
    ids = make_topic(conn, partitions=2)
    kept = make_topic(conn, "payments")
    for n in range(200):
        commit(conn, f"o{n}", ids)
    shared = commit(conn, "shared", ids + kept)
    sent = Batch(partition_id=ids[0], n_records=1, byte_offset=0, byte_length=1, max_timestamp=0)
    commit_batches(conn, "p", [sent, replace(sent, producer_id=1, producer_epoch=0, base_sequence=0)])
    materialize(conn, ids + kept)
    audit(conn)
    commit(conn, "pending", ids)
    delete_records(conn, ids[0], 10)
    delete_topic(conn, "orders")
    assert purge(conn, delete_batch=100, stop=lambda: True).deleted <= 200
    done = purge_all(conn)
    assert left(conn, ids) == {}
    assert done.deleted > 0
    dead = {row[0] for row in conn.execute("select object_id from tidemark.dead_objects").fetchall()}
    row = conn.execute("select count(*) from tidemark.objects").fetchone()
    assert row is not None
    # All but the one that still holds something else.
    assert (len(dead), shared in dead) == (row[0] - 1, False)
    assert (len(fetch_batches(conn, kept[0], 0)), audit(conn, from_scratch=True).violations) == (1, ())


def test_a_commit_that_was_under_way_is_purged_as_well(conn: Conn, connect: Connect) -> None:
    """It had looked the partition up before, and ends long after the first passes."""
    ids = make_topic(conn)
    for n in range(5):
        commit(conn, f"o{n}", ids)
    slow = connect()
    with slow.transaction():
        done = commit(slow, "slow", ids)
        delete_topic(conn, "orders")
        for _ in range(5):
            purge(conn)
        assert left(conn, ids) == {}
        assert conn.execute("select from tidemark.deleted_partitions where purged_at is null").rowcount == 1
    assert left(conn, ids) == {"record_batch_events": 1}
    # Who finds it for materializing meets no error.
    assert [p.partition_id for p in find_committed(conn).partitions if p.partition_id == ids[0]] == ids
    assert materialize(conn, ids, wait=False).events_processed == 0
    purge_all(conn)
    assert left(conn, ids) == {}
    assert [r.is_pending for r in receipts(conn, [done])] == [False]
    assert conn.execute("select from tidemark.dead_objects").rowcount == 6


def test_a_task_for_a_deleted_partition_serves_the_others(conn: Conn, app: TidemarkApp) -> None:
    gone = make_topic(conn, partitions=8)
    commit(conn, "a", gone)
    delete_topic(conn, "orders")
    ids = make_topic(conn, "payments", partitions=8)
    commit(conn, "b", ids)
    shard = next(p for p in ids if (p - gone[0]) % app.settings.shards == 0)
    done = serve(app, [gone[0], shard])
    assert (done["events_processed"], done["stuck_partitions"], done["busy_partitions"]) == (1, 0, 0)
    assert [p.partition_id for p in sweep(conn) if p.partition_id in gone] == []


def test_a_partition_that_never_was_is_an_error(conn: Conn) -> None:
    for wait in (True, False):
        with pytest.raises(UnknownPartitionError):
            materialize(conn, [12345], wait=wait)


def test_several_purge_together(conn: Conn, connect: Connect) -> None:
    ids = make_topic(conn, partitions=60)
    for n in range(30):
        commit(conn, f"o{n}", ids)
    delete_topic(conn, "orders")
    with ThreadPoolExecutor(3) as threads:
        deleted = sum(done.deleted for done in threads.map(purge_all, [connect() for _ in range(3)]))
    assert (deleted, left(conn, ids)) == (1800, {})
    assert conn.execute("select from tidemark.dead_objects").rowcount == 30


def test_partitions_that_wait_hold_up_no_others(conn: Conn, connect: Connect) -> None:
    """A transaction that stays open keeps each of them from being forgotten, and none from being emptied."""
    ids = make_topic(conn, partitions=5)
    commit(conn, "a", ids)
    with connect().transaction() as opened:
        opened.connection.execute("select pg_current_xact_id()")
        delete_topic(conn, "orders")
        # One partition in each transaction.
        assert purge(conn, delete_batch=64).deleted == 5
    purge_all(conn)
    assert left(conn, ids) == {}


def test_what_is_purged_is_forgotten_after_a_day(conn: Conn, connect: Connect) -> None:
    """Once more looked at: a commit in a transaction that old was not seen before."""
    ids = make_topic(conn)
    delete_topic(conn, "orders")
    purge_all(conn)
    conn.execute(
        "insert into tidemark.record_batch_events "
        "(tx, id, partition_id, n_records, byte_offset, byte_length, max_timestamp) values (1, 1, %s, 1, 0, 1, 0)",
        ids,
    )
    conn.execute("update tidemark.deleted_partitions set purged_at = purged_at - interval '1 day'")
    purge(conn)
    purge_all(conn)
    assert left(conn, ids) == {}
    conn.execute("update tidemark.deleted_partitions set purged_at = purged_at - interval '1 day'")
    purge(conn)
    assert conn.execute("select from tidemark.deleted_partitions").rowcount == 0


def test_deleting_waits_for_a_pass_and_the_pass_for_nothing(conn: Conn, connect: Connect) -> None:
    ids = make_topic(conn, partitions=50)
    for n in range(20):
        commit(conn, f"o{n}", ids)
    with ThreadPoolExecutor(2) as threads:
        passes = [threads.submit(materialize, connect(), ids, events_per_partition=2) for _ in range(1)]
        threads.submit(delete_topic, connect(), "orders").result(30)
        for done in passes:
            assert done.result(30).events_processed in {0, 100}
    purge_all(conn)
    assert left(conn, ids) == {}


# --- Records


@pytest.fixture
def p(conn: Conn) -> int:
    """A partition with ten batches of 10 records and 10 bytes, three in a run."""
    ids = make_topic(conn)
    for n in range(10):
        commit(conn, f"o{n}", ids, 10)
    while materialize(conn, ids, events_per_partition=3).events_processed:
        pass
    return ids[0]


def head(conn: Conn, partition_id: int) -> tuple[int, int, int]:
    row = conn.execute(
        "select start_offset, end_offset, byte_size::int from tidemark.named_partitions where partition_id = %s",
        (partition_id,),
    ).fetchone()
    assert row is not None
    return row[0], row[1], row[2]


def sound(conn: Conn) -> bool:
    return not audit(conn, from_scratch=True).violations


def test_records_are_deleted_up_to_an_offset(conn: Conn, p: int) -> None:
    """Inside of a batch, forward only and within the log."""
    assert delete_records(conn, p, 25) == 25
    assert head(conn, p) == (25, 100, 80)
    assert [b.start_offset for b in fetch_batches(conn, p, 25, max_batches=2)] == [20, 30]
    with pytest.raises(OffsetOutOfRangeError, match="offset 24 is out of range, the log holds 25 to 100"):
        fetch_batches(conn, p, 24)
    assert sound(conn)
    assert (delete_records(conn, p, 10), delete_records(conn, p, 25)) == (25, 25)
    # No limit of the topic's is needed for what lies before the start to go.
    assert retain(conn).deleted == 0
    assert delete_records(conn, p, 45) == 45
    assert (retain(conn).deleted, head(conn, p), sound(conn)) == (3, (45, 100, 60), True)
    assert delete_records(conn, p, 60) == 60
    assert (retain(conn).deleted, head(conn, p), sound(conn)) == (3, (60, 100, 40), True)
    assert delete_records(conn, p, 10**9) == 100
    assert (retain(conn).deleted, head(conn, p), sound(conn)) == (4, (100, 100, 0), True)
    commit_object(conn, "more", [p], [5], [0], [7], [0])
    materialize(conn, [p])
    assert ([b.start_offset for b in fetch_batches(conn, p, 100)], sound(conn)) == ([100], True)
    assert delete_records(conn, p, -1) == 105
    assert (retain(conn).deleted, head(conn, p), sound(conn)) == (1, (105, 105, 0), True)


def test_retention_never_moves_the_start_back(conn: Conn, p: int) -> None:
    delete_records(conn, p, 65)
    set_retention(conn, "orders", retention_ms=None, retention_bytes=20)
    retain(conn)
    start, _, size = head(conn, p)
    assert (start >= 65, size >= 20, sound(conn)) == (True, True, True)
    delete_records(conn, p, 95)
    retain(conn)
    assert (head(conn, p)[0], sound(conn)) == (95, True)


def test_what_is_deleted_is_not_shown_in_the_view(conn: Conn, p: int) -> None:
    delete_records(conn, p, 25)
    rows = conn.execute("select start_offset from tidemark.record_batches order by 1").fetchall()
    assert [row[0] for row in rows] == [*range(20, 100, 10)]


def test_bad_offsets(conn: Conn, p: int) -> None:
    with pytest.raises(OffsetOutOfRangeError, match="no records lie before offset -2"):
        delete_records(conn, p, -2)
    for unknown in (0, 999, 2**31):
        with pytest.raises(UnknownPartitionError):
            delete_records(conn, unknown, 5)
    with conn.transaction():
        conn.execute("set transaction isolation level repeatable read")
        with pytest.raises(psycopg.Error, match="has to see what is there after its wait"):
            delete_records(conn, p, 5)
    assert head(conn, p)[0] == 0


def test_deleting_records_beside_passes_and_retention(conn: Conn, connect: Connect) -> None:
    ids = make_topic(conn, partitions=4)
    for n in range(40):
        commit(conn, f"o{n}", ids, 10)

    def materializing() -> None:
        mine = connect()
        while materialize(mine, ids, events_per_partition=3).events_processed:
            pass

    def deleting() -> None:
        mine = connect()
        for offset in range(0, 400, 7):
            for partition_id in ids:
                assert delete_records(mine, partition_id, offset) <= 400

    def retaining() -> None:
        mine = connect()
        for _ in range(40):
            retain(mine)

    with ThreadPoolExecutor(3) as threads:
        for done in [threads.submit(work) for work in (materializing, deleting, retaining)]:
            done.result(60)
    retain(conn)
    assert sound(conn)
    starts, ends, _ = zip(*(head(conn, partition_id) for partition_id in ids), strict=True)
    assert (min(starts) > 0, ends) == (True, (400,) * 4)
