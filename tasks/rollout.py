"""Which strategy a partition gets while a candidate is tried on a share of them; and who watches the two.

By a hash of the partition's id: the same in every process and every release, independent of its shard, and growing the
share only adds partitions. Offsets do not depend on it, so changing it while workers run is harmless.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from config.settings import Settings, Strategy
from db.materialize import MaterializationMetrics

# Hundredths of a percent.
_BUCKETS = 10_000


def bucket_of(partition_id: int) -> int:
    """A number from 0 to 9,999 for a partition, evenly spread."""
    digest = blake2b(partition_id.to_bytes(8, "big"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _BUCKETS


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Partitions of a task that share transactions; `compared`: their figures are for `tasks.compare`."""

    strategy: Strategy
    partition_ids: list[int]
    compared: bool = False


class Observer:
    """Hears of everything that happens to a task's partitions, and does nothing about it."""

    def transaction(self, side: Side, done: MaterializationMetrics) -> None:
        """Hear of one that committed; `done.moved` has each partition's share."""

    def failed(self, side: Side, error: BaseException) -> None:
        """Hear of an attempt that failed."""

    def stuck(self, partition_ids: Sequence[int], error: BaseException) -> None:
        """Hear of partitions that this task gives up."""

    def finished(self, partition_ids: Sequence[int], total: MaterializationMetrics) -> None:
        """Hear what the task did in all."""


def split(partition_ids: Iterable[int], settings: Settings) -> list[Side]:
    """Partitions by strategy, in their order; the candidate's last, so that its failure holds up nobody else.

    As many as the candidate has in this task are taken apart with the current strategy, and compared with it: beside
    all the others it would get the smallest transactions, which cost most per event.
    """
    ids = list(partition_ids)
    if settings.candidate is None or not settings.candidate_percent:
        return [Side(strategy=settings.strategy, partition_ids=ids)]
    share = round(settings.candidate_percent * _BUCKETS / 100)
    buckets = {i: bucket_of(i) for i in ids}
    candidate = [i for i in ids if buckets[i] < share]
    others = sorted((i for i in ids if buckets[i] >= share), key=lambda i: buckets[i])
    # Where it has none, as one that travels alone: a share as large as the candidate's.
    chosen = set(others[: len(candidate)] if candidate else (i for i in others if buckets[i] < 2 * share))
    control = [i for i in ids if i in chosen]
    rest = [i for i in ids if buckets[i] >= share and i not in chosen]
    sides = (
        Side(strategy=settings.strategy, partition_ids=rest),
        Side(strategy=settings.strategy, partition_ids=control, compared=True),
        Side(strategy=settings.candidate, partition_ids=candidate, compared=True),
    )
    return [side for side in sides if side.partition_ids]
