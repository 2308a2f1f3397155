"""Applies the topics' retention limits: deletes the oldest runs of a log, whole, in bounded transactions.

The rule is Kafka's, with runs in the place of segments; it stands in `db/sql/functions/runs_to_delete.sql`. By time:
from the start, up to the first run with a batch that is not older than `retention_ms`. By size: as long as what is left
after deleting one more run is still `retention_bytes` or more; so a log keeps at least its limit, and exceeds it by
less than its oldest run.

Invariants: what is left is contiguous in every snapshot, because runs, their events and the start offset change in one
transaction, and only ever a prefix goes. The start offset never goes back. The newest run stays, because it is the
cursor; where its events are deleted, it goes with the next runs.

Nothing is updated: the new start is appended, like what was deleted of an object (`deleted_batches`).

Lock order: topic_partitions by ascending id, in a statement of its own before anything is read; partitions that others
have locked are passed over. Then objects by ascending id, again before they are counted. Materialization takes the
first kind only, a commit neither.

After a crash at any step nothing is left behind: it is one transaction.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psycopg.rows import namedtuple_row

from config.errors import UnknownPartitionError
from db.arrays import Int4Array
from db.statements import Connection, pipelined, run, values
from db.translate import is_int

# Partitions looked at in one statement: some milliseconds.
_PAGE = 1_000
# Batches of a partition that a transaction deletes at least, where there are as many: those of a full run. Many
# thin partitions share a transaction, up to `delete_batch` divided by this; one each would fall behind.
_SHARE = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionResult:
    """`deleted` batches of `log_bytes`, and `objects_freed` by it: none of their batches is left. `next_partition_id`
    is what to pass as `after_partition_id` to go on, None at the end.
    """

    deleted: int = 0
    log_bytes: int = 0
    objects_freed: int = 0
    next_partition_id: int | None = None


def retain(
    conn: Connection,
    *,
    delete_batch: int = 5_000,
    after_partition_id: int = 0,
    stop: Callable[[], bool] = lambda: False,
) -> RetentionResult:
    """Delete what the topics' limits let go, at most `delete_batch` batches per transaction, or else one run.

    Goes through the partitions in the order of their ids, from the one after `after_partition_id` on. One that somebody
    has locked is left for the next time. Asks `stop` after each transaction and each page. The connection must be in
    autocommit mode.

    Raises ForeignClusterError in a restored database.
    """
    if delete_batch < 1:
        raise ValueError(f"retention with {delete_batch} batches per transaction: pass at least one")
    done = RetentionResult()
    size = max(1, delete_batch // _SHARE)
    while True:
        with pipelined(conn):
            last, expired = values(conn, "find_expired", (after_partition_id, _PAGE), prepare=True)
        if last is None:
            return done
        while expired:
            group, expired = expired[:size], expired[size:]
            deleted, freed = _delete(conn, group, delete_batch // len(group))
            done = RetentionResult(
                deleted=done.deleted + deleted.batches,
                log_bytes=done.log_bytes + deleted.log_bytes,
                objects_freed=done.objects_freed + freed,
            )
            expired = sorted(deleted.unfinished) + expired
            if stop():
                return replace(done, next_partition_id=expired[0] - 1 if expired else last)
        after_partition_id = last
        if stop():
            return replace(done, next_partition_id=last)


def purge(conn: Connection, *, delete_batch: int = 5_000, stop: Callable[[], bool] = lambda: False) -> RetentionResult:
    """Delete what the partitions of deleted topics held, at most `delete_batch` batches per transaction.

    Several may do so at once: each takes partitions that nobody else has locked. Ends when nothing is left that can go
    now, or when `stop` says so, which it asks after each transaction. Transactions that ran when the topic was
    deleted may still commit to it, so a partition is done at a later call. The connection must be in autocommit mode.

    Lock order: deleted_partitions by ascending id, passing over those that are locked, then objects.
    """
    done = RetentionResult()
    size, after = max(1, delete_batch // _SHARE), 0
    while True:
        with pipelined(conn):
            locking = run(conn, "lock_deleted_partitions", (size, after), prepare=True)
            purging = run(conn, "purge", (max(_SHARE, delete_batch // size),), prepare=True, row_factory=namedtuple_row)
            run(conn, "lock_spent_objects", prepare=True)
            freeing = run(conn, "free_spent_objects", prepare=True)
            ((ids, _),), (gone,) = locking.fetchall(), purging.fetchall()
        done = RetentionResult(
            deleted=done.deleted + gone.batches,
            log_bytes=done.log_bytes + gone.log_bytes,
            objects_freed=done.objects_freed + freeing.rowcount,
        )
        if not ids or stop():
            run(conn, "forget_purged", (_PAGE,))
            return done
        if not gone.went_on:
            # These wait for transactions that run; others may not.
            after = max(ids)


def delete_records(conn: Connection, partition_id: int, before_offset: int) -> int:
    """Delete a partition's records before an offset, or all for -1; returns the start offset of the log.

    It may lie inside of a batch, and never goes back. What lies before it is gone for readers at once; retention
    deletes it. Raises UnknownPartitionError, and OffsetOutOfRangeError for an offset below -1.
    """
    if not is_int(partition_id):
        raise UnknownPartitionError(f"partition id {partition_id} does not exist")
    (start,) = values(conn, "delete_records", (partition_id, before_offset))
    return int(start)


def _delete(conn: Connection, partition_ids: Sequence[int], share: int) -> tuple[Any, int]:
    """One transaction: at most `share` batches of each partition, or one run. Returns what it deleted, as
    `delete_expired` says it, and how many objects that freed.
    """
    with pipelined(conn):
        run(conn, "lock_free_partitions", (Int4Array(partition_ids),), prepare=True)
        deleting = run(conn, "delete_expired", (share,), prepare=True, row_factory=namedtuple_row)
        run(conn, "lock_spent_objects", prepare=True)
        freeing = run(conn, "free_spent_objects", prepare=True)
        (deleted,) = deleting.fetchall()
    return deleted, freeing.rowcount
