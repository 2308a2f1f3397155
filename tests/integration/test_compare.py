"""`celery -A tasks compare`: finds a difference that is there and none that is not, and says when it cannot know."""

import random
import re
import sys
from typing import Any

import pytest
from psycopg import Connection

from config.settings import Strategy
from db.commit import commit_object
from db.materialize import MaterializationMetrics
from tasks import compare as comparison
from tasks import metrics
from tasks.app import TidemarkApp
from tasks.commands.compare import compare
from tasks.compare import PAIRS_AT_LEAST, Comparison, DrainComparison, Side
from tasks.metrics import WorkerMetrics
from tests.integration.conftest import MakeApp, make_topic
from tests.support import strategy_of
from tests.support_commands import Cli, app_for, drain

ROLLOUT: dict[str, Any] = {"strategy": "window", "candidate": "incremental", "candidate_percent": 50}


@pytest.fixture
def app(make_app: MakeApp) -> TidemarkApp:
    return make_app(**ROLLOUT)


def side(strategy: Strategy) -> Side:
    return Side(strategy=strategy, partition_ids=[1], compared=True)


def note(app: TidemarkApp, strategy: Strategy, **done: Any) -> None:
    """A transaction of a side that is compared."""
    observer = DrainComparison(app)
    observer.transaction(
        side(strategy), MaterializationMetrics(**{"transactions": 1, "partitions_processed": 1, **done})
    )


def work(app: TidemarkApp, *, n: int, factor: float, seed: int = 1, share: float = 1.0, wait_ms: float = 0.2) -> None:
    """Transactions of all sizes on both sides; the candidate takes `factor` as long and gets `share` as much."""
    chance = random.Random(seed)
    sides: tuple[tuple[Strategy, float, float], ...] = (("window", 1.0, 1.0), ("incremental", factor, share))
    for strategy, slower, fewer in sides:
        for _ in range(n):
            events = max(1, round(chance.lognormvariate(5, 1.5) * fewer))
            took = (2 + events / 100) * slower * chance.lognormvariate(0, 0.3)
            note(app, strategy, events_processed=events, processing_time_ms=took + wait_ms, lock_wait_time_ms=wait_ms)
    app.once(WorkerMetrics).flush()


def only(app: TidemarkApp, **more: Any) -> Comparison:
    assert app.redis
    (found,) = comparison.read(app.redis, **more)
    return found


# --- Statistics


def test_a_difference_is_found_with_its_size(app: TidemarkApp) -> None:
    work(app, n=600, factor=1.25)
    found = only(app)
    assert found.verdict == "real"
    assert (found.low or 9) < 1.25 < (found.high or 0)
    assert found.time_ratio == pytest.approx(1.25, rel=0.08)
    assert found.pairs > 400


def test_smaller_transactions_are_no_difference_of_the_strategies(app: TidemarkApp) -> None:
    """A tenth of the events costs more per event; on the same strategy this must not look like a result."""
    work(app, n=1000, factor=1.0, share=0.1)
    found = only(app)
    assert (found.candidate.micros_per_event or 0) > 1.5 * (found.current.micros_per_event or 9)
    assert found.verdict == "not shown"
    assert found.time_ratio == pytest.approx(1, rel=0.08)


def test_smaller_within_a_cell_is_no_difference_either(app: TidemarkApp) -> None:
    chance = random.Random(2)
    sides: tuple[tuple[Strategy, int, int], ...] = (("window", 150, 255), ("incremental", 64, 180))
    for strategy, low, high in sides:
        for _ in range(200):
            events = chance.randint(low, high)
            took = events / 10 * chance.lognormvariate(0, 0.1)
            note(app, strategy, events_processed=events, processing_time_ms=took)
    app.once(WorkerMetrics).flush()
    found = only(app)
    assert found.verdict == "not shown"
    assert 30 <= found.pairs <= 100


