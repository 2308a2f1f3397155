"""Idempotent producers: their ids and epochs, and what partitions know of them.

What a producer may append next is read from its last batches (`db/sql/functions/claim_sequences.sql`); nothing is
updated. A producer that is silent for long is forgotten. When it comes back it is unknown, so its next batch is out of
order, and it starts over with a new id or epoch, as Kafka's clients do by themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from db.statements import Connection, all_, pipelined, rows, run, values

# Producers of one partition after the other, looked at in one statement: some milliseconds.
_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class Producer:
    """An id, and the epoch that may write with it."""

    producer_id: int
    producer_epoch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ProducerState:
    """What a partition knows of a producer: the last batch it appended, and how many it has in all."""

    producer_id: int
    producer_epoch: int
    last_sequence: int
    batches: int
    last_commit: datetime | None


def init_producer(conn: Connection, producer_id: int | None = None, producer_epoch: int | None = None) -> Producer:
    """A new producer with epoch 0, or the next epoch of one that is known, which fences the one before.

    Raises UnknownProducerError, and FencedProducerError where `producer_epoch` is not the newest.
    """
    return Producer(*values(conn, "init_producer", (producer_id, producer_epoch)))


def producer_states(
    conn: Connection, partition_id: int, *, before: int | None = None, limit: int = 1_000
) -> list[ProducerState]:
    """Producers that a partition knows, the highest id first; at most `limit`, before an id."""
    return all_(conn, ProducerState, "producer_states", (partition_id, before, limit))


def expire_producers(
    conn: Connection,
    *,
    silent_seconds: float,
    from_partition_id: int = 2**31 - 1,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Forget producers, by partition, that have appended nothing for so long; returns how many.

    Goes through the partitions from this one down, in pages from the end of the key to its beginning. So each page
    begins at a row that is there, whatever was deleted. A batch that is committed at the same moment stays known. The
    connection must be in autocommit mode.
    """
    expired = 0
    at: tuple[Any, ...] = (from_partition_id, None)
    while True:
        with pipelined(conn):
            page = rows(conn, "expire_producers", (*at, _PAGE, silent_seconds), prepare=True)[0]
        expired += int(page.expired)
        if page.partition_id is None or stop():
            run(conn, "expire_producer_ids", (silent_seconds, _PAGE))
            return expired
        at = page.partition_id, page.producer_id
