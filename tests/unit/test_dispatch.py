"""Grouping partitions into tasks."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.settings import Settings
from db.discover import Pending
from tasks.dispatch import group


def settings(**changes: Any) -> Settings:
    return Settings(**{"shards": 4, "partitions_per_task": 3, "events_per_task": 100, **changes})


def pending(events: dict[int, int]) -> Iterable[Pending]:
    return [Pending(partition_id=i, events=n) for i, n in events.items()]


def test_thin_partitions_of_a_shard_travel_together() -> None:
    assert group(pending({8: 1, 4: 1, 1: 1, 12: 1}), settings()) == [[4, 8, 12], [1]]


def test_a_deep_partition_travels_alone() -> None:
    assert group(pending({4: 1, 8: 100, 12: 1}), settings()) == [[8], [4, 12]]


def test_a_task_is_full_at_its_number_of_partitions_and_at_its_number_of_events() -> None:
    assert group(pending({4: 1, 8: 1, 12: 1, 16: 1}), settings()) == [[4, 8, 12], [16]]
    assert group(pending({4: 50, 8: 50, 12: 1}), settings()) == [[4, 8], [12]]


def test_nothing_pending_is_no_task() -> None:
    assert group([], settings()) == []


@pytest.mark.parametrize("shards", [1, 4, 7])
@given(events=st.dictionaries(st.integers(1, 200), st.integers(1, 150), max_size=60))
def test_every_partition_is_in_one_task_of_its_shard_within_the_limits(shards: int, events: dict[int, int]) -> None:
    limits = settings(shards=shards)

    groups = group(pending(events), limits)

    assert sorted(chain.from_iterable(groups)) == sorted(events)
    for ids in groups:
        assert len({i % shards for i in ids}) == 1
        assert len(ids) <= limits.partitions_per_task
        assert len(ids) == 1 or sum(events[i] for i in ids) <= limits.events_per_task
