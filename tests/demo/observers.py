"""Who watches the log during the run, as consumers would, and remembers what was seen.

Each is a thread with a connection of its own. What one of them fails with is raised in the main thread, by
`require_well`.
"""

import random
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType
from typing import Self

import psycopg

from config.errors import OffsetOutOfRangeError
from db.fetch import FetchedBatch, FetchRequest, fetch_batches, fetch_partitions
from db.pool import Database
from db.translate import is_transient
from tests.demo.evidence import observe_heads
from tests.demo.ledger import Ledger, Reading, Sighting
from tests.demo.programs import DemoError

_WATCH_SECONDS = 0.05
_READ_SECONDS = 0.02
_BATCHES_A_READ = 20
# Of a partition: a reader that was away catches up in a few looks.
_BYTES_A_READ = 1024 * 1024


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
            over = False
            while not over:
                try:
                    with self._database.connection() as conn:
                        over = self._look_on(conn)
                except Exception as error:
                    # It never stops: a server that is away comes back, and one that does not is found by others.
                    if self._stopping.is_set() or not is_transient(error):
                        raise
                    self._stopping.wait(self._pause)
        except BaseException as error:  # noqa: BLE001 - raised again where somebody hears it
            self._error = error

    def _look_on(self, conn: psycopg.Connection[object]) -> bool:
        while not self._stopping.is_set():
            self.look(conn)
            self._stopping.wait(self._pause)
        # Once more: what the log has come to.
        self.look(conn)
        return True

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
        began = time.monotonic()
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
                        began=began,
                        returned=seen,
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
    """Follows every partition to its end, and fetches at random offsets; both never stop."""

    def __init__(self, database: Database, watcher: Watcher, ledger: Ledger) -> None:
        super().__init__("reader", database, _READ_SECONDS)
        self._ledger = ledger
        self._watcher = watcher
        self._random = random.Random()
        self._positions = dict.fromkeys(watcher.end_offsets, 0)
        # A batch that is fetched again is kept once, as long as it is the same.
        self._kept: dict[FetchedBatch, FetchedBatch] = {}
        self.fetched = 0

    def look(self, conn: psycopg.Connection[object]) -> None:
        requests = [FetchRequest(i, offset, _BYTES_A_READ) for i, offset in self._positions.items()]
        began = time.monotonic()
        for found in fetch_partitions(conn, requests):
            position = self._positions[found.partition_id]
            if found.error is None:
                # That there is nothing new says nothing, but where somebody has seen that there is.
                if found.batches or position < self._watcher.end_offsets[found.partition_id]:
                    self._note(found.partition_id, position, found.batches, began)
                for last in found.batches[-1:]:
                    self._positions[found.partition_id] = last.start_offset + last.n_records
            elif found.error == "offset_out_of_range" and position < (found.start_offset or 0):
                # What stood there was deleted before it was read.
                self._positions[found.partition_id] = found.start_offset or 0
            else:
                raise DemoError(f"partition id {found.partition_id}: a fetch at {position} answered {found}")
        partition_id, end_offset = self._random.choice(list(self._watcher.end_offsets.items()))
        offset = self._random.randint(0, end_offset)
        began = time.monotonic()
        # Below the start offset, where records are being deleted.
        with suppress(OffsetOutOfRangeError):
            batches = fetch_batches(conn, partition_id, offset, max_batches=_BATCHES_A_READ)
            self._note(partition_id, offset, batches, began)

    def _note(self, partition_id: int, offset: int, batches: Sequence[FetchedBatch], began: float) -> None:
        self.fetched += len(batches)
        self._ledger.readings.append(
            Reading(
                partition_id=partition_id,
                from_offset=offset,
                batches=tuple(self._kept.setdefault(batch, batch) for batch in batches),
                began=began,
                returned=time.monotonic(),
            )
        )
