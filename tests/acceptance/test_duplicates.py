"""Everything that makes messages run twice or not at all: the log holds every commit once, in order, all the same."""

import itertools
import signal
import time
from collections.abc import Callable

import psycopg
from redis import Redis

from config.redis import is_redis
from db.discover import find_committed
from tasks.app import TidemarkApp
from tests.acceptance.conftest import Log, Programs
from tests.acceptance.producers import Producers, commit_one
from tests.support import wait_until


def test_two_workers_on_the_same_shards_with_doubled_and_lost_messages(
    start: Programs, app: TidemarkApp, log: Log, produce: Callable[..., Producers]
) -> None:
    """Two consumers per queue, every task published again and again, and Redis emptied three times in between."""
    first, second = (start.worker("-Q", "materialize.0,materialize.1", wait=False) for _ in range(2))
    # What two shards lack has one worker more, which also does the rest.
    third = start.worker("-c", "2", "-Q", "materialize.2,materialize.3,control,maintenance", wait=False)
    start.ready(first, second, third)
    start.beat()
    producers = produce(rate=40)
    flushes = 0
    with Redis.from_url(start.place.redis_url or start.place.broker_url) as redis:
        began = time.monotonic()
        for turn in itertools.count():
            for partition in log.partitions:
                app.send_task("tasks.materialize", kwargs={"partition_ids": [partition]})
            if turn % 20 == 10:
                redis.flushall()
                flushes += 1
            if flushes >= 3 and time.monotonic() > began + 5 and len(log.ledger.sent) > 1000:
                break
            time.sleep(0.02)
        producers.stop()
        # And once more when nobody commits any more: what was dispatched and is lost now only a sweep can find.
        redis.flushall()
    log.wait_until_drained()
    assert log.check() == len(log.ledger.sent)
    for worker in (first, second, third):
        assert worker.process.running
    if is_redis(start.place.broker_url):
        # RabbitMQ would not let both.
        assert all(start.stats(worker)["tasks.materialize"] for worker in (first, second))


def test_a_lost_message_is_found_by_the_sweep(start: Programs, app: TidemarkApp, log: Log) -> None:
    """The fan-out has dispatched the commit and will not look at it again; its message and token are gone."""
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    first = start.worker("-Q", "control")
    app.send_task("tasks.fan_out")

    with Redis.from_url(start.place.broker_url) as redis:

        def the_fan_out_has_published() -> bool:
            return bool(redis.llen("materialize.0"))

        wait_until(the_fan_out_has_published)

        def the_fan_out_has_saved_what_it_saw() -> bool:
            with app.database.connection() as conn:
                return find_committed(conn).commits == 0

        wait_until(the_fan_out_has_saved_what_it_saw)
        redis.flushall()
    first.process.kill()
    start.worker()
    start.beat()
    log.wait_until_drained()
    log.check()


def test_kill_9_in_mid_task(start: Programs, app: TidemarkApp, log: Log) -> None:
    """A worker and its child die with a transaction half done and the message unacknowledged."""
    worker = start.worker()
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    slow = log.partitions[0]
    # The first statement of the task waits until it is killed; what it did before is rolled back.
    with psycopg.connect(log.url) as holder:
        holder.execute("lock table tidemark.runs in exclusive mode")
        app.send_task("tasks.materialize", kwargs={"partition_ids": [slow]})

        def the_task_is_about_to_place_batches() -> bool:
            row = log.conn.execute(
                "select count(*) from pg_locks where not granted and relation = 'tidemark.runs'::regclass"
            ).fetchone()
            return row == (1,)

        wait_until(the_task_is_about_to_place_batches)
        worker.process.kill()
    assert worker.process.returncode == -signal.SIGKILL
    assert log.backlog() == len(log.partitions)
    start.worker()
    start.beat()
    log.wait_until_drained()
    assert log.check() == len(log.ledger.sent)
