"""The read path: offsets to batches."""

import random
from collections.abc import Callable, Sequence
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
from tests.integration.conftest import make_topic
from tests.support import Connect

# Batches of the log the tests read: (records, bytes).
BATCHES = [(10, 100), (5, 200), (1, 0), (20, 300), (4, 400)]
STARTS = [0, 10, 15, 16, 36]
END = 40

Fetch = Callable[..., list[int]]


@pytest.fixture
def partition_id(conn: Connection[TupleRow]) -> int:
    """A log between two others, so that a scan which leaves it would show."""
    ids = make_topic(conn, partitions=3)
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
    with pytest.raises(OffsetOutOfRangeError, match=rf"^orders/1: offset {offset} .* 0 to {END}"):
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
    with pytest.raises(InvalidFetchError, match=r"^orders/1: fetch from 0 with at most"):
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


@pytest.mark.parametrize("deleted", [True, False])
def test_a_start_offset_inside_a_batch(deleted: bool, conn: Connection[TupleRow]) -> None:  # noqa: FBT001
    """As after deleting records up to an offset: the batch that spans it is there, and perhaps more before it."""
    ids = make_topic(conn, "short", partitions=1)
    commit_object(conn, "short", ids * 4, [5] * 4, range(4), [1] * 4, [0] * 4)
    while materialize(conn, ids, events_per_partition=2).events_processed:
        pass
    if deleted:
        conn.execute(
            "delete from tidemark.record_batch_events e using tidemark.runs r, tidemark.run_events(r) x "
            "where r.partition_id = %s and r.start_offset = 0 and e.partition_id = r.partition_id and e.id = x.id",
            ids,
        )
        conn.execute("delete from tidemark.runs where partition_id = %s and start_offset = 0", ids)
    columns = "partition_id, start_offset, deleted_to, start_bytes"
    conn.execute(f"insert into tidemark.log_starts ({columns}) values (%s, 12, 0, 2)", ids)
    assert [batch.start_offset for batch in fetch_batches(conn, ids[0], 12)] == [10, 15]
    assert [batch.start_offset for batch in fetch_batches(conn, ids[0], 15)] == [15]
    with pytest.raises(OffsetOutOfRangeError, match="12 to 20"):
        fetch_batches(conn, ids[0], 11)
    with pytest.raises(OffsetOutOfRangeError, match="12 to 20"):
        fetch_batches(conn, ids[0], 21)


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


def read_by(
    conn: Connection[Any], partition_id: int, offset: int, **limits: int
) -> tuple[list[FetchedBatch], int, int]:
    """What a fetch returns, and how many events and runs it reads for it."""
    counters = (
        "select relname, seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables "
        "where schemaname = 'tidemark'"
    )
    with conn.transaction():
        before = dict(conn.execute(counters).fetchall())
        fetched = fetch_batches(conn, partition_id, offset, **limits)
        after = dict(conn.execute(counters).fetchall())
    events, runs = (after.get(table, 0) - before.get(table, 0) for table in ("record_batch_events", "runs"))
    return fetched, events, runs


# Of the first run those before the offset; beyond the last batch what a loop fetches ahead.
BESIDE = 63 + 64


def commit(conn: Connection[Any], key: str, ids: Sequence[int], count: int) -> None:
    total = len(ids) * count
    lengths = [1 + n % 5 for n in range(total)]
    commit_object(conn, key, [*ids] * count, [1 + n % 3 for n in range(total)], range(total), lengths, range(total))


