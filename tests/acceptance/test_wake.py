"""Commits through Python wake their partitions; the commit stands whatever becomes of that."""

import itertools
import time

import pytest

from config.errors import InvalidCommitError
from tasks.app import TidemarkApp
from tasks.dispatch import commit_and_wake, wake
from tasks.drain import serve
from tasks.hints import Background, Hints
from tasks.metrics import WorkerMetrics
from tests.acceptance.conftest import Log, Place, Programs, make_app
from tests.acceptance.producers import commit_one
from tests.servers import RedisServer
from tests.support import finish, frozen


def commit(app: TidemarkApp, log: Log, key: str, partition: int) -> int:
    return commit_and_wake(app, log.conn, key, [partition], [3], [0], [100], [1_700_000_000_000])


def test_a_commit_is_visible_without_beat(start: Programs, app: TidemarkApp, log: Log) -> None:
    start.worker()
    commit(app, log, "bucket/1", log.partitions[0])
    log.wait_until_drained()
    row = log.conn.execute(
        "select end_offset from tidemark.named_partitions where partition_id = %s", (log.partitions[0],)
    )
    assert row.fetchone() == (3,)


def test_partitions_that_wait_already_are_not_queued_again(app: TidemarkApp, log: Log) -> None:
    """No worker runs: one message for each partition, however often it is woken."""
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    assert app.redis is not None
    for _ in range(2):
        wake(app, log.partitions)
        finish(app.once(Background))
        queues = [app.redis.llen(f"materialize.{shard}") for shard in range(4)]
        assert queues == [1, 1, 1, 1], "eight partitions on four shards are four tasks"
    commit(app, log, "bucket/2", log.partitions[0])
    finish(app.once(Background))
    assert app.redis.llen("materialize.0") + app.redis.llen("materialize.1") == 2


def test_inside_a_transaction_nothing_is_committed(app: TidemarkApp, log: Log) -> None:
    with log.conn.transaction(), pytest.raises(InvalidCommitError, match="outside a transaction"):
        commit(app, log, "bucket/1", log.partitions[0])
    assert log.backlog() == 0


def test_a_broker_that_is_away_fails_no_commit(
    place: Place, log: Log, crashable_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The first wake-up finds out; for a while the next ones do not even try. Then it works again."""
    lonely = make_app(Place(database_url=place.database_url, broker_url=crashable_redis.url, directory=place.directory))
    crashable_redis.kill()
    for number in range(20):
        commit(lonely, log, f"bucket/{number}", log.partitions[0])
    background = lonely.once(Background)
    finish(background)
    assert log.backlog() == 20
    assert caplog.text.count("waking failed") == 1
    crashable_redis.restart()
    background._silent_until = 0
    lonely.once(Hints)._silent_until = 0
    wake(lonely, [log.partitions[0]])
    finish(background)
    assert lonely.redis is not None
    assert lonely.redis.llen(f"materialize.{log.partitions[0] % 4}") == 1
    lonely.redis.close()
    lonely.close()


def test_a_broker_that_hangs_holds_up_no_commit(place: Place, log: Log, crashable_redis: RedisServer) -> None:
    """The committing thread never talks to Redis."""
    app = make_app(Place(database_url=place.database_url, broker_url=crashable_redis.url, directory=place.directory))
    commit(app, log, "bucket/first", log.partitions[0])
    finish(app.once(Background))
    with frozen(crashable_redis.pid):
        longest = 0.0
        until = time.monotonic() + 4
        for number in itertools.count():
            began = time.monotonic()
            commit(app, log, f"bucket/{number}", log.partitions[0])
            longest = max(longest, time.monotonic() - began)
            if began > until:
                break
    assert number > 100
    # Fifty seconds and more where the committing thread talks to Redis; this machine is shared.
    assert longest < 1.5
    finish(app.once(Background))
    assert app.redis is not None
    app.redis.close()
    app.close()


def test_a_hung_redis_of_hints_costs_a_task_half_a_second(place: Place, log: Log, crashable_redis: RedisServer) -> None:
    """Tokens, metrics and leases share one Redis: it is asked once in a while, for half a second."""
    app = make_app(
        Place(
            database_url=place.database_url,
            broker_url=place.broker_url,
            redis_url=crashable_redis.url,
            directory=place.directory,
        )
    )
    serve(app, log.partitions[:1])
    with frozen(crashable_redis.pid):
        began = time.monotonic()
        for _ in range(4):
            serve(app, log.partitions[:1])
            app.once(WorkerMetrics).flush()
        took = time.monotonic() - began
    assert took < 2
    app.database.close()
    assert app.redis is not None
    app.redis.close()
    app.close()
