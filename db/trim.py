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
# A transaction looks at no more partitions, also where none of them has anything to delete.
_PARTITIONS = 1_000


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
    """Delete consumed events of the partitions after `after_partition_id`, at most `delete_batch` per transaction.

    Visits only partitions that have event rows. Asks `stop` between transactions. The connection must be in
    autocommit mode.
    """
    deleted = partitions = 0
    # Ids begin at 1; whoever starts anywhere may start behind the last one there can be.
    position: tuple[int, str, int] = (min(after_partition_id + 1, 2**31 - 1), *_BEGINNING)
    while True:
        first, *place = position
        with domain_errors(), conn.transaction():
            pin_plans(conn)
            row = run(conn, "delete_consumed", (first, delete_batch, *place, _PARTITIONS), prepare=True).fetchone()
        assert row is not None  # noqa: S101 - an aggregate returns a row
        gone, visited, *following = row
        deleted += gone
        partitions += visited
        if following[0] is None:
            return TrimResult(deleted=deleted, partitions=partitions, next_partition_id=None)
        position = tuple(following)
        if stop():
            # The partition that may not be finished comes again.
            return TrimResult(deleted=deleted, partitions=partitions, next_partition_id=following[0] - 1)
