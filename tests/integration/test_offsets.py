"""Offsets by time, as Kafka's ListOffsets, and fetches of many partitions, as Kafka's Fetch."""

import random
from itertools import pairwise
from typing import Any

import psycopg
import pytest

from config.errors import InvalidFetchError
from db.fetch import (
    EARLIEST,
    LATEST,
    MAX_TIMESTAMP,
    FetchedPartition,
    FetchRequest,
    fetch_batches,
    fetch_partitions,
    list_offsets,
)
from db.materialize import materialize
from db.retention import delete_records, retain
from tests.integration.conftest import commit, make_topic
from tests.support import Connect

Conn = psycopg.Connection[Any]


def log(conn: Conn, *times: int, name: str = "orders", each: int = 10_000) -> int:
    """A partition with batches of 10 records at these times, `each` of them in a pass."""
    (partition_id,) = make_topic(conn, name)
    for n, at in enumerate(times):
        commit(conn, f"{name}{n}", [partition_id], 10, timestamp=at)
    while materialize(conn, [partition_id], events_per_partition=each).events_processed:
        pass
    return partition_id


def at(conn: Conn, partition_id: int, time: int) -> tuple[int | None, int | None]:
    (found,) = list_offsets(conn, [partition_id], [time])
    assert found.error is None
    return found.log_offset, found.max_timestamp


# --- By time


def test_the_ends_of_a_log(conn: Conn) -> None:
    p = log(conn, 100, 300, 200)
    assert [at(conn, p, wanted) for wanted in (EARLIEST, LATEST, MAX_TIMESTAMP)] == [(0, None), (30, None), (10, 300)]
    empty = log(conn, name="empty")
    asked = (EARLIEST, LATEST, MAX_TIMESTAMP, 0)
    assert [at(conn, empty, wanted) for wanted in asked] == [(0, None), (0, None), (None, None), (None, None)]


@pytest.mark.parametrize("each", [1, 2, 64])
def test_the_first_batch_that_may_hold_a_time(conn: Conn, each: int) -> None:
    """Times need not rise; batches without one never match."""
    p = log(conn, 100, -1, 300, 200, 500, -1, 400, each=each)
    expected = {
        0: (0, 100),
        100: (0, 100),
        101: (20, 300),
        300: (20, 300),
        301: (40, 500),
        500: (40, 500),
        501: (None, None),
    }
    assert {time: at(conn, p, time) for time in expected} == expected


def test_a_log_without_times(conn: Conn) -> None:
    p = log(conn, -1, -1)
    assert at(conn, p, MAX_TIMESTAMP) == at(conn, p, 0) == (None, None)


def test_never_below_the_start(conn: Conn) -> None:
    p = log(conn, 100, 200, 300, 400, each=1)
    delete_records(conn, p, 15)
    assert (at(conn, p, 50), at(conn, p, 150), at(conn, p, EARLIEST)) == ((15, 200), (15, 200), (15, None))
    retain(conn)
    assert (at(conn, p, 50), at(conn, p, 250)) == ((15, 200), (20, 300))
    delete_records(conn, p, -1)
    retain(conn)
    assert at(conn, p, LATEST) == (40, None)
    assert at(conn, p, 50) == at(conn, p, MAX_TIMESTAMP) == (None, None)


def test_a_time_in_the_future_that_was_deleted(conn: Conn) -> None:
    """Of what follows it is known only that it may hold the time: never an offset that is too late."""
    p = log(conn, 100, 10**12, *range(200, 200 + 600), each=1)
    assert at(conn, p, 150) == (10, 10**12)
    delete_records(conn, p, 20)
    retain(conn)
    assert at(conn, p, 203) == (50, 203)
    # Further away than is looked for.
    assert at(conn, p, 700) == (20, 200)
    assert at(conn, p, 10**12 + 1) == (None, None)


def test_against_a_search_of_the_whole_log(conn: Conn) -> None:
    chance = random.Random(3)
    times = [chance.choice([-1, chance.randrange(1000)]) for _ in range(300)]
    p = log(conn, *times, each=7)
    for wanted in [0, 1, *(chance.randrange(1001) for _ in range(60)), 999, 1000]:
        expected = next(((10 * n, time) for n, time in enumerate(times) if time >= wanted), (None, None))
        assert at(conn, p, wanted) == expected


def test_errors_by_partition(conn: Conn) -> None:
    p = log(conn, 100)
    found = list_offsets(conn, [p, 99, p, -5], [0, 0, -4, LATEST])
    assert [(f.partition_id, f.error, f.log_offset) for f in found] == [
        (p, None, 0),
        (99, "unknown_partition", None),
        (p, "malformed", None),
        (-5, "unknown_partition", None),
    ]
    assert list_offsets(conn, [], []) == []


@pytest.mark.parametrize(("ids", "times"), [([1], []), ([1] * 10_001, [0] * 10_001), ([2**31], [0]), ([1], [2**63])])
def test_bad_requests(conn: Conn, ids: list[int], times: list[int]) -> None:
    with pytest.raises(InvalidFetchError):
        list_offsets(conn, ids, times)


def test_a_search_reads_little_of_a_long_log(conn: Conn) -> None:
    p = log(conn, *range(1000, 1600), each=1)

    def buffers(time: int) -> int:
        asked = "select * from tidemark.list_offsets(array[%s], array[%s])"
        explain = f"explain (analyze, buffers, format json, timing off) {asked}".encode()
        plans = conn.execute(explain, (p, time)).fetchall()
        plan = plans[0][0]
        return int(plan[0]["Plan"]["Shared Hit Blocks"]) + int(plan[0]["Plan"]["Shared Read Blocks"])

    for time in (0, 1000, 1300, 1599, 2000):
        buffers(time)
        assert buffers(time) < 200


