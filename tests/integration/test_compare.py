"""`celery -A tasks compare`: finds a difference that is there and none that is not, and says when it cannot know."""

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
from psycopg import Connection

from config.settings import Settings, Strategy
from db.commit import commit_object
from db.materialize import MaterializationMetrics
from db.topics import create_topic, partition_ids
from tasks import compare as comparison
from tasks import metrics
from tasks.app import TidemarkApp
from tasks.commands.compare import compare
from tasks.compare import SIDE_AT_LEAST, Comparison, t_quantile
from tasks.materialization import drain
from tasks.rollout import Side, strategy_of
from tests.support_commands import Cli, app_for

ROLLOUT: dict[str, Any] = {"strategy": "window", "candidate": "incremental", "candidate_percent": 50}


@pytest.fixture
def app(database_url: str, redis_url: str) -> Iterator[TidemarkApp]:
    with app_for(database_url, redis_url, **ROLLOUT) as made:
        yield made


def side(strategy: Strategy) -> Side:
    return Side(strategy=strategy, partition_ids=[1], compared=True)


def work(app: TidemarkApp, *, n: int, factor: float, seed: int = 1, share: float = 1.0, wait_ms: float = 0.2) -> None:
    """Transactions of all sizes on both sides; the candidate takes `factor` as long and gets `share` as much."""
    chance = random.Random(seed)
    sides: tuple[tuple[Strategy, float, float], ...] = (("window", 1.0, 1.0), ("incremental", factor, share))
    for strategy, slower, fewer in sides:
        for _ in range(n):
            events = max(1, round(chance.lognormvariate(5, 1.5) * fewer))
            done = MaterializationMetrics(
                processing_time_ms=(2 + events / 100) * slower * chance.lognormvariate(0, 0.3) + wait_ms,
                lock_wait_time_ms=wait_ms,
                events_processed=events,
                partitions_processed=1,
                transactions=1,
            )
            comparison.materialized(app, side(strategy), done)
    app.figures.flush()


def only(app: TidemarkApp, **more: Any) -> Comparison:
    assert app.redis
    (found,) = comparison.read(app.redis, **more)
    return found


# --- Statistics