def deep(conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    commit(conn, "deep", ids, 3_000)
    materialize(conn, ids)


def thin(conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    for number in range(300):
        commit(conn, f"thin {number}", ids, 1)
        materialize(conn, ids)


def passed_over(conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    """Main runs with large transactions in the middle that are not theirs; of one the end is all that is placed."""
    late = [connect(autocommit=False) for _ in range(3)]
    for number, writer in enumerate(late):
        commit(conn, f"before {number}", ids, 20)
        commit(writer, f"late {number}", ids, 1_000)
    commit(conn, "after", ids, 20)
    materialize(conn, ids, events_per_partition=30)
    late[0].commit()
    materialize(conn, ids, events_per_partition=500)
    late[1].commit()
    materialize(conn, ids, events_per_partition=20_000)
    late[2].rollback()
    commit(conn, "last", ids, 20)
    materialize(conn, ids)


def thin_with_others_running(conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    """Each pass leaves out a transaction that becomes visible after it: large ones, and some of another partition."""
    late = connect(autocommit=False)
    for number in range(40):
        commit(late, f"late {number}", ids if number % 3 else ids[1:], 100)
        commit(conn, f"main {number}", ids, 2)
        materialize(conn, ids)
        late.commit()
    materialize(conn, ids)


@pytest.mark.parametrize("shape", [deep, thin, passed_over, thin_with_others_running])
def test_reads_little_beside_what_it_returns(
    shape: Callable[[Connection[Any], Connect, list[int]], None], conn: Connection[TupleRow], connect: Connect
) -> None:
    """Whatever the size of transactions, and wherever in them the offset lies."""
    ids = make_topic(conn, "shape", partitions=2)
    shape(conn, connect, ids)
    check(conn, ids[0], random.Random(1), turns=150)


def check(conn: Connection[Any], partition_id: int, chance: random.Random, turns: int) -> None:
    """At offsets of all kinds, under limits of all kinds: the batches that the view shows there, at a bounded cost."""
    log = [
        FetchedBatch(
            start_offset=row[0],
            n_records=row[1],
            object_key=row[2],
            byte_offset=row[3],
            byte_length=row[4],
            max_timestamp=row[5],
        )
        for row in conn.execute(
            "select start_offset, n_records, object_key, byte_offset, byte_length, max_timestamp_ms "
            "from tidemark.record_batches where partition_id = %s order by start_offset",
            (partition_id,),
        ).fetchall()
    ]
    end = log[-1].start_offset + log[-1].n_records
    for _ in range(turns):
        offset = chance.choice([0, chance.randrange(end), chance.randrange(end), end - 1])
        max_batches = chance.choice([1, 2, 20, 100, 5_000])
        max_bytes = chance.choice([1, 30, 300, 10**9])
        expected: list[FetchedBatch] = []
        for batch in log:
            if batch.start_offset + batch.n_records <= offset:
                continue
            if expected and sum(b.byte_length for b in expected) + batch.byte_length > max_bytes:
                break
            if len(expected) == max_batches:
                break
            expected.append(batch)
        fetched, events, runs = read_by(conn, partition_id, offset, max_bytes=max_bytes, max_batches=max_batches)
        assert fetched == expected
        assert len(fetched) <= events <= len(fetched) + BESIDE
        # Those of the batches, those that a loop fetches ahead, and the newest one and the one before the offset.
        assert runs <= len(fetched) + 64


@pytest.mark.parametrize("seed", range(6))
def test_random_logs(seed: int, conn: Connection[TupleRow], connect: Connect) -> None:
    chance = random.Random(seed)
    ids = make_topic(conn, "random", partitions=2)
    writers = [connect(autocommit=False) for _ in range(4)]
    for turn in range(120):
        number = chance.randrange(6)
        some = chance.choice([ids, ids, ids[:1], ids[1:]])
        match chance.randrange(4):
            case 0:
                materialize(conn, ids, events_per_partition=chance.choice([1, 5, 64, 100, 1000]))
            case 1:
                commit(conn, f"alone {turn}", some, chance.choice([1, 1, 2, 30, 100]))
            case 2 if number < len(writers):
                commit(writers[number], f"open {turn}", some, chance.choice([1, 3, 64, 200]))
            case 3 if number < len(writers):
                (writers[number].commit if chance.random() < 0.8 else writers[number].rollback)()
    while materialize(conn, ids).events_processed:
        pass
    check(conn, ids[0], chance, turns=60)
