"""Workers without `-Q` share the shards out among themselves."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pytest_celery import CeleryBrokerCluster
from redis import Redis

from config.settings import Settings
from tasks.application import TidemarkApp
from tasks.leases import LeaseStore
from tests.acceptance.conftest import Log, Place, Programs
from tests.acceptance.producers import Producers, commit_one
from tests.benchmarks.lease_timeline import SHARDS, Timeline, Watch, play, render
from tests.support import wait_until

LEASE = 4.0


@pytest.fixture
def place(database_url: str, celery_broker_cluster: CeleryBrokerCluster, tmp_path: Path) -> Place:
    return Place(
        database_url=database_url,
        broker_url=celery_broker_cluster[0].config()["url"],
        directory=tmp_path,
        settings={"TIDEMARK_SHARDS": str(SHARDS), "TIDEMARK_LEASE_SECONDS": str(LEASE)},
    )


def inspected(start: Programs, workers: int) -> dict[str, Any]:
    """What `inspect shards` answers by worker name, once so many workers do."""

    def all_workers_answer() -> dict[str, Any] | None:
        replies: dict[str, Any] = start.app.control.inspect(timeout=5, limit=workers)._request("shards") or {}
        return replies if len(replies) == workers else None

    return wait_until(all_workers_answer, timeout=30) or {}


def test_one_then_four_then_one_killed_and_one_stopped(start: Programs, place: Place, log: Log) -> None:
    """All shards are covered again within the lease time, and at once where a worker leaves in order."""
    timeline = Timeline()
    start.beat()
    watch = Watch(place.database_url, place.broker_url, timeline)
    try:
        play(watch, lambda name: start.worker("-n", f"{name}@test", wait=False).process)
    finally:
        watch.close()
        print(render(timeline))  # noqa: T201 - shown when the test fails
    # A fan-out's interval and a waiting BRPOP come on top of the lease, and this machine is shared.
    assert timeline.longest("kill -9 w2", "stop w3") < LEASE + 3
    assert timeline.longest("one worker has all shards", "kill -9 w2") < LEASE
    assert timeline.longest("stop w3", "end") < LEASE
    printed = start.run("inspect", "shards", "--json", "--timeout", "5")
    replies = json.loads(printed.stdout)
    assert len(replies) == 2
    assert sorted(s for reply in replies.values() for s in reply["shards"]) == list(range(SHARDS))
    assert all(reply["leasing"] and reply["store"] == "ok" for reply in replies.values())
    log.wait_until_drained()


def test_a_shard_is_not_given_up_while_its_task_runs(start: Programs, app: TidemarkApp, log: Log, place: Place) -> None:
    """A second worker joins, then the first is asked to stop, while a task of the last shard runs."""
    first = start.worker()
    shard = SHARDS - 1
    partition = next(p for p in log.partitions if p % SHARDS == shard)
    commit_one(log.conn, log.ledger, "bucket/1", [partition])
    with Redis.from_url(place.broker_url, decode_responses=True) as redis, psycopg.connect(log.url) as holder:

        def owners() -> dict[str, str]:
            leases = redis.hgetall(f"tidemark:leases:{SHARDS}:owners")
            return {str(k): str(v).split("@")[0] for k, v in leases.items()}

        def the_first_owns_all() -> bool:
            return list(owners().values()) == ["worker1"] * SHARDS

        wait_until(the_first_owns_all)
        holder.execute("select from tidemark.topic_partitions where id = %s for update", (partition,))
        app.tasks["tasks.materialize"].apply_async(kwargs={"partition_ids": [partition]})

        def the_task_waits() -> bool:
            row = log.conn.execute(
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            ).fetchone()
            return row == (1,)

        wait_until(the_task_waits)
        start.worker()

        def the_idle_half_has_moved() -> bool:
            return list(owners().values()).count("worker2") == SHARDS // 2 - 1

        wait_until(the_idle_half_has_moved)
        assert owners()[str(shard)] == "worker1"
        first.process.signal(signal.SIGTERM)

        def all_but_the_busy_one_have_moved() -> bool:
            return [s for s, w in owners().items() if w == "worker1"] == [str(shard)]

        wait_until(all_but_the_busy_one_have_moved)
        time.sleep(0.5)
        assert owners()[str(shard)] == "worker1"
        holder.rollback()

        def the_last_has_moved() -> bool:
            return list(owners().values()) == ["worker2"] * SHARDS

        wait_until(the_last_has_moved, timeout=25)
        assert first.process.wait() == 0
    assert log.backlog() == 0
    log.check()


def test_an_emptied_store_moves_nothing(
    start: Programs, log: Log, place: Place, produce: Callable[..., Producers]
) -> None:
    """FLUSHALL: both keep what they have; a static worker beside them takes no lease and does no harm."""
    workers = [start.worker(wait=False), start.worker(wait=False), start.worker("-Q", "materialize.3", wait=False)]
    start.ready(*workers)
    start.beat()

    def both_have_their_half() -> dict[str, Any] | None:
        replies = inspected(start, 3)
        shares = sorted(len(r["shards"]) for r in replies.values() if r["leasing"])
        return replies if shares == [SHARDS // 2, SHARDS // 2] else None

    before = wait_until(both_have_their_half, timeout=30) or {}
    assert [r["shards"] for r in before.values() if not r["leasing"]] == [[3]]
    producers = produce()
    with Redis.from_url(place.broker_url) as redis:
        redis.flushall()
    time.sleep(2)
    after = inspected(start, 3)
    assert {n: r["shards"] for n, r in after.items()} == {n: r["shards"] for n, r in before.items()}
    producers.stop()
    log.wait_until_drained()
    assert log.check() == len(log.ledger.sent)


# The script alone, on a Redis without workers.


@pytest.fixture
def redis(redis_url: str) -> Iterator["Redis"]:
    with Redis.from_url(redis_url, decode_responses=True) as client:
        yield client


def store(redis: "Redis", name: str, *, shards: int = 8, seconds: float = 10) -> LeaseStore:
    return LeaseStore(redis, Settings(shards=shards, lease_seconds=seconds), name)


def test_shares_add_up_whatever_the_numbers(redis: "Redis") -> None:
    for shards in (1, 3, 8):
        for workers in (1, 2, 3, 5):
            redis.flushall()
            stores = [store(redis, f"w{n}", shards=shards) for n in range(workers)]
            held: list[frozenset[int]] = [frozenset()] * workers
            for _ in range(4):
                for n, one in enumerate(stores):
                    view = one.tick(consumed=held[n], fresh=True)
                    held[n] = view.wanted
                    one.tick(consumed=held[n], released=view.owned - view.wanted, fresh=True)
            sizes = sorted(map(len, held))
            assert sorted(s for h in held for s in h) == list(range(shards))
            assert sizes[-1] - sizes[0] <= 1


def test_a_join_makes_nobody_else_take_more(redis: "Redis") -> None:
    """The order of joining counts, not the names: so as few shards move as can be."""
    stores = {name: store(redis, name) for name in ("m", "z", "a")}
    shares = []
    for count in (1, 2, 3):
        joined = list(stores.values())[:count]
        for one in joined:
            one.tick(fresh=True)
        shares.append([one.tick(fresh=True).share for one in joined])
    assert shares == [[8], [4, 4], [3, 3, 2]]


def test_a_dead_workers_shards_are_free_after_its_lease(redis: "Redis") -> None:
    dead, alive = store(redis, "dead", seconds=2), store(redis, "alive", seconds=2)
    assert len(dead.tick(fresh=True).owned) == 8
    began = time.monotonic()
    assert not alive.tick(fresh=True).owned

    def all_are_taken_over() -> bool:
        return len(alive.tick(consumed=()).owned) == 8

    wait_until(all_are_taken_over, timeout=5)
    assert 1 < time.monotonic() - began < 2
    # Thawed: nothing is its own, and what it still consumes is not taken back.
    assert not dead.tick(consumed=range(8)).owned


def test_who_leaves_keeps_what_is_busy(redis: "Redis") -> None:
    leaving, staying = store(redis, "leaving"), store(redis, "staying")
    leaving.tick(fresh=True)
    assert leaving.tick(consumed=[5], released=[0, 1, 2, 3, 4, 6, 7], leaving=True).owned == {5}
    assert staying.tick(fresh=True).owned == {0, 1, 2, 3, 4, 6, 7}
    assert not leaving.tick(released=[5], leaving=True).owned
    assert len(staying.tick(fresh=True).owned) == 8
    assert redis.zrange("tidemark:leases:8:members", 0, -1) == ["staying"]


def test_nobody_releases_what_is_anothers(redis: "Redis") -> None:
    one, other = store(redis, "one"), store(redis, "other")
    one.tick(fresh=True)
    other.tick(released=range(8), consumed=range(8), fresh=True)
    assert len(one.tick().owned) == 8


def test_an_emptied_store_gives_everybody_his_own_first(redis: "Redis") -> None:
    one, other = store(redis, "one"), store(redis, "other")
    redis.flushall()
    # It has 0 to 3 and would be entitled to all, as long as nobody else has come back.
    assert one.tick(consumed=range(4)).owned == set(range(4))
    assert other.tick(consumed=range(4, 8)).owned == set(range(4, 8))
