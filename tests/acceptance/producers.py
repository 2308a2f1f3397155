"""Producers that keep a ledger, and the backlog as the database shows it."""

import random
import threading
import time
from typing import Any

import psycopg

from db.commit import Batch, commit_batches
from db.discover import sweep
from tests.support_oracle import Ledger, Sent


def backlog(conn: psycopg.Connection[Any]) -> int:
    """Pending events in all partitions."""
    return sum(pending.events for pending in sweep(conn))


def commit_one(
    conn: psycopg.Connection[Any], ledger: Ledger, key: str, partitions: list[int], *, records: int = 3
) -> int:
    """Commit one object, a batch for each of these partitions, and write it down."""
    batches = [
        Batch(partition_id=p, n_records=records, byte_offset=100 * n, byte_length=100, max_timestamp=1_700_000_000_000)
        for n, p in enumerate(partitions)
    ]
    began = time.monotonic()
    object_id = commit_batches(conn, key, batches)
    returned = time.monotonic()
    ledger.sent.extend(
        Sent(
            partition_id=b.partition_id,
            n_records=b.n_records,
            object_key=key,
            byte_offset=b.byte_offset,
            byte_length=b.byte_length,
            max_timestamp=b.max_timestamp,
            began=began,
            returned=returned,
        )
        for b in batches
    )
    ledger.attempts.append((key, object_id))
    return object_id


class Producers:
    """Threads that commit as long as they may. A commit that fails is repeated until it succeeds: replays are safe."""

    def __init__(
        self, url: str, partitions: list[int], ledger: Ledger, *, threads: int = 2, pause: float = 0.01
    ) -> None:
        self._url = url
        self._partitions = partitions
        self._ledger = ledger
        self._pause = pause
        self._stop = threading.Event()
        self._failures: list[BaseException] = []
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop after the commit at hand; raises what ended a producer."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        if self._failures:
            raise self._failures[0]

    def _run(self, number: int) -> None:
        try:
            self._commit_all(number)
        except BaseException as error:  # noqa: BLE001 - raised again by stop()
            self._failures.append(error)

    def _commit_all(self, number: int) -> None:
        chance = random.Random(number)
        conn = psycopg.connect(self._url, autocommit=True)
        count = 0
        while not self._stop.is_set():
            count += 1
            chosen = chance.choices(self._partitions, k=chance.randint(1, 6))
            conn = self._commit(conn, f"bucket/{number}/{count:06}", chosen)
            time.sleep(self._pause)
        conn.close()

    def _commit(self, conn: psycopg.Connection[Any], key: str, chosen: list[int]) -> psycopg.Connection[Any]:
        """Commit, over a new connection where the old one is lost; returns the one that works."""
        began = time.monotonic()
        while True:
            try:
                commit_one(conn, self._ledger, key, chosen)
            except psycopg.OperationalError:
                conn.close()
                if time.monotonic() > began + 60:
                    raise
                time.sleep(0.1)
                try:
                    conn = psycopg.connect(self._url, autocommit=True)
                except psycopg.OperationalError:
                    continue
            else:
                return conn
