"""How much a transaction takes: bounded, on target, and less after trouble."""

import random
from collections.abc import Iterable
from itertools import chain
from statistics import fmean
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config.errors import SettingsError
from config.settings import BATCHINGS, STRATEGIES, Settings, load_settings
from db.materialize import MaterializationMetrics
from tasks.batching import Adaptive, Complete, Controller, make_controller
from tasks.drain import controllers
from tests.support_commands import new_app

TARGET = 0.2


def adaptive(**changes: Any) -> Adaptive:
    return Adaptive(**{"target": TARGET, "start": 20_000, "events_min": 100, "events_max": 1_000_000, **changes})


def metrics(seconds: float, events: int, *, backlog: Iterable[int] = (), wait: float = 0.0) -> MaterializationMetrics:
    return MaterializationMetrics(
        processing_time_ms=(seconds + wait) * 1000,
        lock_wait_time_ms=wait * 1000,
        events_processed=events,
        transactions=1,
        backlog_partition_ids=tuple(backlog),
    )


# --- Each in turn


def test_fixed_takes_all_partitions_and_the_same_number_of_each() -> None:
    plan = Controller(500).plan([3, 1, 2], again=True)
    assert (plan.partition_ids, plan.events_per_partition) == ((3, 1, 2), 500)


def test_complete_takes_all_and_then_the_deep_ones_alone() -> None:
    controller = Complete(1000)
    first, later = controller.plan([1, 2, 3, 4], again=False), controller.plan([2, 4], again=True)
    assert (first.partition_ids, first.events_per_partition) == ((1, 2, 3, 4), 250)
    assert (later.partition_ids, later.events_per_partition) == ((2,), 1000)


def test_adaptive_shares_its_events_out_among_the_partitions() -> None:
    controller = adaptive(start=1000)
    assert controller.plan(range(1, 9), again=False).events_per_partition == 125
    assert controller.plan([1], again=True).events_per_partition == 1000


@pytest.mark.parametrize("batching", BATCHINGS)
@given(partitions=st.integers(1, 10_000), again=st.booleans(), maximum=st.integers(1, 1000))
def test_a_plan_is_bounded_and_takes_something_of_each(
    batching: Any,
    partitions: int,
    again: bool,  # noqa: FBT001 -- drawn
    maximum: int,
) -> None:
    settings = Settings(
        batching=batching, events_per_partition=maximum, batch_events_min=1, batch_events_max=max(1, maximum)
    )
    plan = make_controller(settings).plan(range(1, partitions + 1), again=again)
    assert 1 <= len(plan.partition_ids) <= partitions
    assert 1 <= plan.events_per_partition <= maximum
    if batching in {"adaptive", "complete"}:
        assert plan.events_per_partition * len(plan.partition_ids) <= max(maximum, len(plan.partition_ids))


def test_each_strategy_has_its_own_controller() -> None:
    app = new_app(batching="adaptive")
    found = app.once(controllers)
    assert set(found) == set(STRATEGIES)
    found["incremental"].failed()
    assert found["window"].plan([1], again=False) != found["incremental"].plan([1], again=False)
    app.close()


# --- Adaptive


