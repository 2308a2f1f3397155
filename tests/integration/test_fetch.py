"""The read path: offsets to batches."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.errors import InvalidFetchError, OffsetOutOfRangeError, UnknownPartitionError
from db.commit import commit_object
from db.fetch import FetchedBatch, fetch_batches
from db.materialize import materialize
from db.topics import create_topic, partition_ids
from tests.support import Connect

# Batches of the log the tests read: (records, bytes).
BATCHES = [(10, 100), (5, 200), (1, 0), (20, 300), (4, 400)]
STARTS = [0, 10, 15, 16, 36]
END = 40

Fetch = Callable[..., list[int]]


@pytest.fixture
def partition_id(conn: Connection[TupleRow]) -> int:
    """A log between two others, so that a scan which leaves it would show."""
    create_topic(conn, "orders", 3)
    ids = partition_ids(conn, "orders")
    count = len(BATCHES)
    records, lengths = zip(*BATCHES, strict=True)
    for number, i in enumerate(ids):
        commit_object(conn, f"object {number}", [i] * count, records, range(count), lengths, range(count))
    materialize(conn, ids)
    return ids[1]


def starts(
    conn: Connection[Any], partition_id: int, offset: int, max_bytes: int = 10**9, max_batches: int = 1000
) -> list[int]:
    """The start offsets fetched, after checking that all three ways in agree."""
    fetched = fetch_batches(conn, partition_id, offset, max_bytes=max_bytes, max_batches=max_batches)
    for batch in fetched:
        position = STARTS.index(batch.start_offset)
        assert batch == FetchedBatch(
            start_offset=STARTS[position],
            n_records=BATCHES[position][0],
            object_key="object 1",
            byte_offset=position,
            byte_length=BATCHES[position][1],
            max_timestamp=position,
        )
    by_id = conn.execute(
        "select start_offset from tidemark.fetch_batches(%s::int, %s::bigint, %s::bigint, %s::int)",
        (partition_id, offset, max_bytes, max_batches),
    ).fetchall()
    by_name = conn.execute(
        "select start_offset from tidemark.fetch_batches('orders', 1, %s::bigint, %s::bigint, %s::int)",
        (offset, max_bytes, max_batches),
    ).fetchall()
    assert by_id == by_name == [(batch.start_offset,) for batch in fetched]
    return [batch.start_offset for batch in fetched]


@pytest.mark.parametrize(
    ("offset", "first"), [(0, 0), (9, 0), (10, 1), (14, 1), (15, 2), (16, 3), (17, 3), (35, 3), (36, 4), (39, 4)]
)
def test_the_first_batch_contains_the_offset(
    offset: int, first: int, conn: Connection[TupleRow], partition_id: int
) -> None:
    assert starts(conn, partition_id, offset) == STARTS[first:]


def test_nothing_at_the_end(conn: Connection[TupleRow], partition_id: int) -> None:
    assert starts(conn, partition_id, END) == []


def test_nothing_in_an_empty_partition(conn: Connection[TupleRow]) -> None:
    create_topic(conn, "empty", 1)
    assert fetch_batches(conn, partition_ids(conn, "empty")[0], 0) == []


@pytest.mark.parametrize("offset", [-1, END + 1, 2**63 - 1, -(2**63)])
def test_out_of_range(offset: int, conn: Connection[TupleRow], partition_id: int) -> None:
    with pytest.raises(OffsetOutOfRangeError, match=rf"offset {offset} .* 0 to {END}"):
        fetch_batches(conn, partition_id, offset)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 2**31 - 1])
def test_limit_on_batches(count: int, conn: Connection[TupleRow], partition_id: int) -> None:
    assert starts(conn, partition_id, 0, max_batches=count) == STARTS[:count]


@pytest.mark.parametrize(
    ("offset", "max_bytes", "count"),
    [
        (0, 1, 1),
        (0, 99, 1),
        (0, 100, 1),
        (0, 299, 1),
        (0, 300, 2),
        (0, 301, 3),
        (0, 599, 3),
        (0, 600, 4),
        (0, 1000, 5),
        (5, 1, 1),
        (36, 1, 1),
        (20, 650, 1),
        (0, 2**63 - 1, 5),
    ],
)
def test_limit_on_bytes(offset: int, max_bytes: int, count: int, conn: Connection[TupleRow], partition_id: int) -> None:
    """Never more than fit, but always one. (At exactly 300 bytes the empty third batch may come or not.)"""
    fetched = starts(conn, partition_id, offset, max_bytes)
    assert len(fetched) == count
    assert sum(BATCHES[STARTS.index(start)][1] for start in fetched[1:]) < max_bytes


@pytest.mark.parametrize(
    "limits",
    [
        {"max_bytes": 0},
        {"max_bytes": -1},
        {"max_batches": 0},
        {"max_batches": -5},
        {"max_bytes": None},
        {"max_batches": None},
    ],
)
def test_limits_below_one(limits: dict[str, Any], conn: Connection[TupleRow], partition_id: int) -> None:
    with pytest.raises(InvalidFetchError):
        fetch_batches(conn, partition_id, 0, **limits)


@pytest.mark.parametrize("unknown", [0, -1, 10_000, None, 2**31])
def test_unknown_partition(unknown: int, conn: Connection[TupleRow]) -> None:
    with pytest.raises(UnknownPartitionError):
        fetch_batches(conn, unknown, 0)


@pytest.mark.parametrize(
    ("topic", "partition", "code"),
    [
        ("gone", 0, "TM004"),
        (None, 0, "TM004"),
        ("orders", 3, "TM003"),
        ("orders", -1, "TM003"),
        ("orders", None, "TM003"),
    ],
)
def test_unknown_names(
    topic: str | None, partition: int | None, code: str, conn: Connection[TupleRow], partition_id: int
) -> None:
    with pytest.raises(psycopg.Error) as caught:
        conn.execute("select * from tidemark.fetch_batches(%s::text, %s::int, 0, 1, 1)", (topic, partition))
    assert caught.value.sqlstate == code


def test_a_start_offset_inside_a_batch(conn: Connection[TupleRow], partition_id: int) -> None:
    """As after deleting records up to an offset: the batch that spans it is still there."""
    conn.execute("delete from tidemark.record_batches where partition_id = %s and start_offset < 10", (partition_id,))
    conn.execute("update tidemark.topic_partitions set start_offset = 12 where id = %s", (partition_id,))
    assert starts(conn, partition_id, 12) == STARTS[1:]
    with pytest.raises(OffsetOutOfRangeError, match="12 to 40"):
        fetch_batches(conn, partition_id, 11)


def test_one_snapshot(connect: Connect, conn: Connection[TupleRow], partition_id: int) -> None:
    """A reader in a transaction sees the log it began with."""
    reader = connect()
    reader.execute("begin isolation level repeatable read")
    assert fetch_batches(reader, partition_id, END) == []
    commit_object(conn, "more", [partition_id], [1], [0], [1], [0])
    materialize(conn, [partition_id])
    assert fetch_batches(reader, partition_id, END) == []
    with pytest.raises(OffsetOutOfRangeError):
        fetch_batches(reader, partition_id, END + 1)
    reader.rollback()
    assert [batch.start_offset for batch in fetch_batches(reader, partition_id, END)] == [END]


def test_reading_a_log_to_its_end(conn: Connection[TupleRow], partition_id: int) -> None:
    offset, seen = 0, []
    while batches := fetch_batches(conn, partition_id, offset, max_bytes=1):
        seen += [batch.start_offset for batch in batches]
        offset = batches[-1].start_offset + batches[-1].n_records
    assert (seen, offset) == (STARTS, END)
