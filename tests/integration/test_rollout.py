"""A candidate on a share of the partitions, and each batching: the same offsets, and metrics that say who did what."""

from typing import Any

import psycopg
import pytest
from psycopg import Connection
from redis import Redis

from config.settings import BATCHINGS, STRATEGIES, Settings
from db.commit import commit_object
from db.materialize import MaterializationMetrics, materialize
from tasks.app import TidemarkApp
from tasks.batching import Adaptive
from tasks.dispatch import publish, wake
from tasks.drain import controllers, serve
from tasks.hints import Background
from tests.integration.conftest import MakeApp, make_topic
from tests.support import Connect, finish, strategy_of
from tests.support_commands import drain

PARTITIONS = 24
HALF: dict[str, Any] = {"strategy": "window", "candidate": "incremental", "candidate_percent": 50}


@pytest.fixture
def ids(conn: Connection[Any]) -> list[int]:
    return make_topic(conn, partitions=PARTITIONS)


def commit(conn: Connection[Any], key: str, ids: list[int], *, first: int = 0) -> None:
    n = len(ids)
    commit_object(
        conn, key, ids, [1 + (first + i) % 7 for i in range(n)], [first + i for i in range(n)], [10] * n, [0] * n
    )


def log_of(conn: Connection[Any], ids: list[int]) -> list[tuple[Any, ...]]:
    """Batches by place in the topic: start offset, records, and which event it was."""
    return conn.execute(
        "select partition_id - %s, start_offset, n_records, byte_offset from tidemark.record_batches "
        "where partition_id = any(%s) order by 1, 2",
        (ids[0], ids),
    ).fetchall()


def play(
    app: TidemarkApp, conn: Connection[Any], late: Connection[Any], topic: str
) -> tuple[list[tuple[Any, ...]], MaterializationMetrics]:
    """Commits in two rounds, with one that is late for the first; deep in one partition, thin in the others."""
    ids = make_topic(conn, topic, partitions=PARTITIONS)
    commit(conn, f"{topic}-a", ids)
    commit(late, f"{topic}-late", ids[:5] * 3, first=100)
    commit(conn, f"{topic}-deep", [ids[3]] * 40 + ids[::2], first=1000)
    total = drain(app, ids)
    late.commit()
    commit(conn, f"{topic}-b", ids * 2, first=2000)
    total += drain(app, ids)
    assert total.backlog_partition_ids == ()
    return log_of(conn, ids), total


SIDES: dict[str, dict[str, Any]] = {
    **{strategy: {"strategy": strategy} for strategy in STRATEGIES},
    **{
        f"half {candidate}": {"strategy": "window", "candidate": candidate, "candidate_percent": 50}
        for candidate in STRATEGIES
        if candidate != "window"
    },
    "no partition": HALF | {"candidate_percent": 0},
    "a tenth": HALF | {"candidate_percent": 10},
    "half, the other way": {"strategy": "incremental", "candidate": "window", "candidate_percent": 50},
    "all": HALF | {"candidate_percent": 100},
}


def test_same_offsets_whichever_side(conn: Connection[Any], connect: Connect, make_app: MakeApp) -> None:
    logs = {}
    for number, (name, changes) in enumerate(SIDES.items()):
        # Few enough that the deep partition takes several transactions.
        app = make_app(batch_events_min=1, batch_events_max=50, **changes)
        logs[name], _ = play(app, conn, connect(autocommit=False), f"topic-{number}")
    assert len(logs["window"]) == PARTITIONS + 15 + 40 + PARTITIONS // 2 + 2 * PARTITIONS
    assert {name: log == logs["window"] for name, log in logs.items()} == dict.fromkeys(SIDES, True)


@pytest.mark.parametrize("changes", [{}, HALF], ids=["one side", "two sides"])
def test_same_offsets_by_any_batching(conn: Connection[Any], connect: Connect, make_app: MakeApp, changes: Any) -> None:
    logs, transactions = {}, {}
    for batching in BATCHINGS:
        app = make_app(batching=batching, events_per_partition=4, batch_events_min=8, batch_events_max=48, **changes)
        logs[batching], total = play(app, conn, connect(autocommit=False), f"topic-{batching}")
        transactions[batching] = total.transactions
    assert {name: log == logs["fixed"] for name, log in logs.items()} == dict.fromkeys(BATCHINGS, True)
    # A whole partition a transaction, where the fixed one takes four events at a time.
    assert transactions["complete"] < transactions["fixed"]