# --- Many partitions


def ask(conn: Conn, *requests: FetchRequest, **limits: int) -> list[FetchedPartition]:
    return fetch_partitions(conn, requests, **limits)


def got(found: list[FetchedPartition]) -> list[list[int]]:
    return [[b.start_offset for b in p.batches] for p in found]


@pytest.fixture
def ids(conn: Conn) -> list[int]:
    """Three partitions with five batches of 10 bytes and 10 records each."""
    ids = make_topic(conn, partitions=3)
    for n in range(5):
        commit(conn, f"o{n}", ids, 10)
    materialize(conn, ids)
    return ids


def test_each_partition_answers_in_the_order_of_the_request(conn: Conn, ids: list[int]) -> None:
    found = ask(conn, FetchRequest(ids[2], 45), FetchRequest(ids[0], 20), FetchRequest(ids[1], 50))
    assert [(p.partition_id, p.error, p.start_offset, p.end_offset) for p in found] == [
        (ids[2], None, 0, 50),
        (ids[0], None, 0, 50),
        (ids[1], None, 0, 50),
    ]
    assert got(found) == [[40], [20, 30, 40], []]
    assert found[1].batches == fetch_batches(conn, ids[0], 20)


def test_budgets_in_the_order_of_the_request(conn: Conn, ids: list[int]) -> None:
    all_of_them = [FetchRequest(p, 0) for p in ids]
    assert got(ask(conn, *all_of_them, max_bytes=70)) == [[0, 10, 20, 30, 40], [0, 10], []]
    assert got(ask(conn, *all_of_them, max_batches=6)) == [[0, 10, 20, 30, 40], [0], []]
    assert got(ask(conn, *[FetchRequest(p, 0, max_bytes=25) for p in ids])) == [[0, 10]] * 3
    assert got(ask(conn, FetchRequest(ids[0], 50), *all_of_them, max_bytes=15)) == [[], [0], [], []]


def test_the_first_batch_comes_whatever_its_size(conn: Conn, ids: list[int]) -> None:
    """Of the request, not of each partition: a consumer must not be stuck, and need not get more than it asked for."""
    small = [FetchRequest(p, 0, max_bytes=1) for p in ids]
    assert got(ask(conn, *small)) == [[0], [], []]
    assert got(ask(conn, FetchRequest(ids[0], 50), *small[1:], max_bytes=1)) == [[], [0], []]


def test_an_error_by_partition(conn: Conn, ids: list[int]) -> None:
    delete_records(conn, ids[0], 15)
    requests = [FetchRequest(ids[0], 14), FetchRequest(99, 0), FetchRequest(ids[1], 51), FetchRequest(ids[1], -1)]
    found = ask(conn, *requests, FetchRequest(ids[2], 0, max_bytes=0), FetchRequest(ids[0], 15))
    assert [(p.error, p.start_offset, p.end_offset) for p in found] == [
        ("offset_out_of_range", 15, 50),
        ("unknown_partition", None, None),
        ("offset_out_of_range", 0, 50),
        ("malformed", 0, 50),
        ("malformed", 0, 50),
        (None, 15, 50),
    ]
    assert got(found) == [[], [], [], [], [], [10, 20, 30, 40]]


def test_one_partition_twice(conn: Conn, ids: list[int]) -> None:
    assert got(ask(conn, FetchRequest(ids[0], 0), FetchRequest(ids[0], 40))) == [[0, 10, 20, 30, 40], [40]]


@pytest.mark.parametrize(
    ("requests", "limits"),
    [
        ([FetchRequest(1, 0)] * 10_001, {}),
        ([FetchRequest(1, 0)] * 100_000, {}),
        ([FetchRequest(1, 0)], {"max_bytes": 0}),
        ([FetchRequest(1, 0)], {"max_batches": 0}),
        ([FetchRequest(2**31, 0)], {}),
        ([FetchRequest(1, 2**63)], {}),
    ],
)
def test_bad_fetches(conn: Conn, requests: list[FetchRequest], limits: dict[str, int]) -> None:
    with pytest.raises(InvalidFetchError):
        fetch_partitions(conn, requests, **limits)


def test_all_partitions_in_one_snapshot(conn: Conn, connect: Connect, ids: list[int]) -> None:
    """What a pass gives to several partitions is seen in all of them or in none, however many calls it takes."""
    placing = connect()
    for n in range(200):
        commit(placing, f"more{n}", ids, 10)
    for _ in range(200):
        materialize(placing, ids, events_per_partition=1)
        ends = [p.end_offset for p in ask(conn, *[FetchRequest(p, 0) for p in ids], max_batches=1)]
        assert len(set(ends)) == 1


def test_readers_go_on_while_records_are_deleted(conn: Conn, ids: list[int]) -> None:
    seen = []
    position = 0
    for cut in (5, 12, 33, 50):
        [found] = ask(conn, FetchRequest(ids[0], position), max_batches=1)
        if found.error == "offset_out_of_range":
            assert found.start_offset is not None
            position = found.start_offset
            continue
        seen += [b.start_offset for b in found.batches]
        position = found.batches[-1].start_offset + 10
        assert delete_records(conn, ids[0], cut) == cut
        retain(conn)
    assert all(a < b for a, b in pairwise(seen))
