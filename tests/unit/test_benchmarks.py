"""The benchmarks' pure parts: what is planned, how the rest is estimated and shown, the page's retry."""

import re
from io import StringIO

import pytest
from psycopg import errors
from rich.console import Console

from config.errors import TransientDatabaseError
from config.settings import Settings
from db.materialize import MaterializationMetrics
from tests.benchmarks import retries
from tests.benchmarks.bench import Bench
from tests.benchmarks.editions import judged
from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.measure import Result, Sample
from tests.benchmarks.parts import PARTS
from tests.benchmarks.plan import Measurement, Tick
from tests.benchmarks.progress import Display, ratios, remaining
from tests.benchmarks.retries import page_retry

# --- Plans


@pytest.mark.parametrize("part", PARTS)
def test_a_plan_is_made_without_a_server(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted() -> None:
        raise AssertionError("started")

    monkeypatch.setattr("tests.benchmarks.bench.running_server", unwanted)
    plan = PARTS[part](Bench(), 5, quick=False)
    names = [(m.group, m.scenario) for m in plan]
    assert len(set(names)) == len(names)
    assert all(m.runs >= 5 and m.seconds > 0 for m in plan)


@pytest.mark.parametrize("part", PARTS)
def test_quick_takes_less_and_leaves_no_kind_of_entry_out(part: str) -> None:
    quick, full = PARTS[part](Bench(), 1, quick=True), PARTS[part](Bench(), 5, quick=False)
    assert {m.group for m in quick} == {m.group for m in full}
    assert sum(m.expected_seconds for m in quick) < sum(m.expected_seconds for m in full)


# --- Results


def result(seconds: float, cpu_seconds: float, log_bytes: int) -> Result:
    return Result(samples=(Sample(seconds=seconds, cpu_seconds=cpu_seconds, units=100, log_bytes=log_bytes),))


def test_an_entry_compares_rates_cpu_time_and_log() -> None:
    entry = compare("g", "s", {"ours": result(2.0, 1.0, 3_000), "limit": result(1.0, 0.5, 400)}, note="so")
    assert (entry.ours, entry.limit, entry.vs_limit, entry.vs_baseline) == (50, 100, 0.5, None)
    assert entry.note == "so; log: 30 / 4 bytes an event; 0.50 of the limit by CPU time"


def test_an_entry_says_nothing_of_what_was_not_looked_at() -> None:
    assert compare("g", "s", {"ours": result(2.0, 0.0, 0), "limit": result(1.0, 0.0, 0)}).note == ""


@pytest.mark.parametrize(
    ("ratio", "aim", "expected"),
    [
        (1.3, "<= 1.3", "aim <= 1.3"),
        (1.31, "<= 1.3", "aim <= 1.3 MISSED"),
        (2.0, ">= 2", "aim >= 2"),
        (1.99, ">= 2", "aim >= 2 MISSED"),
        (5.0, "", ""),
    ],
)
def test_an_aim_that_is_missed_says_so(ratio: float, aim: str, expected: str) -> None:
    assert judged(ratio, aim) == expected


# --- Progress


def test_the_rest_follows_the_pace_so_far() -> None:
    assert remaining(expected=100, done=0, took=0, since=0) == 100
    assert remaining(expected=1000, done=500, took=1000, since=0) == pytest.approx(1000, rel=0.02)
    assert remaining(expected=1000, done=500, took=250, since=0) == pytest.approx(250, rel=0.05)


def test_one_odd_run_at_the_start_says_little() -> None:
    assert remaining(expected=100, done=0.1, took=1.0, since=0) < 120


def test_the_rest_is_counted_down_between_runs_and_ends_at_nothing() -> None:
    assert remaining(expected=100, done=50, took=50, since=20) == pytest.approx(30)
    assert remaining(expected=100, done=50, took=50, since=90) == 0


def test_an_entry_in_a_few_words() -> None:
    entry = Entry(group="g", scenario="s", ours=1234.5, vs_baseline=2.345, vs_limit=0.5)
    assert ratios(entry) == "2.35 of the baseline, 0.50 of the limit"
    assert ratios(Entry(group="g", scenario="s", ours=1234.5, unit="fan-outs/s")) == "1,234 fan-outs/s"


def nothing(_: Tick) -> list[Entry]:
    return []


def test_without_a_terminal_every_measurement_says_when_it_starts_and_ends() -> None:
    times = iter([0.0, 0.0, 4.0, 8.0, 8.0])
    out = StringIO()
    plans = {
        "one": [Measurement(group="g", scenario="first", runs=2, seconds=10, take=nothing)],
        "other": [Measurement(group="g", scenario="last [x]", runs=1, seconds=20, take=nothing)],
    }
    with Display(Console(file=out, width=20), plans, clock=lambda: next(times)) as display:
        display.begin("one", plans["one"][0])
        display.tick()
        display.tick()
        display.end([Entry(group="g", scenario="first", ours=2.0, limit=4.0, vs_limit=0.5)])
        display.begin("other", plans["other"][0])
    lines = out.getvalue().splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in lines] == [
        "one       first (2 runs; 0% done, 0:00:40 left)",
        "one       first: 0.50 of the limit",
        "other     last [x] (1 runs; 50% done, 0:00:12 left)",
    ]


def test_a_terminal_gets_a_bar_with_the_runs_and_the_time_that_is_left() -> None:
    out = StringIO()
    plans = {"one": [Measurement(group="g", scenario="first", runs=2, seconds=10, take=nothing)]}
    with Display(Console(file=out, force_terminal=True, width=120, _environ={}), plans) as display:
        display.begin("one", plans["one"][0])
        display.tick()
    assert "one: first" in out.getvalue()
    assert "50%" in out.getvalue()
    assert "1/2 runs" in out.getvalue()
    assert "left" in out.getvalue()


# --- The page's retry


def test_the_pages_pauses_grow_by_a_tenth_of_a_second_from_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(retries, "sleep", pauses.append)
    error = errors.DeadlockDetected("deadlock detected")
    failures = iter([error] * 3)
    seen: list[BaseException] = []

    def work() -> MaterializationMetrics:
        for failure in failures:
            raise failure
        return MaterializationMetrics(events_processed=7)

    assert page_retry(Settings(retries=4), work, on_error=seen.append).events_processed == 7
    assert pauses == pytest.approx([0.0, 0.1, 0.2])
    assert seen == [error] * 3


def test_the_page_makes_as_many_attempts_as_we_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "sleep", lambda _: None)
    seen: list[BaseException] = []

    def work() -> MaterializationMetrics:
        raise errors.DeadlockDetected("deadlock detected")

    with pytest.raises(TransientDatabaseError, match="after 5 retries"):
        page_retry(Settings(retries=4), work, on_error=seen.append)
    assert len(seen) == 5


def test_the_page_repeats_nothing_that_would_fail_again() -> None:
    def work() -> MaterializationMetrics:
        raise errors.UniqueViolation("duplicate")

    with pytest.raises(errors.UniqueViolation):
        page_retry(Settings(), work, on_error=lambda _: None)
