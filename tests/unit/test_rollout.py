"""Which partitions get the candidate: the same everywhere, as many as asked for, and independent of their shard."""

import subprocess
import sys
from collections import Counter
from itertools import chain, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import SettingsError
from config.queues import shard_of
from config.settings import Settings, load_settings
from tasks.compare import Side, bucket_of, split
from tests.support import strategy_of

IDS = st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=100, unique=True)


def settings(percent: float, **changes: Any) -> Settings:
    return Settings(**{"strategy": "window", "candidate": "incremental", "candidate_percent": percent, **changes})


TENTH = settings(10)


def chosen(percent: float, last: int = 20_000) -> set[int]:
    given_settings = settings(percent)
    return {i for i in range(1, last + 1) if strategy_of(i, given_settings) == "incremental"}


def test_the_hash_is_that_of_every_release() -> None:
    """Never to change: partitions would switch sides in the middle of a rollout."""
    assert [bucket_of(i) for i in (1, 2, 3, 1_000, 2**31 - 1)] == [5768, 6101, 5858, 3939, 5534]


def test_another_process_chooses_the_same() -> None:
    code = "from tasks.compare import bucket_of; print([bucket_of(i) for i in range(1, 200)])"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.strip() == str([bucket_of(i) for i in range(1, 200)])


@pytest.mark.parametrize("percent", [0, 0.5, 10, 50, 99.5, 100])
def test_the_share_is_the_one_asked_for(percent: float) -> None:
    share = len(chosen(percent)) / 20_000
    # Five standard deviations of a fair draw; none at all at the ends.
    assert share == pytest.approx(percent / 100, abs=5 * (percent / 100 * (1 - percent / 100) / 20_000) ** 0.5 + 1e-9)


def test_growing_the_share_only_adds() -> None:
    sides = [chosen(percent, 5_000) for percent in (0, 1, 5, 10, 25, 50, 100)]
    assert all(less <= more for less, more in pairwise(sides))


@pytest.mark.parametrize("shards", [2, 8, 10])
def test_every_shard_has_its_share(shards: int) -> None:
    counts = Counter(shard_of(i, shards) for i in chosen(20))
    expected = 20_000 * 0.2 / shards
    assert all(abs(counts[shard] - expected) < 5 * expected**0.5 for shard in range(shards))


@given(ids=IDS, percent=st.floats(0, 100))
def test_split_loses_nobody_and_the_candidate_comes_last(ids: list[int], percent: float) -> None:
    given_settings = settings(percent)
    sides = split(ids, given_settings)
    assert sorted(chain.from_iterable(side.partition_ids for side in sides)) == sorted(ids)
    assert all(side.strategy == "window" for side in sides[:-1])
    for side in sides:
        assert side.partition_ids
        assert side.partition_ids == [i for i in ids if i in set(side.partition_ids)]
        assert {strategy_of(i, given_settings) for i in side.partition_ids} == {side.strategy}
        assert side.compared or side.strategy == "window"


@given(ids=IDS, percent=st.floats(1, 100))
def test_the_candidate_is_compared_with_as_many_partitions_or_all_that_are_left(ids: list[int], percent: float) -> None:
    sides = split(ids, settings(percent))
    sizes = {(side.strategy, side.compared): len(side.partition_ids) for side in sides}
    candidate = sizes.get(("incremental", True), 0)
    if candidate:
        assert sizes.get(("window", True), 0) == min(candidate, len(ids) - candidate)


def test_of_partitions_that_travel_alone_as_many_are_compared_on_both_sides() -> None:
    sides = [side for i in range(1, 5_001) for side in split([i], TENTH)]
    counts = Counter((side.strategy, side.compared) for side in sides)
    assert counts["incremental", True] == pytest.approx(500, rel=0.2)
    assert counts["window", True] == pytest.approx(500, rel=0.2)
    assert counts.total() == 5_000


def test_without_a_candidate_there_is_one_side() -> None:
    assert split([5, 3], Settings(strategy="incremental")) == [Side(strategy="incremental", partition_ids=[5, 3])]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"CANDIDATE_PERCENT": "10"}, "TIDEMARK_CANDIDATE_PERCENT needs TIDEMARK_CANDIDATE"),
        ({"CANDIDATE": "incremental"}, "TIDEMARK_CANDIDATE needs TIDEMARK_CANDIDATE_PERCENT"),
        ({"STRATEGY": "window", "CANDIDATE": "window", "CANDIDATE_PERCENT": "10"}, "nothing to compare"),
        ({"CANDIDATE": "faster", "CANDIDATE_PERCENT": "10"}, "TIDEMARK_CANDIDATE"),
        ({"CANDIDATE": "incremental", "CANDIDATE_PERCENT": "101"}, "TIDEMARK_CANDIDATE_PERCENT"),
        ({"CANDIDATE": "incremental", "CANDIDATE_PERCENT": "-1"}, "TIDEMARK_CANDIDATE_PERCENT"),
        ({"CANDIDATE": "incremental", "CANDIDATE_PERCENT": "nan"}, "TIDEMARK_CANDIDATE_PERCENT"),
    ],
)
def test_a_rollout_that_cannot_be_meant(values: dict[str, str], message: str, environment: pytest.MonkeyPatch) -> None:
    for name, value in values.items():
        environment.setenv(f"TIDEMARK_{name}", value)
    with pytest.raises(SettingsError, match=message):
        load_settings()


def test_a_rollout_may_be_turned_down_to_nothing(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TIDEMARK_CANDIDATE_PERCENT", "0")
    load_settings()
    environment.setenv("TIDEMARK_CANDIDATE", "window")
    assert split([1, 2], load_settings()) == [Side(strategy=load_settings().strategy, partition_ids=[1, 2])]
