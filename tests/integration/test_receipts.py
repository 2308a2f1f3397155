"""Offsets back: what became of commits, and waiting for it."""

import random
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any, get_args

import psycopg
import pytest

from config.settings import Strategy
from db.commit import Batch, commit_batches
from db.fetch import FetchRequest as Ask
from db.fetch import fetch_batches, wait_for_batches
from db.materialize import materialize
from db.receipts import Receipt, Waiting, receipts, wait
from db.retention import delete_records, retain
from db.topics import set_retention
from tasks.app import TidemarkApp
from tasks.drain import serve
from tasks.hints import Moves
from tests.integration.conftest import commit, make_topic
from tests.servers import RedisServer
from tests.support import Connect, frozen

Conn = psycopg.Connection[Any]


def offsets(conn: Conn, *object_ids: int) -> list[tuple[int, int | None]]:
    return [(r.batch, r.base_offset) for r in receipts(conn, object_ids)]


def test_offsets_in_the_order_of_the_request(conn: Conn) -> None:
    ids = make_topic(conn, partitions=2)
    a, b = commit(conn, "a", [ids[1], ids[0], ids[1]], 10), commit(conn, "b", [ids[0], ids[1]], 5)
    assert receipts(conn, [a])[0] == Receipt(
        object_id=a, batch=1, partition_id=ids[1], verdict="accepted", base_offset=None, is_pending=True
    )
    materialize(conn, ids[:1])
    assert offsets(conn, a, b) == [(1, None), (2, 0), (3, None), (1, 10), (2, None)]
    assert [r.is_pending for r in receipts(conn, [a])] == [True, False, True]
    materialize(conn, ids)
    assert offsets(conn, b, a, b) == [(1, 0), (2, 0), (3, 10), (1, 10), (2, 20)]
    assert receipts(conn, [a + 100]) == receipts(conn, []) == []


def test_what_was_not_accepted_has_no_offset_and_is_not_pending(conn: Conn) -> None:
    ids = make_topic(conn)
    one = Batch(partition_id=99, n_records=1, byte_offset=0, byte_length=1, max_timestamp=0)
    done = commit_batches(conn, "o", [one, replace(one, partition_id=ids[0])])
    found = receipts(conn, [done.object_id])
    assert [(r.verdict, r.is_pending) for r in found] == [("unknown_partition", False), ("accepted", True)]


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_every_batch_of_a_long_log(conn: Conn, connect: Connect, strategy: Strategy) -> None:
    """Runs that are cut, late transactions, objects of several batches: always what fetch says."""
    ids = make_topic(conn, partitions=3)
    late, chance = connect(), random.Random(7)
    late.autocommit = False
    objects: list[int] = []
    for n in range(150):
        places = chance.choices(ids, k=chance.choice([1, 2, 5, 90]))
        # What is open while others go on comes late.
        objects.append(commit(late if n % 7 == 3 else conn, f"o{n}", places, chance.randint(1, 9)))
        if n % 7 == 6:
            late.commit()
        if n % 5 == 0:
            some = chance.choice([1, 7, 64, 1000])
            materialize(conn, chance.sample(ids, 2), events_per_partition=some, strategy=strategy)
    late.commit()
    while materialize(conn, ids, strategy=strategy, events_per_partition=50).events_processed:
        pass
    keys = dict(conn.execute("select key, id from tidemark.objects").fetchall())
    told = {(r.object_id, r.partition_id, r.base_offset) for r in receipts(conn, objects)}
    read = {(keys[b.object_key], p, b.start_offset) for p in ids for b in fetch_batches(conn, p, 0, max_batches=10**6)}
    assert told == read
    row = conn.execute("select count(*) from tidemark.runs where seen_tx is not null").fetchone()
    assert row is not None
    assert row[0] >= 3


def test_what_retention_has_deleted(conn: Conn) -> None:
    ids = make_topic(conn, partitions=2)
    objects = [commit(conn, f"o{n}", ids, 10) for n in range(4)]
    for _ in objects:
        materialize(conn, ids, events_per_partition=1)
    delete_records(conn, ids[0], 30)
    retain(conn)
    found = receipts(conn, objects)
    assert {(r.base_offset, r.partition_id) for r in found if r.object_id == objects[0]} == {(None, None), (0, ids[1])}
    assert not any(r.is_pending for r in found)
    assert offsets(conn, objects[3]) == [(1, 30), (2, 30)]
    # The offsets of those that are left are found where others were deleted before them.
    set_retention(conn, "orders", retention_ms=None, retention_bytes=0)
    retain(conn)
    assert [r.base_offset for r in receipts(conn, objects)] == [None] * 8


def test_only_what_has_moved(conn: Conn) -> None:
    ids = make_topic(conn, partitions=3)
    done = [commit(conn, "a", ids), commit(conn, "b", ids)]
    materialize(conn, ids[:2])
    found = receipts(conn, done, ids[1:])
    assert [(r.object_id, r.batch, r.base_offset) for r in found] == [(done[0], 2, 0), (done[1], 2, 1)]


