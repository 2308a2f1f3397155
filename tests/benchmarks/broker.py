"""What a broker waits for: `python -m tests.benchmarks.broker [--quick]`.

Commits of idempotent producers beside the same commits without, in turns, by size; then from the commit to the receipt
beside from the commit to the offset, which is when the pass that gave it has committed, with so many objects in flight.
One pass after the other over all partitions, as workers do under load; what is left out is Celery.
"""

import argparse
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from time import monotonic, perf_counter
from typing import Any

import psycopg
from redis import Redis
from rich.console import Console
from rich.table import Table

from db.commit import Batch, commit_batches
from db.materialize import materialize
from db.producers import init_producer
from db.receipts import Receipt, Waiting
from db.topics import create_topic, partition_ids
from tasks.hints import Moves, publish_moves
from tests.benchmarks.server import running_server
from tests.servers import RedisServer
from tests.support_commands import app_for

Conn = psycopg.Connection[Any]

_PARTITIONS, _PRODUCERS, _RECORDS = 1_000, 50, 10
_SIZES = (1, 10, 100, 1_000)
_FLIGHTS = (100, 5_000)
# Of an object in flight.
_BATCHES = 4
_POLL = 0.1


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the commits")
    scale = 0.1 if parser.parse_args(arguments).quick else 1.0
    console = Console(width=80)
    with running_server() as url, psycopg.connect(url, autocommit=True) as conn:
        create_topic(conn, "orders", _PARTITIONS)
        console.print(commits(conn, scale))
        with tempfile.TemporaryDirectory() as directory, RedisServer(Path(directory)).start() as redis:
            console.print(latencies(url, redis.url, scale))
    return 0


# --- Commits


def commits(conn: Conn, scale: float) -> Table:
    """Milliseconds of a commit, the median, and how fast an idempotent one is beside one without producers."""
    ids, chance = partition_ids(conn, "orders"), random.Random(1)
    producers = [init_producer(conn).producer_id for _ in range(_PRODUCERS)]
    due: dict[tuple[int, int], int] = {}

    def object_of(size: int) -> Iterator[Batch]:
        for n, partition_id in enumerate(chance.sample(ids, size)):
            producer = chance.choice(producers)
            sequence = due.get((partition_id, producer), 0)
            due[partition_id, producer] = sequence + _RECORDS
            place = Batch(
                partition_id=partition_id, n_records=_RECORDS, byte_offset=100 * n, byte_length=100, max_timestamp=n
            )
            yield replace(place, producer_id=producer, producer_epoch=0, base_sequence=sequence)

    def took(batches: list[Batch]) -> float:
        began = perf_counter()
        done = commit_batches(conn, f"{monotonic()}/{chance.random()}", batches)
        seconds = perf_counter() - began
        if set(done.verdicts) != {"accepted"}:
            raise AssertionError(done)
        return seconds * 1e3

    table = Table("Batches", "Without ms", "Idempotent ms", "Speed of idempotent", title="Commits")
    for size in _SIZES:
        plain, idempotent = [], []
        for _ in range(max(10, round((400 if size < 1_000 else 80) * scale))):
            batches = list(object_of(size))
            bare = [replace(b, producer_id=None, producer_epoch=None, base_sequence=None) for b in batches]
            plain.append(took(bare))
            idempotent.append(took(batches))
        ratio = statistics.median(a / b for a, b in zip(plain, idempotent, strict=True))
        medians = (f"{statistics.median(times):.2f}" for times in (plain, idempotent))
        table.add_row(str(size), *medians, f"{ratio:.2f}")
    materialize(conn, ids, events_per_partition=10**6)
    return table


# --- Receipts


@dataclass(slots=True)
class Flight:
    """When objects were committed, got their last offset, and had their last receipt, by id."""

    committed: dict[int, float] = field(default_factory=dict)
    placed: dict[int, float] = field(default_factory=dict)
    answered: dict[int, float] = field(default_factory=dict)
    _heard: Counter[int] = field(default_factory=Counter)

    def hear(self, receipts: Sequence[Receipt]) -> None:
        at = perf_counter()
        for receipt in receipts:
            self._heard[receipt.object_id] += 1
            if self._heard[receipt.object_id] == _BATCHES:
                self.answered[receipt.object_id] = at


