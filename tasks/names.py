"""Names for partitions, for people: `orders/0-15 payments/3` in place of ids."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import psycopg

from db.topics import names_of

# Enough for every partition of a large installation; beyond that, starting over costs one query.
_REMEMBERED = 200_000


class PartitionNames:
    """Topic and partition number by partition id; read once, since they never change."""

    def __init__(self, _app: object = None) -> None:
        self._known: dict[int, tuple[str, int]] = {}

    def learn(self, conn: psycopg.Connection[Any], ids: Iterable[int]) -> None:
        missing = [i for i in ids if i not in self._known]
        if not missing:
            return
        if len(self._known) + len(missing) > _REMEMBERED:
            self._known.clear()
        self._known.update(names_of(conn, missing))

    def topic(self, partition_id: int) -> str | None:
        return self._known[partition_id][0] if partition_id in self._known else None

    def describe(self, ids: Sequence[int], *, width: int = 60) -> str:
        """Short text for partitions; those without a known name appear by id."""
        text = together(self._known.get(i, ("id", i)) for i in ids)
        return text if len(text) <= width else f"{text[: width - 1]}…"


def together(places: Iterable[tuple[str, int]]) -> str:
    """`orders/0-15 payments/3` for topics and partition numbers."""
    by_topic: dict[str, list[int]] = defaultdict(list)
    for topic, partition in places:
        by_topic[topic].append(partition)
    return " ".join(f"{topic}/{ranges(sorted(numbers))}" for topic, numbers in sorted(by_topic.items()))


def ranges(numbers: Sequence[int]) -> str:
    """`0-3,7` for 0, 1, 2, 3, 7."""
    # What a number has beyond its place is the same throughout a run.
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda placed: placed[1] - placed[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
