"""Finds work, groups it into tasks and publishes them.

Grouping matters most for throughput: 200 thin partitions in one transaction run more than ten times faster than each
in its own. A deep partition travels alone, so that it holds nobody up.

Three find work. Fan-out looks at the commits since the last one. The sweep looks at every partition, after lost
messages. A wake-up comes with a commit from Python, so that the commit need not wait for the next fan-out. A message is
a hint: when the broker is away, the next tick or sweep finds what was not published.
"""

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from functools import partial
from itertools import chain, groupby
from time import monotonic
from types import NoneType
from typing import TYPE_CHECKING, Any

import psycopg
from celery.utils.saferepr import saferepr
from psycopg.pq import TransactionStatus

from config.errors import InvalidCommitError, InvalidJobError, SettingsError
from config.queues import MATERIALIZE, shard_of
from config.settings import Settings
from db.commit import commit_object
from db.discover import Pending, find_committed, save_fan_out
from db.discover import sweep as sweep_partitions
from db.status import find_partition
from db.topics import partition_ids as ids_of_topic
from tasks.app import TidemarkApp
from tasks.hints import Background, QueuedTokens
from tasks.names import PartitionNames
from tasks.retries import with_retries

if TYPE_CHECKING:
    from tasks.tracing import Tracing

log = logging.getLogger(__name__)


def group(pending: Iterable[Pending], settings: Settings) -> list[list[int]]:
    """Partition ids of each task to publish: one shard each, thin ones together within the settings' limits."""

    def shard(partition: Pending) -> int:
        return shard_of(partition.partition_id, settings.shards)

    ordered = sorted(pending, key=lambda p: (shard(p), p.partition_id))
    return [ids for _, partitions in groupby(ordered, shard) for ids in _pack(partitions, settings)]


def _pack(partitions: Iterable[Pending], settings: Settings) -> Iterable[list[int]]:
    together: list[int] = []
    events = 0
    for partition in partitions:
        if partition.events >= settings.events_per_task:
            yield [partition.partition_id]
            continue
        full = len(together) == settings.partitions_per_task or events + partition.events > settings.events_per_task
        if together and full:
            yield together
            together, events = [], 0
        together.append(partition.partition_id)
        events += partition.events
    if together:
        yield together


def group_ids(partition_ids: Iterable[int], settings: Settings) -> list[list[int]]:
    """As `group` where depth is not known; the task hands over what it does not finish."""
    return group((Pending(partition_id=i, events=1) for i in partition_ids), settings)


def publish(app: TidemarkApp, partition_ids: Sequence[int], *, at_once: bool = False, **options: Any) -> Any:
    """Publish one materialize task, named for Flower by topics and partitions; returns its AsyncResult.

    With `TIDEMARK_BATCHING=collect` it is due after the collect seconds, unless it is wanted at once. Until it starts
    its partitions count as queued, so what is committed meanwhile goes into the same transaction; the worker that holds
    it does other tasks.
    """
    tracing_of(app)
    if app.settings.batching == "collect" and not at_once:
        options.setdefault("countdown", app.settings.collect_seconds)
    # Celery would subscribe to the result of each.
    options.setdefault("ignore_result", True)
    return app.send_task(
        MATERIALIZE,
        kwargs={"partition_ids": list(partition_ids)},
        argsrepr=f"({app.once(PartitionNames).describe(partition_ids)})",
        kwargsrepr="{}",
        **options,
    )


def dispatch(app: TidemarkApp, conn: psycopg.Connection[Any], pending: Sequence[Pending]) -> int:
    """Publish materialize tasks for partitions that are not queued yet; returns the number of tasks."""
    free = set(app.once(QueuedTokens).acquire([p.partition_id for p in pending]))
    # Whatever found them has collected commits since it last looked.
    return _publish(app, group((p for p in pending if p.partition_id in free), app.settings), at_once=True, conn=conn)


def hand_over(app: TidemarkApp, partition_ids: Sequence[int], *, queued: bool = False, at_once: bool = True) -> int:
    """Publish what a task has not done, to the end of its queue: others of the shard get their turn.

    `queued`: it holds the partitions' tokens already; else those that somebody has queued meanwhile are left out.
    Grouped by the shards of now: the task may have been published with another number of them.
    """
    left = partition_ids if queued else app.once(QueuedTokens).acquire(partition_ids)
    return _publish(app, group_ids(left, app.settings), at_once=at_once)


