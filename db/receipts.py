"""What became of commits: the offsets of their batches, and waiting for them."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Protocol

from db.arrays import Int4Array, Int8Array
from db.commit import Verdict
from db.statements import Connection, all_

# So long a message that was lost, or that nobody sends, is not missed.
POLL_SECONDS = 0.1


class Moves(Protocol):
    """Tells which partitions have got new offsets, see `tasks.hints.Moves`."""

    def wait(self, seconds: float) -> Collection[int]:
        """Partitions that moved since the last call; waits for the first ones so long, and then returns none."""


class NoMoves:
    """Where nobody tells: all that is left is to look."""

    def wait(self, seconds: float) -> Collection[int]:
        sleep(seconds)
        return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Receipt:
    """What became of one batch of a commit: `batch` counts from 1 in the order of the request.

    `base_offset` is the offset of its first record, for a duplicate that of the first one. It is None while
    `is_pending`, for what was not accepted, and where retention has deleted it.
    """

    object_id: int
    batch: int
    partition_id: int | None
    verdict: Verdict
    base_offset: int | None
    is_pending: bool


def receipts(conn: Connection, object_ids: Iterable[int], moved: Iterable[int] | None = None) -> list[Receipt]:
    """What became of the batches of these objects, by object and in the order of the request.

    With `moved`, only batches of these partitions that have an offset by now. Ids that are not known are left out.
    """
    partitions = None if moved is None else Int4Array(moved)
    return all_(conn, Receipt, "receipts", (Int8Array(object_ids), partitions))


@dataclass(slots=True)
class Waiting:
    """Commits that wait for their offsets: any number, by one call each time some partitions have moved."""

    # By partition: the objects that have batches there without an offset, and which.
    _pending: dict[int, dict[int, set[int]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._pending)

    def add(self, conn: Connection, object_ids: Iterable[int]) -> list[Receipt]:
        """Wait for these as well; returns the receipts that are there already."""
        found = receipts(conn, object_ids)
        for receipt in found:
            if receipt.is_pending and receipt.partition_id is not None:
                waiting = self._pending.setdefault(receipt.partition_id, {})
                waiting.setdefault(receipt.object_id, set()).add(receipt.batch)
        return [receipt for receipt in found if not receipt.is_pending]

    def look(self, conn: Connection, moved: Collection[int] = ()) -> list[Receipt]:
        """The receipts that have come in these partitions, or in any one."""
        ids = self._pending.keys() & set(moved) if moved else set(self._pending)
        if not ids:
            return []
        answered = []
        for receipt in receipts(conn, {o for i in ids for o in self._pending[i]}, ids):
            waiting = self._pending.get(receipt.partition_id or 0, {})
            batches = waiting.get(receipt.object_id, set())
            # Batches that are answered already come again with the others of their object.
            if receipt.batch in batches:
                answered.append(receipt)
                batches.remove(receipt.batch)
                if not batches:
                    del waiting[receipt.object_id]
                if not waiting:
                    del self._pending[receipt.partition_id or 0]
        return answered


def wait(
    conn: Connection,
    object_ids: Iterable[int],
    *,
    timeout: float,
    moves: Moves | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> list[Receipt]:
    """The receipts of these objects, once all are there or `timeout` seconds are over; then some may be pending.

    Looks again when `moves` says that partitions moved, and every `poll_seconds` at least.
    """
    wanted = list(object_ids)
    waiting = Waiting()
    waiting.add(conn, wanted)
    until = monotonic() + timeout
    source = moves or NoMoves()
    while waiting and (left := until - monotonic()) > 0:
        waiting.look(conn, source.wait(min(poll_seconds, left)))
    return receipts(conn, wanted)