@pytest.mark.parametrize(
    ("probability", "freedom", "value"),
    [(0.975, 5, 2.571), (0.975, 10, 2.228), (0.995, 10, 3.169), (0.975, 30, 2.042), (0.975, float("inf"), 1.960)],
)
def test_t_as_in_the_tables(probability: float, freedom: float, value: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(value, rel=0.01)


def test_a_difference_is_found_with_its_size(app: TidemarkApp) -> None:
    work(app, n=600, factor=1.25)
    found = only(app)
    assert found.time_ratio is not None
    assert found.verdict == "real"
    assert found.time_ratio.low < 1.25 < found.time_ratio.high
    assert found.time_ratio.value == pytest.approx(1.25, rel=0.08)
    assert min(found.compared) > 500


def test_smaller_transactions_are_no_difference_of_the_strategies(app: TidemarkApp) -> None:
    """A tenth of the events costs more per event; on the same strategy this must not look like a result."""
    work(app, n=1000, factor=1.0, share=0.1)
    found = only(app)
    assert found.current.micros_per_event
    assert found.candidate.micros_per_event
    assert found.candidate.micros_per_event.low > found.current.micros_per_event.high
    assert found.verdict == "not shown"
    assert found.time_ratio
    assert found.time_ratio.value == pytest.approx(1, rel=0.08)


def test_smaller_within_a_cell_is_no_difference_either(app: TidemarkApp) -> None:
    chance = random.Random(2)
    sides: tuple[tuple[Strategy, int, int], ...] = (("window", 150, 255), ("incremental", 64, 180))
    for strategy, low, high in sides:
        for _ in range(200):
            events = chance.randint(low, high)
            done = MaterializationMetrics(
                processing_time_ms=events / 10 * chance.lognormvariate(0, 0.1),
                events_processed=events,
                partitions_processed=1,
                transactions=1,
            )
            comparison.materialized(app, side(strategy), done)
    app.figures.flush()
    found = only(app)
    assert (found.verdict, found.compared) == ("not shown", (200, 200))


def test_no_difference_is_found_where_there_is_none_as_often_as_promised() -> None:
    """At 90 % confidence about every tenth of equal pairs looks different, whatever the sizes."""

    class Collecting:
        def __init__(self) -> None:
            self.cells: dict[str, dict[str, dict[str, int]]] = defaultdict(
                lambda: defaultdict(lambda: defaultdict(int))
            )
            self.settings = app_settings
            self.figures = self

        def add(self, name: str, pair: str, strategy: str, cell: str, amount_of: str, amount: int = 1) -> None:
            self.cells[strategy][cell][amount_of] += amount

        def flush(self) -> None:
            """There is no Redis."""

    app_settings = Settings(**ROLLOUT)
    outside = 0
    for seed in range(200):
        collecting = Collecting()
        work(collecting, n=60, factor=1.0, share=0.3, seed=seed)  # type: ignore[arg-type] # all that is used of an app
        cells = collecting.cells
        found = comparison.compare("window", "incremental", cells["window"], cells["incremental"], confidence=0.9)
        assert found.time_ratio
        outside += not found.time_ratio.low <= 1 <= found.time_ratio.high
    # 20 expected; the bounds are three standard deviations.
    assert 7 <= outside <= 33


def test_sides_of_a_task_are_alike_enough_to_be_compared(
    database_url: str, redis_url: str, conn: Connection[Any]
) -> None:
    """At ten percent, beside all the other partitions, none of the candidate's transactions would have its like."""
    create_topic(conn, "orders", 200)
    ids = partition_ids(conn, "orders")
    with app_for(database_url, redis_url, **ROLLOUT | {"candidate_percent": 10}) as app:
        for number in range(SIDE_AT_LEAST):
            commit_object(conn, f"object-{number}", ids, [1] * 200, list(range(200)), [10] * 200, [0] * 200)
            drain(app, ids)
        app.figures.flush()
        found = only(app)
    assert found.compared == (SIDE_AT_LEAST, SIDE_AT_LEAST)
    assert found.time_ratio
    assert 0.5 < found.current.events / found.candidate.events < 2


def test_few_transactions_are_too_few(app: TidemarkApp) -> None:
    work(app, n=SIDE_AT_LEAST - 1, factor=50)
    assert only(app).verdict == "too few transactions"


def test_nothing_alike_is_nothing_to_compare(app: TidemarkApp) -> None:
    sides: tuple[tuple[Strategy, int], ...] = (("window", 10_000), ("incremental", 10))
    for strategy, events in sides:
        for _ in range(100):
            done = MaterializationMetrics(processing_time_ms=5, events_processed=events, partitions_processed=1)
            comparison.materialized(app, side(strategy), done)
    app.figures.flush()
    found = only(app)
    assert (found.verdict, found.time_ratio, found.compared) == ("too few transactions", None, (0, 0))


def test_lock_waits_differ_apart_from_the_times(app: TidemarkApp) -> None:
    work(app, n=100, factor=1.0, wait_ms=3.0)
    found = only(app)
    assert found.lock_wait_difference_ms
    assert found.lock_wait_difference_ms.low <= 0 <= found.lock_wait_difference_ms.high
    assert found.current.lock_wait_ms
    assert found.current.lock_wait_ms.value == pytest.approx(3.0, abs=0.001)


# --- In Redis


def test_what_is_kept_is_bounded(app: TidemarkApp) -> None:
    for events in (1, 10, 100, 10**4, 10**6, 10**9):
        for partitions in (1, 10, 100, 10**4, 10**6):
            done = MaterializationMetrics(
                processing_time_ms=5, events_processed=events, partitions_processed=partitions, transactions=1
            )
            comparison.materialized(app, side("window"), done)
    app.figures.flush()
    assert app.redis
    cells = {field.split("|")[3] for field in metrics.read(app.redis) if field.startswith("compare|")} - {"all"}
    assert max(int(cell.split(":")[0]) for cell in cells) == 12
    assert max(int(cell.split(":")[1]) for cell in cells) == 7


def test_without_a_candidate_nothing_is_kept(database_url: str, redis_url: str, conn: Connection[Any]) -> None:
    with app_for(database_url, redis_url) as app:
        create_topic(conn, "orders", 3)
        ids = partition_ids(conn, "orders")
        commit_object(conn, "a", ids, [1] * 3, [0] * 3, [10] * 3, [0] * 3)
        drain(app, ids)
        app.figures.flush()
        assert app.redis
        assert comparison.read(app.redis) == []


def test_workers_count_both_sides_and_their_failures(app: TidemarkApp, conn: Connection[Any]) -> None:
    create_topic(conn, "orders", 20)
    ids = partition_ids(conn, "orders")
    commit_object(conn, "a", ids * 2, [1] * 40, list(range(40)), [10] * 40, [0] * 40)
    drain(app, ids)
    drain(app, ids)
    comparison.failed(app, side("incremental"))
    app.figures.flush()
    found = only(app)
    assert (found.current.transactions, found.candidate.transactions) == (2, 2)
    assert (found.current.empty, found.candidate.empty) == (1, 1)
    partitions = sum(strategy_of(i, app.settings) == "incremental" for i in ids)
    assert (found.current.events, found.candidate.events) == (2 * min(partitions, 20 - partitions), 2 * partitions)
    assert (found.current.errors, found.candidate.errors) == (0, 1)
    assert found.candidate.error_rate
    assert found.candidate.error_rate.value == pytest.approx(1 / 3)


# --- The command


def test_it_says_what_it_found(app: TidemarkApp) -> None:
    work(app, n=400, factor=1.5)
    cli = Cli(app)
    shown = cli(compare).words
    assert "Difference of times: real" in shown
    assert "incremental, candidate" in shown
    (found,) = cli(compare, "--json").json["comparisons"]
    assert found["verdict"] == "real"
    assert found["candidate"]["transactions"] == 400
    assert 1.3 < found["time_ratio"]["low"] < 1.5 < found["time_ratio"]["high"] < 1.7
    (narrower,) = cli(compare, "--json", "--confidence", "0.8").json["comparisons"]
    assert narrower["time_ratio"]["low"] > found["time_ratio"]["low"]


@pytest.mark.parametrize(
    ("n", "factor", "verdict"), [(3, 1.0, "too few transactions"), (200, 1.0, "not shown"), (200, 0.5, "real")]
)
def test_its_verdicts(n: int, factor: float, verdict: str, app: TidemarkApp) -> None:
    work(app, n=n, factor=factor)
    assert f"Difference of times: {verdict}" in Cli(app)(compare).words


def test_a_side_without_figures_is_shown_all_the_same(app: TidemarkApp) -> None:
    comparison.failed(app, side("incremental"))
    app.figures.flush()
    cli = Cli(app)
    assert "1: 100.00%" in cli(compare).words
    (found,) = cli(compare, "--json").json["comparisons"]
    assert (found["time_ratio"], found["current"]["error_rate"]) == (None, None)


def test_nothing_compared_says_what_to_do(app: TidemarkApp) -> None:
    cli = Cli(app)
    assert "TIDEMARK_CANDIDATE=incremental" in cli(compare).out
    assert "TIDEMARK_CANDIDATE" in cli(compare, "--json").json["message"]


def test_starting_over_keeps_every_other_figure(app: TidemarkApp) -> None:
    work(app, n=10, factor=1)
    app.figures.add("sweep_partitions", amount=4)
    app.figures.flush()
    cli = Cli(app)
    assert "compared from now on" in cli(compare, "--reset").out
    assert app.redis
    assert metrics.read(app.redis) == {"sweep_partitions": "4"}


def test_without_redis_it_says_what_it_needs(database_url: str) -> None:
    with app_for(database_url, "amqp://guest@127.0.0.1:1//", redis_url=None, **ROLLOUT) as app:
        assert "TIDEMARK_REDIS_URL" in Cli(app)(compare, code=1).err
