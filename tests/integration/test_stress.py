"""Everybody at once for ten seconds: producers that commit out of order, materializers, a sweeper and readers.

Nothing here waits for anything else, so the interleavings are the scheduler's. What must hold is checked against what
the producers and readers wrote down (`tests.demo.check`).
"""

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from threading import Event
from typing import Any

import psycopg
import pytest
from psycopg import Connection, IsolationLevel
from psycopg.rows import TupleRow, class_row

from config.errors import CommitConflictError
from config.settings import STRATEGIES
from db.commit import Batch, columns, commit_object
from db.discover import sweep
from db.fetch import FetchedBatch, fetch_batches
from db.materialize import materialize
from db.topics import create_topic, partition_ids
from tests.demo.check import check
from tests.demo.evidence import collect
from tests.demo.ledger import Ledger, Outcome, Reading, Sighting, note
from tests.support import wait_until

SECONDS = 10.0
PARTITIONS = 4
PRODUCERS = 12
MATERIALIZERS = 3
READERS = 2


class Stress:
    """One method per kind of participant; each has a connection and a random generator of its own."""

    def __init__(self, url: str, ids: list[int]) -> None:
        self.url = url
        self.ids = ids
        self.ledger = Ledger()
        self.producing = Event()
        self.producing.set()
        self.running = Event()
        self.running.set()

    @contextmanager
    def connection(self) -> Iterator[Connection[TupleRow]]:
        with psycopg.connect(self.url, autocommit=True) as conn:
            yield conn

    def produce(self, number: int) -> None:
        chance = random.Random(number)
        with self.connection() as conn:
            turn = 0
            while self.producing.is_set():
                turn += 1
                self.transaction(conn, chance, f"{number}/{turn}")

    def transaction(self, conn: Connection[Any], chance: random.Random, name: str) -> None:
        objects = {
            f"{name}/{index}": [
                Batch(
                    partition_id=chance.choice(self.ids),
                    n_records=chance.randint(1, 9),
                    byte_offset=position * 100,
                    byte_length=chance.randint(1, 100),
                    max_timestamp=chance.randrange(10**12),
                )
                for position in range(chance.randint(1, 4))
            ]
            for index in range(chance.randint(1, 2))
        }
        roll_back = chance.random() < 0.1
        began = time.monotonic()
        attempts = []
        with conn.transaction(force_rollback=roll_back):
            if chance.random() < 0.5:
                # An id long before its events.
                conn.execute("select pg_current_xact_id()")
            for key, batches in objects.items():
                if chance.random() < 0.3:
                    time.sleep(chance.random() * 0.03)
                attempts.append((key, commit_object(conn, key, *columns(batches))))
            if chance.random() < 0.3:
                time.sleep(chance.random() * 0.03)
            if chance.random() < 0.01:
                time.sleep(1)
        outcome = Outcome.ROLLED_BACK if roll_back else Outcome.COMMITTED
        for key, object_id in attempts:
            note(self.ledger, key, objects[key], began, outcome, None if roll_back else object_id)
        if roll_back or chance.random() < 0.1:
            # A replay: after a rollback it is the first commit, otherwise it changes nothing.
            began = time.monotonic()
            with conn.transaction():
                attempts = [(key, commit_object(conn, key, *columns(batches))) for key, batches in objects.items()]
            for key, object_id in attempts:
                note(self.ledger, key, objects[key], began, Outcome.COMMITTED, object_id)
        if chance.random() < 0.05:
            key, batches = next(iter(objects.items()))
            wrong, began = [*batches, batches[0]], time.monotonic()
            with pytest.raises(CommitConflictError):
                commit_object(conn, key, *columns(wrong))
            note(self.ledger, key, wrong, began, Outcome.REFUSED)

    def materialize(self, number: int) -> None:
        chance = random.Random(1000 + number)
        with self.connection() as conn:
            while self.running.is_set():
                chosen = chance.sample(self.ids, chance.choice([1, 1, 2, PARTITIONS]))
                materialize(
                    conn,
                    chosen,
                    events_per_partition=chance.choice([1, 3, 50, 1000]),
                    strategy=chance.choice(STRATEGIES),
                    wait=chance.random() < 0.7,
                )

    def sweep(self, number: int) -> None:
        """Full rounds settle transactions and delete passes, while others make new ones."""
        with self.connection() as conn:
            while self.running.is_set():
                list(sweep(conn))
                time.sleep(0.02)

    def read(self, number: int) -> None:
        """Contiguity in each snapshot, and a sample of what was seen, for the comparison at the end."""
        chance = random.Random(3000 + number)
        with self.connection() as conn:
            conn.isolation_level = IsolationLevel.REPEATABLE_READ
            while self.running.is_set():
                partition_id = chance.choice(self.ids)
                began = time.monotonic()
                with conn.transaction():
                    head = conn.execute(
                        "select start_offset, end_offset from tidemark.named_partitions where partition_id = %s",
                        (partition_id,),
                    ).fetchone()
                    assert head
                    since = max(head[1] - 2_500, 0)
                    log = (
                        conn.cursor(row_factory=class_row(FetchedBatch))
                        .execute(
                            "select start_offset, n_records, object_key, byte_offset, byte_length, "
                            "max_timestamp_ms as max_timestamp from tidemark.record_batches where partition_id = %s "
                            "and run_end_offset > %s order by start_offset",
                            (partition_id, since),
                        )
                        .fetchall()
                    )
                    fetched = fetch_batches(conn, partition_id, since, max_batches=1_000)
                returned = time.monotonic()
                self.ledger.sightings.append(
                    Sighting(
                        partition_id=partition_id,
                        start_offset=head[0],
                        end_offset=head[1],
                        began=began,
                        returned=returned,
                        reader=number,
                    )
                )
                assert fetched == [b for b in log if b.start_offset + b.n_records > since][:1_000]
                assert log[-1:] == [] if head[1] == 0 else log[-1].start_offset + log[-1].n_records == head[1]
                for before, after in pairwise(log):
                    assert before.start_offset + before.n_records == after.start_offset, (before, after)
                self.ledger.readings.append(
                    Reading(
                        partition_id=partition_id,
                        from_offset=log[-20:][0].start_offset if log else since,
                        batches=tuple(log[-20:]),
                        began=began,
                        returned=returned,
                    )
                )

    def run(self, seconds: float) -> None:
        jobs: list[tuple[Callable[[int], None], int]] = [
            (self.produce, PRODUCERS),
            (self.materialize, MATERIALIZERS),
            (self.sweep, 1),
            (self.read, READERS),
        ]
        with ThreadPoolExecutor(sum(count for _, count in jobs)) as threads, self.connection() as conn:
            futures = [threads.submit(job, number) for job, count in jobs for number in range(count)]
            producers, others = futures[:PRODUCERS], futures[PRODUCERS:]
            end = time.monotonic() + seconds

            def over() -> bool:
                return time.monotonic() > end or any(future.done() for future in futures)

            def drained() -> bool:
                return not list(sweep(conn)) or any(future.done() for future in others)

            try:
                wait_until(over, timeout=seconds + 5, interval=0.1)
                self.producing.clear()
                for future in producers:
                    future.result(20)
                wait_until(drained, timeout=30)
            finally:
                self.producing.clear()
                self.running.clear()
            for future in others:
                future.result(20)


def test_stress(database_url: str, conn: Connection[TupleRow]) -> None:
    create_topic(conn, "orders", PARTITIONS)
    stress = Stress(database_url, partition_ids(conn, "orders"))
    stress.run(SECONDS)
    evidence = collect(conn, stress.ids, stress.ledger)
    findings = check(evidence)
    assert [finding.violation for finding in findings] == [None] * 8
    # Something was checked, and by each of the invariants.
    assert evidence.placed == len(evidence.origins) == len(stress.ledger.sent) > 2_000
    assert evidence.fetched > 500
    assert evidence.looks > 200
    assert len(evidence.attempts) > 1_000
    runs = conn.execute(
        "select count(*) filter (where seen_tx is not null), max(cardinality(skipped)) from tidemark.runs"
    ).fetchone()
    assert runs
    late, skipped = runs
    assert late > 100
    assert 0 < skipped <= PRODUCERS + MATERIALIZERS + 10
    print(f"stress: {[finding.counted for finding in findings]}, {late} late runs")  # noqa: T201 -- shown with -s
    # All is settled, so a last round leaves no pass behind.
    assert list(sweep(conn)) == []
    assert conn.execute("select count(*) from tidemark.passes").fetchone() == (0,)
