"""Who watches the log during the run, as consumers would, and remembers what was seen.

Each is a thread with a connection of its own. What one of them fails with is raised in the main thread, by
`require_well`.
"""

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType
from typing import Self

import psycopg

from db.fetch import FetchedBatch, fetch_batches
from db.pool import Database
from tests.demo.evidence import observe_heads
from tests.demo.ledger import Ledger, Reading, Sighting
from tests.demo.programs import DemoError

_WATCH_SECONDS = 0.05
_READ_SECONDS = 0.02
_BATCHES_A_READ = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """Batches of these objects, one entry each, came into sight at this monotonic time."""

    seen: float
    object_ids: tuple[int, ...]


class Observer(Thread):
    """Looks again and again until stopped."""

    def __init__(self, name: str, database: Database, pause: float) -> None:
        super().__init__(name=name, daemon=True)
        self._database = database
        self._pause = pause
        self._stopping = Event()
        self._error: BaseException | None = None

    def look(self, conn: psycopg.Connection[object]) -> None:
        raise NotImplementedError

    def run(self) -> None:
        try:
            with self._database.connection() as conn:
                while not self._stopping.is_set():
                    self.look(conn)
                    self._stopping.wait(self._pause)
                # Once more: what the log has come to.
                self.look(conn)
        except BaseException as error:  # noqa: BLE001 - raised again where somebody hears it
            self._error = error

    def require_well(self) -> None:
        """Raise DemoError if it broke off."""
        if self._error is not None:
            raise DemoError(f"the {self.name} failed: {type(self._error).__name__}: {self._error}") from self._error

    def finish(self) -> None:
        """Let it look a last time and wait for it; DemoError if it broke off."""
        self._stopping.set()
        self.join()
        self.require_well()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopping.set()
        self.join()


class Watcher(Observer):
    """Sees the offsets of all partitions, many times a second.

    Keeps each partition's head only where it changed: a long run must not fill the memory.
    """

    def __init__(self, database: Database, partition_ids: Sequence[int], ledger: Ledger) -> None:
        super().__init__("watcher", database, _WATCH_SECONDS)
        self._ledger = ledger
        self.end_offsets = dict.fromkeys(sorted(partition_ids), 0)
        self._last: dict[int, tuple[int, int]] = {}
        self.looks = 0
        self.materialized = 0
        self.arrivals: deque[Arrival] = deque()

    def look(self, conn: psycopg.Connection[object]) -> None:
        heads = observe_heads(conn, self.end_offsets)
        seen = time.monotonic()
        self.looks += len(heads)
        for head in heads:
            if self._last.get(head.partition_id) != (head.start_offset, head.end_offset) or head.new_records:
                self._ledger.sightings.append(
                    Sighting(
                        partition_id=head.partition_id,
                        start_offset=head.start_offset,
                        end_offset=head.end_offset,
                        new_records=head.new_records,
                    )
                )
            self._last[head.partition_id] = head.start_offset, head.end_offset
            self.end_offsets[head.partition_id] = head.end_offset
        object_ids = tuple(object_id for head in heads for object_id in head.new_object_ids)
        if object_ids:
            self.materialized += len(object_ids)
            self.arrivals.append(Arrival(seen=seen, object_ids=object_ids))


class Reader(Observer):
    """Fetches at random offsets, and keeps the first sight of every batch and every later one that differs."""

    def __init__(self, database: Database, watcher: Watcher, ledger: Ledger) -> None:
        super().__init__("reader", database, _READ_SECONDS)
        self._ledger = ledger
        self._watcher = watcher
        self._random = random.Random()
        self._first: dict[tuple[int, int], FetchedBatch] = {}
        self.fetched = 0

    def look(self, conn: psycopg.Connection[object]) -> None:
        partition_id, end_offset = self._random.choice(list(self._watcher.end_offsets.items()))
        offset = self._random.randint(0, end_offset)
        batches = fetch_batches(conn, partition_id, offset, max_batches=_BATCHES_A_READ)
        self.fetched += len(batches)
        if not batches and offset < end_offset:
            raise DemoError(f"partition id {partition_id}: a fetch at {offset} found nothing below {end_offset}")
        for batch in batches:
            if not batch.start_offset <= offset < batch.start_offset + batch.n_records:
                raise DemoError(f"partition id {partition_id}: a fetch at {offset} returned {batch}")
            offset = batch.start_offset + batch.n_records
            first = self._first.setdefault((partition_id, batch.start_offset), batch)
            if first is batch or first != batch:
                self._ledger.readings.append(Reading(partition_id=partition_id, batch=batch))