def test_costs_the_same_in_a_long_log(conn: Conn) -> None:
    """A receipt of the first commit and of the last one: a few descents, not a walk along the runs."""
    ids = make_topic(conn)
    objects = [commit(conn, f"o{n}", ids) for n in range(400)]
    while materialize(conn, ids, events_per_partition=1).events_processed:
        pass

    def buffers(object_id: int) -> int:
        explain = "explain (analyze, buffers, format json, timing off) select * from tidemark.receipts(array[%s])"
        (plan,), *_ = conn.execute(explain, (object_id,)).fetchall()
        return int(plan[0]["Plan"]["Shared Hit Blocks"]) + int(plan[0]["Plan"]["Shared Read Blocks"])

    for position in (0, 200, 399):
        buffers(objects[position])
        assert buffers(objects[position]) < 200


# --- Waiting


def test_waiting_without_news(conn: Conn, connect: Connect) -> None:
    ids = make_topic(conn)
    done = commit(conn, "a", ids)
    began = time.monotonic()
    assert [r.is_pending for r in wait(conn, [done], timeout=0.2)] == [True]
    assert time.monotonic() - began < 2
    other = connect()
    placing = threading.Timer(0.1, materialize, (other, ids))
    placing.start()
    assert [r.base_offset for r in wait(conn, [done], timeout=20, poll_seconds=0.05)] == [0]
    placing.join()


class Told:
    """News from a list: an entry for each wait."""

    def __init__(self, *news: Collection[int]) -> None:
        self.news: Iterator[Collection[int]] = iter(news)
        self.waits = 0

    def wait(self, seconds: float) -> Collection[int]:
        del seconds
        self.waits += 1
        return next(self.news, ())


def test_many_waiting_commits_are_asked_for_when_their_partitions_move(conn: Conn) -> None:
    ids = make_topic(conn, partitions=4)
    waiting = Waiting()
    objects = [commit(conn, f"o{n}", [ids[n % 4], ids[(n + 1) % 4]]) for n in range(8)]
    assert waiting.add(conn, objects) == []
    materialize(conn, ids[:2])
    answered = [(r.object_id, r.batch) for r in waiting.look(conn, [ids[0]])]
    assert sorted(answered) == sorted([(objects[n], 1) for n in (0, 4)] + [(objects[n], 2) for n in (3, 7)])
    assert waiting.look(conn, [ids[0], ids[3]]) == []
    # Without news it looks at all of them.
    assert len(waiting.look(conn)) == 4
    materialize(conn, ids)
    assert bool(waiting)
    assert len(waiting.look(conn, ids)) == 8
    assert not waiting


@pytest.fixture
def moves(app: TidemarkApp) -> Iterator[Moves]:
    with Moves(app) as listening:
        listening.wait(0.01)
        yield listening


def test_workers_tell_which_partitions_have_moved(conn: Conn, app: TidemarkApp, moves: Moves) -> None:
    ids = make_topic(conn, partitions=3)
    commit(conn, "a", ids[:2])
    for partition_id in ids:
        serve(app, [partition_id])
    told: set[int] = set()
    while news := moves.wait(0.3):
        told |= news
    assert told == set(ids[:2])


def test_a_receipt_comes_with_the_news(conn: Conn, app: TidemarkApp, moves: Moves) -> None:
    """Well before the poll, which would take a minute here."""
    ids = make_topic(conn)
    done = commit(conn, "a", ids)
    placing = threading.Timer(0.1, serve, (app, ids))
    placing.start()
    found = wait(conn, [done], timeout=20, poll_seconds=60, moves=moves)
    placing.join()
    assert [r.base_offset for r in found] == [0]


def test_a_redis_that_is_silent_costs_the_poll(
    conn: Conn, connect: Connect, moves: Moves, redis_server: RedisServer
) -> None:
    ids = make_topic(conn)
    done = commit(conn, "a", ids)
    with frozen(redis_server.pid):
        placing = threading.Timer(0.1, materialize, (connect(), ids))
        placing.start()
        found = wait(conn, [done], timeout=20, poll_seconds=0.2, moves=moves)
        placing.join()
    assert [r.base_offset for r in found] == [0]


def test_a_fetch_waits_for_enough_bytes(conn: Conn, app: TidemarkApp, moves: Moves) -> None:
    ids = make_topic(conn, partitions=2)
    asked = [Ask(ids[0], 0), Ask(ids[1], 0)]
    [empty, _] = wait_for_batches(conn, asked, max_wait=0.1, moves=moves)
    assert (empty.error, empty.start_offset, empty.end_offset, empty.batches) == (None, 0, 0, [])

    def produce() -> None:
        with psycopg.connect(app.database_url, autocommit=True) as producer:
            for n in range(3):
                commit(producer, f"o{n}", [ids[n % 2]], length=40)
                serve(app, [ids[n % 2]])

    producing = threading.Thread(target=produce)
    producing.start()
    found = wait_for_batches(conn, asked, max_wait=20, min_bytes=100, moves=moves, poll_seconds=60)
    producing.join()
    assert sum(b.byte_length for p in found for b in p.batches) == 120


def test_a_fetch_with_an_error_does_not_wait(conn: Conn) -> None:
    told = Told()
    [found] = wait_for_batches(conn, [Ask(99, 0)], max_wait=60, moves=told)
    assert (found.error, told.waits) == ("unknown_partition", 0)