@given(
    start=st.integers(1, 10**7),
    bounds=st.tuples(st.integers(1, 10_000), st.integers(0, 10**6)),
    course=st.lists(
        st.one_of(
            st.none(),
            st.tuples(st.floats(0, 100), st.integers(0, 10**7), st.booleans(), st.floats(0, 100)),
        ),
        max_size=60,
    ),
)
def test_whatever_happens_it_stays_within_its_bounds_and_never_jumps(
    start: int, bounds: tuple[int, int], course: list[Any]
) -> None:
    low, high = bounds[0], sum(bounds)
    controller = adaptive(start=start, events_min=low, events_max=high)
    for step in course:
        before = controller.events
        if step is None:
            controller.failed()
            assert controller.events <= before
        else:
            seconds, events, backlog, wait = step
            controller.done(metrics(seconds, events, backlog=[1] if backlog else [], wait=wait))
            if wait > TARGET / 4:
                assert controller.events == max(low, before // 2)
        assert low <= controller.events <= high
        assert before // 2 <= controller.events <= 2 * before + 1


@given(
    per_second=st.floats(5_000, 2_000_000),
    fixed_seconds=st.floats(0, 0.1),
    start=st.integers(100, 1_000_000),
    seed=st.integers(0, 1000),
)
def test_on_a_deep_backlog_it_arrives_at_its_target(
    per_second: float, fixed_seconds: float, start: int, seed: int
) -> None:
    chance = random.Random(seed)
    controller = adaptive(start=start)
    times = []
    for _ in range(60):
        events = controller.plan([1], again=True).events_per_partition
        times.append((fixed_seconds + events / per_second) * chance.lognormvariate(0, 0.1))
        controller.done(metrics(times[-1], events, backlog=[1]))
    assert 0.6 * TARGET <= fmean(times[30:]) <= 1.4 * TARGET


@given(speeds=st.lists(st.sampled_from([20_000.0, 100_000.0, 500_000.0]), min_size=2, max_size=5))
def test_it_follows_a_server_whose_speed_changes(speeds: list[float]) -> None:
    controller = adaptive()
    for speed in speeds:
        for _ in range(25):
            controller.done(metrics(controller.events / speed, controller.events, backlog=[1]))
        assert TARGET / 1.3 <= controller.events / speed <= TARGET * 1.3


def test_without_backlog_it_does_not_grow() -> None:
    controller = adaptive()
    for _ in range(20):
        controller.done(metrics(0.001, 50))
    assert controller.events == 20_000


def test_a_thin_group_with_one_deep_partition_is_no_sign_that_more_would_fit() -> None:
    controller = adaptive()
    # One partition was cut at its 100; the 199 others had one each.
    controller.done(metrics(0.01, 299, backlog=[7]))
    assert controller.events == 20_000


@pytest.mark.parametrize("kind", ["failure", "lock wait"])
def test_trouble_halves_it_and_keeps_it_there_for_a_while(kind: str) -> None:
    controller = adaptive()
    if kind == "failure":
        controller.failed()
    else:
        controller.done(metrics(0.01, 20_000, backlog=[1], wait=0.06))
    assert controller.events == 10_000
    course = []
    for _ in range(10):
        controller.done(metrics(0.01, controller.events, backlog=[1]))
        course.append(controller.events)
    assert course[:8] == [10_000] * 8
    assert course[8] > 10_000


def test_trouble_upon_trouble_ends_at_the_least() -> None:
    controller = adaptive(events_min=300)
    for _ in range(20):
        controller.failed()
    assert controller.events == 300


# --- Settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"BATCHING": "clever"}, "TIDEMARK_BATCHING"),
        ({"BATCH_SECONDS": "0"}, "TIDEMARK_BATCH_SECONDS"),
        ({"COLLECT_SECONDS": "inf"}, "TIDEMARK_COLLECT_SECONDS"),
        (
            {"BATCH_EVENTS_MIN": "200", "BATCH_EVENTS_MAX": "100"},
            "TIDEMARK_BATCH_EVENTS_MIN.*TIDEMARK_BATCH_EVENTS_MAX",
        ),
        (
            {"BATCHING": "collect", "COLLECT_SECONDS": "5", "QUEUED_SECONDS": "5"},
            "TIDEMARK_COLLECT_SECONDS.*TIDEMARK_QUEUED_SECONDS",
        ),
    ],
)
def test_settings_that_cannot_be_meant(values: dict[str, str], message: str, environment: pytest.MonkeyPatch) -> None:
    for name, value in values.items():
        environment.setenv(f"TIDEMARK_{name}", value)
    with pytest.raises(SettingsError, match=message):
        load_settings()


# --- Metrics


def test_metrics_of_both_sides_are_those_of_one_task() -> None:
    one = MaterializationMetrics(
        partitions_processed=3, transactions=1, backlog_partition_ids=(1,), strategy="window", batch_events=7
    )
    other = MaterializationMetrics(
        partitions_processed=2, transactions=1, backlog_partition_ids=(2,), strategy="incremental", batch_events=5
    )
    both = one.beside(other)
    assert (both.partitions_processed, both.transactions, both.strategy) == (5, 2, "several")
    assert sorted(chain(both.backlog_partition_ids)) == [1, 2]
    assert one.beside(one).strategy == "window"


def test_a_failed_attempt_changes_neither_strategy_nor_batch() -> None:
    one = MaterializationMetrics(transactions=1, strategy="incremental", batch_events=7)
    failed = one + MaterializationMetrics(errors=1)
    assert (failed.strategy, failed.batch_events, failed.errors) == ("incremental", 7, 1)