def test_no_difference_is_found_where_there_is_none_as_often_as_promised() -> None:
    """At 90 % confidence about every tenth of equal pairs looks different, whatever the sizes."""

    chance, outside = random.Random(3), 0
    for _ in range(200):
        notes = [
            [
                f"{events} 1 {max(1, round((2000 + 10 * events) * chance.lognormvariate(0, 0.3)))} 0"
                for events in (max(1, round(chance.lognormvariate(5, 1.5) * fewer)) for _ in range(60))
            ]
            for fewer in (1.0, 0.3)
        ]
        found = comparison.compare("window", "incremental", *notes, confidence=0.9)
        outside += not (found.low or 9) <= 1 <= (found.high or 0)
    # 20 expected; the bounds are three standard deviations.
    assert 7 <= outside <= 33


def test_sides_of_a_task_are_alike_enough_to_be_compared(
    database_url: str, redis_url: str, conn: Connection[Any]
) -> None:
    """At ten percent, beside all the other partitions, none of the candidate's transactions would have its like."""
    ids = make_topic(conn, partitions=200)
    with app_for(database_url, redis_url, **ROLLOUT | {"candidate_percent": 10}) as app:
        for number in range(PAIRS_AT_LEAST):
            commit_object(conn, f"object-{number}", ids, [1] * 200, list(range(200)), [10] * 200, [0] * 200)
            drain(app, ids)
        app.once(WorkerMetrics).flush()
        found = only(app)
    assert (found.pairs, found.verdict == "too few transactions") == (PAIRS_AT_LEAST, False)
    assert 0.5 < found.current.events / found.candidate.events < 2


def test_few_transactions_are_too_few(app: TidemarkApp) -> None:
    work(app, n=PAIRS_AT_LEAST - 1, factor=50)
    assert only(app).verdict == "too few transactions"


def test_nothing_alike_is_nothing_to_compare(app: TidemarkApp) -> None:
    sides: tuple[tuple[Strategy, int], ...] = (("window", 10_000), ("incremental", 10))
    for strategy, events in sides:
        for _ in range(100):
            note(app, strategy, events_processed=events, processing_time_ms=5)
    app.once(WorkerMetrics).flush()
    found = only(app)
    assert (found.verdict, found.time_ratio, found.pairs) == ("too few transactions", None, 0)
    assert "none of them like one of window's yet" in found.words


def test_lock_waits_are_no_part_of_the_times(app: TidemarkApp) -> None:
    for n in range(PAIRS_AT_LEAST):
        note(app, "window", events_processed=10, processing_time_ms=5 + n % 3)
        note(app, "incremental", events_processed=10, processing_time_ms=8 + n % 3, lock_wait_time_ms=3)
    app.once(WorkerMetrics).flush()
    found = only(app)
    assert found.current.micros_per_event == found.candidate.micros_per_event
    assert found.current.lock_wait_ms == 0
    assert found.candidate.lock_wait_ms == pytest.approx(3, abs=0.001)


def test_it_says_how_many_more_it_takes(app: TidemarkApp) -> None:
    """By its own estimate: with as many, the interval is half as wide as the difference it is to show."""
    work(app, n=100, factor=1.0)
    few = only(app)
    assert few.transactions_needed
    assert few.transactions_needed > 300
    assert f"a difference of 5% shows with about {few.transactions_needed:,}" in few.words
    work(app, n=few.transactions_needed - 100, factor=1.0, seed=2)
    enough = only(app)
    assert (enough.high or 9) / (enough.low or 1) < 1.05**2 * 1.03
    assert "enough to see a difference of 5%" in enough.words


# --- In Redis