def _publish(
    app: TidemarkApp, groups: list[list[int]], *, at_once: bool, conn: psycopg.Connection[Any] | None = None
) -> int:
    """Publish a task for each group of partitions, which have their tokens; returns the number of tasks."""
    if not groups:
        return 0
    try:
        if conn is not None:
            app.once(PartitionNames).learn(conn, chain(*groups))
        with app.producer_or_acquire() as producer, producer.batch():
            for ids in groups:
                publish(app, ids, at_once=at_once, producer=producer)
    except BaseException:
        # Or the next tick would take them for queued.
        app.once(QueuedTokens).release(chain(*groups))
        raise
    return len(groups)


def fan_out(app: TidemarkApp, *, commits_at_most: int = 50_000) -> dict[str, int]:
    """Dispatch the partitions of all commits since the last fan-out; with more of them than that, sweep instead.

    How far it got is saved after publishing: a crash in between dispatches twice, never not at all.
    """

    def once() -> dict[str, int]:
        with app.database.connection() as conn:
            found = find_committed(conn, limit=commits_at_most)
            if found.commits == 0:
                return {"commits": 0, "partitions": 0, "tasks": 0}
            partitions = found.partitions
            if not found.complete:
                # After a long pause; reading every partition is cheaper than that many commits.
                log.info("too many new commits, sweeping all partitions", extra={"commits": found.commits})
                partitions = tuple(sweep_partitions(conn))
            tasks = dispatch(app, conn, partitions)
            save_fan_out(conn, found)
        done = {"commits": found.commits, "partitions": len(partitions)}
        log.info("fanned out", extra={**done, "tasks_published": tasks})
        return {**done, "tasks": tasks}

    return with_retries(app.settings, once, until=monotonic() + app.settings.maintenance_seconds)


def sweep(app: TidemarkApp) -> dict[str, int]:
    """Dispatch every partition that has pending events."""

    def once() -> dict[str, int]:
        with app.database.connection() as conn:
            partitions = tuple(sweep_partitions(conn))
            tasks = dispatch(app, conn, partitions)
        if partitions:
            log.info("swept", extra={"partitions": len(partitions), "tasks_published": tasks})
        return {"partitions": len(partitions), "tasks": tasks}

    return with_retries(app.settings, once, until=monotonic() + app.settings.maintenance_seconds)


def enqueue(app: TidemarkApp, topic: str, partition: int | None, **options: Any) -> list[str]:
    """Publish materialize tasks for a topic, or one partition of it; returns their ids.

    Whoever asks by name wants it now: tokens are not looked at. Raises UnknownTopicError and UnknownPartitionError.
    """
    # Whoever calls a task by hand may pass anything.
    if (type(topic), type(partition)) not in {(str, int), (str, NoneType)}:
        given = f"{saferepr(topic, 100)} and {saferepr(partition, 100)}"
        raise InvalidJobError(f"a job takes a topic name and a partition number, not {given}")

    def look_up() -> list[int]:
        with app.database.connection() as conn:
            ids = ids_of_topic(conn, topic) if partition is None else [find_partition(conn, topic, partition)]
            app.once(PartitionNames).learn(conn, ids)
            return ids

    ids = with_retries(app.settings, look_up, until=monotonic() + app.settings.task_seconds)
    with app.producer_or_acquire() as producer:
        return [publish(app, g, at_once=True, producer=producer, **options).id for g in group_ids(ids, app.settings)]


# --- After a commit from Python


def wake(app: TidemarkApp, partition_ids: Iterable[int]) -> None:
    """After a commit of your own: materialize these partitions at once. Returns at once, and never raises.

    Published by a thread, only for partitions that wait in no queue yet: a token that exists belongs to a task that has
    read nothing so far, and so will see the commit.
    """
    work = partial(hand_over, app, sorted(set(partition_ids)), at_once=False)
    app.once(Background).submit(copy_context().run, work)


def commit_and_wake(
    app: TidemarkApp,
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
    with committing(app, object_key, partition_ids):
        arrays = (partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps)
        object_id = commit_object(conn, object_key, *arrays)
        wake(app, partition_ids)
    return object_id


def committing(app: TidemarkApp, object_key: str, partition_ids: Sequence[int]) -> AbstractContextManager[None]:
    """Put it around a commit from Python, and its wake-up: the span its materialization is shown under."""
    tracing = tracing_of(app)
    return nullcontext() if tracing is None else tracing.committing(object_key, partition_ids)


def tracing_of(app: TidemarkApp) -> "Tracing | None":
    """The app's tracing; None, and OpenTelemetry not even loaded, unless it is asked for."""
    if not app.settings.tracing:
        return None
    try:
        from tasks.tracing import Tracing  # noqa: PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"TIDEMARK_TRACING needs {error.name}; in a checkout, install it with: pip install '.[tracing]'"
        ) from None
    return app.once(Tracing)
