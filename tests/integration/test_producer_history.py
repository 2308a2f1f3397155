"""Idempotent producers through brokers that time out, lose connections and are fenced: each sequence once, in order."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count, pairwise
from threading import Event
from typing import Any

import psycopg
import pytest

from db.audit import audit
from db.commit import Batch, Committed, commit_batches
from db.fetch import fetch_batches
from db.materialize import materialize
from db.producers import init_producer
from db.receipts import receipts
from tests.integration.conftest import make_topic

Conn = psycopg.Connection[Any]

_PRODUCERS, _PARTITIONS, _BATCHES = 3, 2, 120
# Longer than a commit takes by far; a client that waits no longer sends it again while it is under way.
_PATIENCE = 0.004


@dataclass
class Brokers:
    """Two of them, each with some connections; any may be lost at any moment."""

    url: str
    keys: Iterator[int] = field(default_factory=count)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(12))

    def send(self, batch: Batch) -> Future[Committed]:
        """Commit under a key of its own, as a broker does that knows nothing of other attempts."""
        return self.threads.submit(self._commit, f"o{next(self.keys)}", batch)

    def _commit(self, key: str, batch: Batch) -> Committed:
        with psycopg.connect(self.url, autocommit=True, application_name="broker") as conn:
            return commit_batches(conn, key, [batch])


@dataclass
class Producer:
    """Sends until each batch is answered; now and then a new one goes on in its place, under the next epoch."""

    brokers: Brokers
    partition_ids: list[int]
    url: str
    chance: random.Random
    # What was answered, by partition, epoch and sequence: the object that said so.
    answered: dict[tuple[int, int, int], int] = field(default_factory=dict)
    late: list[Future[Committed]] = field(default_factory=list)
    producer_id: int = 0

    def run(self) -> None:
        with psycopg.connect(self.url, autocommit=True, application_name="client") as conn:
            self.producer_id = init_producer(conn).producer_id
            epoch, due = 0, dict.fromkeys(self.partition_ids, 0)
            for _ in range(_BATCHES):
                partition_id, records = self.chance.choice(self.partition_ids), self.chance.randint(1, 3)
                if self.chance.random() < 0.05:
                    # The one before still has a batch under way: it must not come behind one of the new epoch.
                    self.late.append(self.brokers.send(self._batch(partition_id, epoch, due[partition_id], records)))
                    epoch, due = init_producer(conn, self.producer_id).producer_epoch, dict.fromkeys(due, 0)
                self._deliver(self._batch(partition_id, epoch, due[partition_id], records))
                due[partition_id] += records

    def _batch(self, partition_id: int, epoch: int, sequence: int, records: int) -> Batch:
        # The time says which batch it is.
        return Batch(
            partition_id=partition_id,
            n_records=records,
            byte_offset=0,
            byte_length=1,
            max_timestamp=(self.producer_id * 1_000 + epoch) * 100_000 + sequence,
            producer_id=self.producer_id,
            producer_epoch=epoch,
            base_sequence=sequence,
        )

    def _deliver(self, batch: Batch) -> None:
        attempts: list[Future[Committed]] = []
        while True:
            attempts.append(self.brokers.send(batch))
            until = time.monotonic() + (_PATIENCE if self.chance.random() < 0.3 else 30)
            while time.monotonic() < until and not attempts[-1].done():
                time.sleep(0.0005)
            for attempt in attempts:
                # A connection that was lost says nothing about the commit.
                if attempt.done() and attempt.exception() is None:
                    done = attempt.result()
                    assert done.verdicts[0] in {"accepted", "duplicate"}, (done, batch)
                    key = batch.partition_id, batch.producer_epoch or 0, batch.base_sequence or 0
                    self.answered[key] = done.object_id
                    # What is still under way ends as a duplicate, or is too old by then.
                    self.late += attempts
                    return


def chaos(url: str, over: Event, chance: random.Random) -> int:
    """End brokers' sessions in the middle of their commits; returns how many."""
    ended = 0
    with psycopg.connect(url, autocommit=True) as conn:
        while not over.wait(chance.random() * 0.02):
            ended += conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'broker' "
                "and state <> 'idle' and datname = current_database() limit 1"
            ).rowcount
    return ended


def placing(url: str, over: Event, partition_ids: list[int], chance: random.Random) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        while not over.wait(0.005):
            materialize(conn, partition_ids, events_per_partition=chance.choice([1, 3, 100]))


def whole_log(conn: Conn, partition_id: int) -> list[tuple[int, int, int, int, int]]:
    """Offset, producer, epoch, sequence and records of each batch, in the order of the offsets."""
    found = []
    for batch in fetch_batches(conn, partition_id, 0, max_batches=10**6):
        rest, sequence = divmod(batch.max_timestamp, 100_000)
        found.append((batch.start_offset, *divmod(rest, 1_000), sequence, batch.n_records))
    return found


@pytest.mark.parametrize("seed", [0])
def test_every_sequence_once_and_in_order(conn: Conn, database_url: str, seed: int) -> None:
    chance, over, brokers = random.Random(seed), Event(), Brokers(database_url)
    ids = make_topic(conn, partitions=_PARTITIONS)
    producers = [Producer(brokers, ids, database_url, random.Random(chance.random())) for _ in range(_PRODUCERS)]
    with ThreadPoolExecutor(_PRODUCERS + 2) as threads:
        disturbing = threads.submit(chaos, database_url, over, random.Random(chance.random()))
        others: Callable[..., Any] = placing
        placed = threads.submit(others, database_url, over, ids, random.Random(chance.random()))
        try:
            for done in [threads.submit(producer.run) for producer in producers]:
                done.result(120)
        finally:
            over.set()
    assert disturbing.result() > 0
    placed.result()
    brokers.threads.shutdown()
    while materialize(conn, ids).events_processed:
        pass
    logs = {partition_id: whole_log(conn, partition_id) for partition_id in ids}
    for partition_id, log in logs.items():
        by_producer: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        for _, producer_id, epoch, sequence, records in log:
            by_producer[producer_id].append((epoch, sequence, records))
        for batches in by_producer.values():
            assert batches[0][1] == 0
            for (epoch, sequence, records), (next_epoch, next_sequence, _) in pairwise(batches):
                # The same epoch goes on where it was, or a later one begins.
                expected = (epoch, sequence + records) if next_epoch == epoch else (max(epoch + 1, next_epoch), 0)
                assert (next_epoch, next_sequence) == expected
        offsets = {(producer_id, epoch, sequence): offset for offset, producer_id, epoch, sequence, _ in log}
        assert len(offsets) == len(log)
        for producer in producers:
            told = {k[1:]: o for k, o in producer.answered.items() if k[0] == partition_id}
            found = {r.object_id: r.base_offset for r in receipts(conn, told.values())}
            # What was answered is there, and where the receipt says, also where a duplicate was the answer.
            assert {key: offsets[producer.producer_id, *key] for key in told} == {k: found[o] for k, o in told.items()}
    assert sum(len(log) for log in logs.values()) >= sum(len(p.answered) for p in producers) == _PRODUCERS * _BATCHES
    with suppress(psycopg.Error):
        assert {v for p in producers for f in p.late if f.exception() is None for v in f.result().verdicts} <= {
            *("accepted", "duplicate", "fenced_epoch", "out_of_order_sequence"),
        }
    assert audit(conn, from_scratch=True).violations == ()
