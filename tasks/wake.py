"""Materializes what Python commits at once, in place of at the next fan-out.

Published after the transaction has committed, and only for partitions that wait in no queue yet: a queued-token that
exists belongs to a task that has read nothing so far, and so will see the commit. A hint like every message: when the
broker is away the commit stands all the same, and the next fan-out finds it. To keep producers from waiting for a
broker that is away again and again, nothing is published for some seconds after a failure.
"""

from collections.abc import Iterable, Sequence
from threading import Lock
from time import monotonic
from typing import TYPE_CHECKING, Any

import psycopg
from celery.utils.log import get_task_logger
from psycopg.pq import TransactionStatus

from config.errors import InvalidCommitError
from db.commit import commit_object
from db.discover import Pending
from tasks.dispatch import group, publish

if TYPE_CHECKING:
    from tasks.app import TidemarkApp

log = get_task_logger(__name__)

_PAUSE_SECONDS = 5.0


class Waker:
    """Publishes for one app. Usable from several threads."""

    def __init__(self, app: "TidemarkApp") -> None:
        self._app = app
        self._lock = Lock()
        self._silent_until = 0.0

    def wake(self, partition_ids: Iterable[int]) -> int:
        """Queue these partitions, whose events are committed; returns the number of tasks. Never raises."""
        app = self._app
        if monotonic() < self._silent_until:
            return 0
        free: list[int] = []
        try:
            free = app.queued.acquire(sorted(set(partition_ids)))
            # Depth is not known here; the task hands over what it does not finish.
            groups = group((Pending(partition_id=i, events=1) for i in free), app.settings)
            if groups:
                with app.producer_or_acquire() as producer:
                    # Otherwise the first use of a connection tries for seconds.
                    producer.connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
                    for ids in groups:
                        publish(app, ids, producer=producer, retry=False)
        except Exception as error:  # noqa: BLE001 - the commit stands; nothing that happens here may fail it
            self._hush(error, free)
            return 0
        return len(groups)

    def _hush(self, error: Exception, acquired: Sequence[int]) -> None:
        with self._lock:
            first = monotonic() >= self._silent_until
            self._silent_until = monotonic() + _PAUSE_SECONDS
        if first:
            log.warning(
                "waking %s partitions failed (%s: %s); for %g s the fan-out alone finds commits",
                len(acquired),
                type(error).__name__,
                error,
                _PAUSE_SECONDS,
            )
        # Outside the lock; logs by itself when Redis is away, and the tokens expire.
        self._app.queued.release(acquired)


def wake(app: "TidemarkApp", partition_ids: Iterable[int]) -> int:
    """After a commit of your own: materialize these partitions at once. Returns the number of tasks; never raises."""
    return app.waker.wake(partition_ids)


def commit_and_wake(
    app: "TidemarkApp",
    conn: psycopg.Connection[Any],
    object_key: str,
    partition_ids: Sequence[int],
    n_records: Sequence[int],
    byte_offsets: Sequence[int],
    byte_lengths: Sequence[int],
    max_timestamps: Sequence[int],
) -> int:
    """As `db.commit.commit_object` on an idle autocommit connection, and wakes the partitions afterwards.

    Raises what that raises, and InvalidCommitError inside a transaction: a task woken before it commits sees nothing.
    Commit there with `commit_object`, and call `wake` after the transaction.
    """
    if not conn.autocommit or conn.info.transaction_status != TransactionStatus.IDLE:
        raise InvalidCommitError(
            f"object {object_key!r}: commit_and_wake needs an autocommit connection outside a transaction. Inside one, "
            f"use commit_object, and wake(app, partition_ids) after it has committed."
        )
    with app.committing(object_key, partition_ids):
        object_id = commit_object(
            conn, object_key, partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps
        )
        wake(app, partition_ids)
    return object_id
