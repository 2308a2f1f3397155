"""Workers without `-Q` share the shards out among themselves."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pytest_celery import CeleryBrokerCluster
from redis import Redis

from tasks.app import TidemarkApp
from tasks.hints import read_programs, redis_time
from tests.acceptance.conftest import Log, Place, Programs
from tests.acceptance.producers import Producers, commit_one
from tests.benchmarks.lease_timeline import SHARDS, Timeline, Watch, play, render
from tests.support import numbers_in, wait_until

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
    """What `inspect shards` answers by worker name, once that many workers do."""

    def all_workers_answer() -> dict[str, Any] | None:
        replies: dict[str, Any] = start.app.control.inspect(timeout=5, limit=workers)._request("shards") or {}
        return replies if len(replies) == workers else None

    return wait_until(all_workers_answer, timeout=60) or {}


def test_one_then_four_then_one_killed_and_one_stopped(start: Programs, place: Place, log: Log) -> None:
    """All shards are covered again within the lease time, and at once where a worker leaves in order."""
    timeline = Timeline()
    start.beat()
    watch = Watch(place.database_url, place.broker_url, timeline, lease=LEASE)
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
    assert sorted(s for reply in replies.values() for s in numbers_in(reply["shards"])) == list(range(SHARDS))
    assert all(reply["leasing"] and reply["store"] == "ok" for reply in replies.values())
    log.wait_until_drained()


def test_a_stopping_workers_shards_are_others_at_once(
    start: Programs, app: TidemarkApp, log: Log, place: Place
) -> None:
    """While its last task still runs: two consumers on a shard for a moment are slower, and never wrong."""
    first = start.worker()
    start.worker()
    with Redis.from_url(place.broker_url, decode_responses=True) as redis:

        def consumed() -> dict[str, list[int]]:
            return {e.name.split("@")[0]: list(e.consumes) for e in read_programs(redis, redis_time(redis)).values()}

        def both_have_their_half() -> dict[str, list[int]] | None:
            found = consumed()
            return found if sorted(map(len, found.values())) == [SHARDS // 2] * 2 else None

        halves = wait_until(both_have_their_half) or {}
        partition = next(p for p in log.partitions if p % SHARDS in halves["worker1"])
        with psycopg.connect(log.url) as holder:
            # A hundred events hold a task up by their placing alone, which nobody can lock: this one waits for a row.
            holder.execute("lock table tidemark.passes in access exclusive mode")
            commit_one(log.conn, log.ledger, "bucket/1", [partition])
            app.send_task("tasks.materialize", kwargs={"partition_ids": [partition]})

            def the_task_waits() -> bool:
                row = log.conn.execute(
                    "select count(*) from pg_stat_activity where wait_event_type = 'Lock' "
                    "and datname = current_database()"
                ).fetchone()
                return row == (1,)

            wait_until(the_task_waits)
            first.process.signal(signal.SIGTERM)

            def the_other_has_all() -> bool:
                return consumed() == {"worker2": list(range(SHARDS))}

            wait_until(the_other_has_all)
            assert first.process.running
            holder.rollback()
        assert first.process.wait() == 0
    log.wait_until_drained()
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
        shares = sorted(len(numbers_in(r["shards"])) for r in replies.values() if r["leasing"])
        return replies if shares == [SHARDS // 2, SHARDS // 2] else None

    before = wait_until(both_have_their_half, timeout=60) or {}
    assert [r["shards"] for r in before.values() if not r["leasing"]] == ["3"]
    producers = produce()
    with Redis.from_url(place.broker_url) as redis:
        redis.flushall()
    time.sleep(2)
    after = inspected(start, 3)
    assert {n: r["shards"] for n, r in after.items()} == {n: r["shards"] for n, r in before.items()}
    producers.stop()
    log.wait_until_drained()
    assert log.check() == len(log.ledger.sent)


def test_a_store_that_is_away_at_the_start(start: Programs, place: Place, log: Log) -> None:
    """Nobody can say who else is there, so after the lease's time a worker takes all shards."""
    start.beat()
    start.worker(env={"TIDEMARK_REDIS_URL": "redis://127.0.0.1:1/0"})
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    log.wait_until_drained(timeout=LEASE + 20)
    log.check()
