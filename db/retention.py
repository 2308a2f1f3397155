"""Applies the topics' retention limits: deletes the oldest batches of a log, in bounded transactions.

The rule is Kafka's, with batches in the place of segments. By time: from the start, up to the first batch whose newest
record is not older than `retention_ms` (a batch without timestamps, -1, is as old as its commit). By size: as long as
what is left after deleting one more batch is still `retention_bytes` or more; so a log keeps at least its limit, and
exceeds it by less than its oldest batch.

Invariants: what is left is contiguous in every snapshot, because batches, start offset and byte size change in one
transaction, and only ever a prefix goes. The start offset never goes back.

Lock order: topic_partitions by ascending id, in a statement of its own before anything is read; then objects by
ascending id. Materialization takes the first kind only, a commit neither.

After a crash at any step nothing is left behind: one transaction deletes the batches, moves the head, counts the
objects down and puts those without batches into dead_objects.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from db.arrays import Int4Array
from db.execute import pin_plans, run
from db.translate import domain_errors

# Partitions looked at in one statement: some milliseconds.
_PAGE = 1_000
# Partitions that share a transaction. One transaction each falls behind with many thin partitions; many more would keep
# materialization of all of them waiting.
_GROUP = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionResult:
    """`deleted` batches of `log_bytes` in `partitions` partitions, and `objects_freed` by it: none of their batches is
    left. `next_partition_id` is what to pass as `after_partition_id` to go on, None at the end.
    """

    deleted: int = 0
    log_bytes: int = 0
    objects_freed: int = 0
    partitions: int = 0
    next_partition_id: int | None = None


def retain(
    conn: psycopg.Connection[Any],
    *,
    delete_batch: int = 5_000,
    after_partition_id: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> RetentionResult:
    """Delete what the topics' limits let go, at most `delete_batch` batches per transaction.

    Goes through the partitions of topics with limits in the order of (topic, partition), from the one after
    `after_partition_id` on; from the first one when there is no such partition. Asks `stop` after each transaction and
    each page. The connection must be in autocommit mode.

    Raises ForeignClusterError in a restored database, and the driver's CheckViolation where a counter is so wrong that
    it would fall below zero (see `db.audit`): nothing is deleted on the strength of it.
    """
    if delete_batch < 1:
        raise ValueError(f"retention with {delete_batch} batches per transaction: pass at least one")
    deleted = log_bytes = objects_freed = partitions = 0

    def result(next_partition_id: int | None) -> RetentionResult:
        return RetentionResult(
            deleted=deleted,
            log_bytes=log_bytes,
            objects_freed=objects_freed,
            partitions=partitions,
            next_partition_id=next_partition_id,
        )

    while True:
        with domain_errors():
            page = run(conn, "find_expired", (after_partition_id, _PAGE)).fetchall()
        if not page:
            return result(None)
        expired: list[int] = [row[0] for row in page if row[1]]
        size = min(_GROUP, delete_batch)
        for start in range(0, len(expired), size):
            group: Sequence[int] = expired[start : start + size]
            touched: set[int] = set()
            while group:
                quota = delete_batch // len(group)
                rows = _delete(conn, group, quota)
                deleted += sum(row[1] for row in rows)
                log_bytes += int(sum(row[2] for row in rows))
                objects_freed += rows[0][3] if rows else 0
                partitions += len({row[0] for row in rows} - touched)
                touched.update(row[0] for row in rows)
                group = [row[0] for row in rows if row[1] == quota]
                if stop():
                    # This page comes again; what is finished in it costs a probe each.
                    return result(after_partition_id)
        after_partition_id = page[-1][0]
        if not expired and stop():
            return result(after_partition_id)


def _delete(
    conn: psycopg.Connection[Any], partition_ids: Sequence[int], quota: int
) -> Sequence[tuple[int, int, int, int]]:
    """One transaction: at most `quota` batches of each partition. Rows: partition id, batches, bytes, objects freed."""
    with domain_errors(), conn.transaction():
        pin_plans(conn)
        ids = Int4Array(sorted(partition_ids))
        run(conn, "lock_partitions", (ids,))
        rows: Sequence[tuple[int, int, int, int]] = run(conn, "delete_expired", (ids, quota)).fetchall()
    return rows