def latencies(url: str, redis_url: str, scale: float) -> Table:
    """Milliseconds from commit to offset and from commit to receipt, and the ratio of the medians."""
    names = ("In flight", "Offset p50", "p99", "Receipt p50", "p99", "p50 / p50")
    table = Table(*names, title="Commit to offset and to receipt, ms")
    for in_flight in _FLIGHTS:
        flight = fly(url, redis_url, in_flight, round(20 * in_flight * scale) if in_flight < 1_000 else in_flight)
        # What came between two looks of the pass has its offset with its receipt at the latest.
        flight.placed = {i: min(at, flight.placed.get(i, at)) for i, at in flight.answered.items()}
        offset, receipt = (
            [1e3 * (times[i] - at) for i, at in flight.committed.items() if i in times]
            for times in (flight.placed, flight.answered)
        )
        cells = [f"{f(times):.1f}" for times in (offset, receipt) for f in (statistics.median, _p99)]
        ratio = statistics.median(receipt) / statistics.median(offset)
        table.add_row(f"{in_flight:,}", *cells, f"{ratio:.2f}")
    return table


def _p99(times: Sequence[float]) -> float:
    return statistics.quantiles(times, n=100)[-1]


def fly(url: str, redis_url: str, in_flight: int, total: int) -> Flight:
    """Commit `total` objects, no more of them without a receipt than `in_flight`: one thread commits, one places, and
    this one waits for the receipts.
    """
    flight, over = Flight(), Event()
    to_place: dict[int, list[int]] = {}
    to_hear: SimpleQueue[int] = SimpleQueue()

    def commit() -> None:
        chance = random.Random(2)
        place = Batch(partition_id=0, n_records=1, byte_offset=0, byte_length=1, max_timestamp=0)
        with psycopg.connect(url, autocommit=True) as mine:
            ids = partition_ids(mine, "orders")
            while len(flight.committed) < total and not over.is_set():
                if len(flight.committed) - len(flight.answered) >= in_flight:
                    over.wait(0.001)
                    continue
                chosen = chance.sample(ids, _BATCHES)
                batches = [replace(place, partition_id=partition_id) for partition_id in chosen]
                object_id = commit_batches(mine, f"{monotonic()}/{chance.random()}", batches).object_id
                flight.committed[object_id], to_place[object_id] = perf_counter(), chosen
                to_hear.put(object_id)

    def place() -> None:
        left: dict[int, set[int]] = {}
        with psycopg.connect(url, autocommit=True) as mine, Redis.from_url(redis_url) as redis:
            ids = partition_ids(mine, "orders")
            while not over.is_set():
                # What was committed before the pass gets its offsets in it.
                while to_place:
                    object_id, partitions = to_place.popitem()
                    left[object_id] = set(partitions)
                done = materialize(mine, ids)
                at = perf_counter()
                moved = {m.partition_id for m in done.moved}
                if moved:
                    publish_moves(redis, sorted(moved))
                left = {object_id: waits - moved for object_id, waits in left.items()}
                flight.placed |= {object_id: at for object_id, waits in left.items() if not waits}
                left = {object_id: waits for object_id, waits in left.items() if waits}

    with (
        psycopg.connect(url, autocommit=True) as conn,
        app_for(database_url=url, broker_url=redis_url) as app,
        Moves(app) as moves,
        ThreadPoolExecutor(2) as threads,
    ):
        moves.wait(0.01)
        working = [threads.submit(work) for work in (commit, place)]
        waiting = Waiting()
        try:
            while len(flight.answered) < total and not working[1].done():
                news = moves.wait(_POLL)
                flight.hear(waiting.add(conn, [to_hear.get() for _ in range(to_hear.qsize())]))
                flight.hear(waiting.look(conn, news))
        finally:
            over.set()
        for done in working:
            done.result()
    return flight


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