def test_what_is_kept_is_bounded(app: TidemarkApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a process that cannot send for long."""
    monkeypatch.setattr("tasks.metrics.SAMPLES", 50)
    for n in range(200):
        note(app, "window", events_processed=n, processing_time_ms=5)
        if n % 120 == 0:
            app.once(WorkerMetrics).flush()
    app.once(WorkerMetrics).flush()
    found = only(app)
    assert (found.current.transactions, found.current.events) == (50, sum(range(150, 200)))


def test_without_a_candidate_nothing_is_kept(database_url: str, redis_url: str, conn: Connection[Any]) -> None:
    with app_for(database_url, redis_url) as app:
        ids = make_topic(conn, partitions=3)
        commit_object(conn, "a", ids, [1] * 3, [0] * 3, [10] * 3, [0] * 3)
        drain(app, ids)
        app.once(WorkerMetrics).flush()
        assert app.redis
        assert comparison.read(app.redis) == []


def test_workers_count_both_sides_and_their_failures(app: TidemarkApp, conn: Connection[Any]) -> None:
    ids = make_topic(conn, partitions=20)
    commit_object(conn, "a", ids * 2, [1] * 40, list(range(40)), [10] * 40, [0] * 40)
    drain(app, ids)
    drain(app, ids)
    DrainComparison(app).failed(side("incremental"), ValueError())
    app.once(WorkerMetrics).flush()
    found = only(app)
    assert (found.current.transactions, found.candidate.transactions) == (2, 2)
    assert (found.current.empty, found.candidate.empty) == (1, 1)
    partitions = sum(strategy_of(i, app.settings) == "incremental" for i in ids)
    assert (found.current.events, found.candidate.events) == (2 * min(partitions, 20 - partitions), 2 * partitions)
    assert (found.current.failed, found.candidate.failed) == (0, 1)


# --- The command


def test_it_says_what_it_found(app: TidemarkApp) -> None:
    work(app, n=400, factor=1.5)
    cli = Cli(app)
    shown = cli(compare).words
    assert re.search(
        r"incremental takes 1\.\d\d of window's time for transactions alike \(99 % sure: 1\.\d\d to", shown
    )
    assert "incremental, candidate" in shown
    (found,) = cli(compare, "--json").json["comparisons"]
    assert found["verdict"] == "real"
    assert found["candidate"]["transactions"] == 400
    assert 1.3 < found["low"] < 1.5 < found["high"] < 1.7
    (narrower,) = cli(compare, "--json", "--confidence", "0.8").json["comparisons"]
    assert narrower["low"] > found["low"]


@pytest.mark.parametrize(
    ("n", "factor", "words"),
    [(3, 1.0, "too few transactions alike"), (200, 1.0, "no difference shown"), (200, 0.5, "incremental takes 0.")],
)
def test_its_verdicts(n: int, factor: float, words: str, app: TidemarkApp) -> None:
    work(app, n=n, factor=factor)
    assert words in Cli(app)(compare).words


def test_without_scipy_it_says_what_to_install(app: TidemarkApp, monkeypatch: pytest.MonkeyPatch) -> None:
    work(app, n=20, factor=1.0)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "compare needs scipy; install: pip install '.[compare]'" in Cli(app)(compare, code=1).err


def test_a_side_without_figures_is_shown_all_the_same(app: TidemarkApp) -> None:
    DrainComparison(app).failed(side("incremental"), ValueError())
    app.once(WorkerMetrics).flush()
    cli = Cli(app)
    assert "failed attempts 0 1" in cli(compare).words
    (found,) = cli(compare, "--json").json["comparisons"]
    assert (found["time_ratio"], found["transactions_needed"], found["candidate"]["failed"]) == (None, None, 1)


def test_nothing_compared_says_what_to_do(app: TidemarkApp) -> None:
    cli = Cli(app)
    assert "TIDEMARK_CANDIDATE=incremental" in cli(compare).out
    assert "TIDEMARK_CANDIDATE" in cli(compare, "--json").json["message"]


def test_starting_over_keeps_every_other_figure(app: TidemarkApp) -> None:
    work(app, n=10, factor=1)
    app.once(WorkerMetrics).add("sweep_partitions", amount=4)
    app.once(WorkerMetrics).flush()
    cli = Cli(app)
    assert "compared from now on" in cli(compare, "--reset").out
    assert app.redis
    assert metrics.read(app.redis) == {"sweep_partitions": "4"}


def test_without_redis_it_says_what_it_needs(database_url: str) -> None:
    with app_for(database_url, "amqp://guest@127.0.0.1:1//", redis_url=None, **ROLLOUT) as app:
        assert "TIDEMARK_REDIS_URL" in Cli(app)(compare, code=1).err
