"""Groups partitions into tasks and publishes them.

Grouping matters most for throughput: 200 thin partitions in one transaction run more than ten times faster than each
in its own. A deep partition travels alone, so that it holds nobody up.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import psycopg

from config.queues import MATERIALIZE, shard_of
from config.settings import Settings
from db.discover import Pending

if TYPE_CHECKING:
    from tasks.app import TidemarkApp


def group(pending: Iterable[Pending], settings: Settings) -> list[list[int]]:
    """Partition ids of each task to publish: one shard each, thin ones together within the settings' limits."""
    by_shard: dict[int, list[Pending]] = defaultdict(list)
    for partition in sorted(pending, key=lambda p: p.partition_id):
        by_shard[shard_of(partition.partition_id, settings.shards)].append(partition)
    return [ids for shard in sorted(by_shard) for ids in _pack(by_shard[shard], settings)]


def _pack(partitions: Sequence[Pending], settings: Settings) -> Iterable[list[int]]:
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


def dispatch(app: "TidemarkApp", conn: psycopg.Connection[Any], pending: Sequence[Pending]) -> int:
    """Publish materialize tasks for partitions that are not queued yet; returns the number of tasks.

    When publishing fails the tokens of what was not published are dropped, so that the next tick tries again.
    """
    free = set(app.queued.acquire([p.partition_id for p in pending]))
    if not free:
        return 0
    groups = group((p for p in pending if p.partition_id in free), app.settings)
    try:
        app.names.learn(conn, free)
        with app.producer_or_acquire() as producer, producer.batch():
            for ids in groups:
                # Whatever found them has collected commits since it last looked.
                publish(app, ids, at_once=True, producer=producer)
    except BaseException:
        app.queued.release(free)
        raise
    return len(groups)


def publish(app: "TidemarkApp", partition_ids: Sequence[int], *, at_once: bool = False, **options: Any) -> Any:
    """Publish one materialize task, named for Flower by topics and partitions; returns its AsyncResult.

    With `TIDEMARK_BATCHING=collect` it is due after the collect seconds, unless it is wanted at once. Until it starts
    its partitions count as queued, so what is committed meanwhile goes into the same transaction; the worker that holds
    it does other tasks.
    """
    if app.settings.batching == "collect" and not at_once:
        options.setdefault("countdown", app.settings.collect_seconds)
    return app.tasks[MATERIALIZE].apply_async(
        kwargs={"partition_ids": list(partition_ids)},
        argsrepr=f"({app.names.describe(partition_ids)})",
        kwargsrepr="{}",
        **options,
    )
