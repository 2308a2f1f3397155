"""Deletes consumed events, in bounded batches. Readers and the pending query never look at them.

Lock order: none; events are never updated, and whoever deletes one first has it. A crash leaves fewer events to delete.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg

from db.execute import pin_plans, run
from db.translate import domain_errors

# Below every event.
_BEGINNING = ("0", -(2**63))


@dataclass(frozen=True, kw_only=True, slots=True)
class TrimResult:
    """`deleted` events in `partitions` partitions; `next_partition_id` is what to pass as
    `after_partition_id` to go on, None at the end.
    """

    deleted: int
    partitions: int
    next_partition_id: int | None


def trim(
    conn: psycopg.Connection[Any],
    *,
    delete_batch: int = 5_000,
    after_partition_id: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> TrimResult:
    """Delete consumed events, partition by partition after `after_partition_id`, at most `delete_batch` per
    transaction.

    Visits only partitions that have event rows. Asks `stop` after each transaction. The connection must be in
    autocommit mode.
    """
    deleted = partitions = 0
    while True:
        with domain_errors():
            row = run(conn, "next_partition_with_events", (after_partition_id,)).fetchone()
        if row is None or row[0] is None:
            return TrimResult(deleted=deleted, partitions=partitions, next_partition_id=None)
        partition_id: int = row[0]
        partitions += 1
        position: tuple[str, int] = _BEGINNING
        while True:
            with domain_errors(), conn.transaction():
                pin_plans(conn)
                row = run(conn, "delete_consumed", (partition_id, delete_batch, *position)).fetchone()
            assert row is not None  # noqa: S101 - an aggregate returns a row
            gone, found, last_xid, last_id = row
            deleted += gone
            if found:
                position = (last_xid, last_id)
            if stop():
                # The partition that may not be finished comes again.
                return TrimResult(deleted=deleted, partitions=partitions, next_partition_id=partition_id - 1)
            if found < delete_batch:
                break
        after_partition_id = partition_id
