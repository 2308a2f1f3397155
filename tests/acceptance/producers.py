"""The demo's producers as threads of a test, and commits one by one; all goes into the test's ledger."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg

from config.settings import Settings
from db.commit import Batch
from db.pool import Database
from tests.demo.ledger import Ledger, commit_noted
from tests.demo.producer import THREADS, Order, Producer, Shift

_STOP_SECONDS = 60.0


def commit_one(
    conn: psycopg.Connection[Any], ledger: Ledger, key: str, partitions: list[int], *, records: int = 3
) -> int:
    """Commit one object, a batch for each of these partitions, and write it down."""
    batches = [
        Batch(partition_id=p, n_records=records, byte_offset=100 * n, byte_length=100, max_timestamp=1_700_000_000_000)
        for n, p in enumerate(partitions)
    ]
    return commit_noted(conn, ledger, key, batches)


class Producers:
    """Commit as long as they may, `rate` times a second. A commit without an answer is repeated: replays are safe."""

    def __init__(self, url: str, partitions: Sequence[int], ledger: Ledger, *, rate: float = 20.0) -> None:
        self._database = Database(url, Settings(database_url=url), threads=THREADS)
        order = Order(number=0, key_prefix="bucket/", rate=rate, partition_ids=partitions)
        self._producer = Producer(order, self._database, ledger)
        self._thread = ThreadPoolExecutor(1)
        self._run = self._thread.submit(self._producer.run, Shift(start=time.monotonic()))

    def stop(self) -> None:
        """Stop after the commits at hand; raises what ended a producer."""
        self._producer.end()
        self._run.result(_STOP_SECONDS)
        self._thread.shutdown()
        self._database.close()