def test_a_growing_rollout_goes_on_where_the_partition_stands(
    conn: Connection[Any], ids: list[int], make_app: MakeApp
) -> None:
    for number, percent in enumerate((0, 10, 50, 100, 50)):
        commit(conn, f"object-{number}", ids, first=100 * number)
        app = make_app(**HALF | {"candidate_percent": percent})
        assert drain(app, ids).events_processed == PARTITIONS
    by_partition: dict[int, int] = {}
    for partition, start, records, _ in log_of(conn, ids):
        assert start == by_partition.get(partition, 0)
        by_partition[partition] = start + records
    assert len(by_partition) == PARTITIONS


def test_a_task_with_both_sides_says_what_each_did(conn: Connection[Any], ids: list[int], make_app: MakeApp) -> None:
    app = make_app(shards=1, **HALF)
    commit(conn, "a", ids)
    result = serve(app, ids)
    candidate = sum(strategy_of(i, app.settings) == "incremental" for i in ids)
    assert 0 < candidate < PARTITIONS
    assert (result["strategy"], result["events_processed"]) == ("several", PARTITIONS)
    assert result["transactions"] == len(result["sides"])
    assert result["partitions_processed"] == PARTITIONS
    assert sum(s["events_processed"] for s in result["sides"] if s["strategy"] == "incremental") == candidate
    one = [i for i in ids if strategy_of(i, app.settings) == "incremental"][:1]
    alone = serve(app, one)
    assert alone["strategy"] == "incremental"
    assert "sides" not in alone


def test_a_candidate_that_fails_holds_up_its_own_partitions_alone(
    conn: Connection[Any],
    ids: list[int],
    make_app: MakeApp,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = make_app(**HALF)

    def broken(*args: Any, strategy: Any, **more: Any) -> MaterializationMetrics:
        if strategy == "incremental":
            raise psycopg.ProgrammingError("a candidate with a mistake")
        return materialize(*args, strategy=strategy, **more)

    monkeypatch.setattr("tasks.drain.materialize", broken)
    commit(conn, "a", ids)
    with pytest.raises(psycopg.ProgrammingError):
        drain(app, ids)
    placed = {row[0] + ids[0] for row in log_of(conn, ids)}
    assert placed == {i for i in ids if strategy_of(i, app.settings) == "window"}


# --- Batching


def test_complete_brings_one_deep_partition_to_its_end_before_the_next(
    conn: Connection[Any], ids: list[int], make_app: MakeApp
) -> None:
    app = make_app(batching="complete", batch_events_min=1, batch_events_max=10)
    for n in (0, 1):
        commit(conn, f"deep-{n}", [ids[n]] * 35)
    total = drain(app, ids[:3])
    # Three of each; then 10, 10, 10 and 2 of the one, and the same of the other.
    assert (total.events_processed, total.transactions, total.partitions_processed) == (70, 9, 2)
    xids = "select partition_id - %s from tidemark.runs group by partition_id, xmin order by min(xmin::text::bigint), 1"
    # The first transaction is one row of each.
    assert [row[0] for row in conn.execute(xids, (ids[0],))] == [0, 1, *[0] * 4, *[1] * 4]


def test_adaptive_shrinks_when_another_transaction_holds_the_partition(
    conn: Connection[Any], connect: Connect, ids: list[int], make_app: MakeApp
) -> None:
    app = make_app(batching="adaptive", lock_timeout=0.05, retries=1, retry_seconds=0.001)
    commit(conn, "a", ids[:1])
    holder = connect(autocommit=False)
    holder.execute("select from tidemark.topic_partitions where id = %s for no key update", (ids[0],))
    assert drain(app, ids[:1]).stuck_partition_ids == tuple(ids[:1])
    controller = app.once(controllers)[app.settings.strategy]
    assert isinstance(controller, Adaptive)
    assert controller.events == app.settings.events_per_task // 2
    holder.rollback()
    done = drain(app, ids[:1])
    assert (done.events_processed, done.batch_events) == (1, app.settings.events_per_task // 2)


def due(redis_url: str, queue: str) -> list[bool]:
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        return ['"eta": null' not in raw for raw in redis.lrange(queue, 0, -1)]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_only_collect_collects_and_only_after_a_wake_up(
    batching: Any, redis_url: str, ids: list[int], make_app: MakeApp
) -> None:
    app = make_app(shards=1, batching=batching, collect_seconds=0.5)
    wake(app, ids[:1])
    finish(app.once(Background))
    publish(app, ids[1:2], at_once=True)
    assert sorted(due(redis_url, "materialize.0")) == [False, batching == "collect"]
    # It collects: what is committed meanwhile is queued already.
    wake(app, ids[:1])
    finish(app.once(Background))
    assert len(due(redis_url, "materialize.0")) == 2


def test_settings_of_a_rollout_reach_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDEMARK_CANDIDATE", "window")
    monkeypatch.setenv("TIDEMARK_CANDIDATE_PERCENT", "12.5")
    settings = Settings()
    assert (settings.candidate, settings.candidate_percent) == ("window", 12.5)
