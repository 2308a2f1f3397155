"""Commits through Python wake their partitions; the commit stands whatever becomes of that."""

import time

import pytest

from config.embedded.redis import RedisServer
from config.errors import InvalidCommitError
from tasks.app import TidemarkApp
from tasks.wake import commit_and_wake, wake
from tests.acceptance.conftest import Log, Place, Programs, make_app
from tests.acceptance.producers import commit_one


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
    assert wake(app, log.partitions) == 4, "eight partitions on four shards are four tasks"
    assert wake(app, log.partitions) == 0
    assert app.redis is not None
    assert [app.redis.llen(f"materialize.{shard}") for shard in range(4)] == [1, 1, 1, 1]
    commit(app, log, "bucket/2", log.partitions[0])
    assert app.redis.llen("materialize.0") + app.redis.llen("materialize.1") == 2


def test_inside_a_transaction_nothing_is_committed(app: TidemarkApp, log: Log) -> None:
    with log.conn.transaction(), pytest.raises(InvalidCommitError, match="outside a transaction"):
        commit(app, log, "bucket/1", log.partitions[0])
    assert log.backlog() == 0


def test_a_broker_that_is_away_fails_no_commit(
    place: Place, log: Log, crashable_redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The first commit finds out, quickly; the next ones do not even try for a while. Then it works again."""
    lonely = make_app(Place(database_url=place.database_url, broker_url=crashable_redis.url, directory=place.directory))
    crashable_redis.kill()
    began = time.monotonic()
    for number in range(20):
        commit(lonely, log, f"bucket/{number}", log.partitions[0])
    assert time.monotonic() - began < 3
    assert log.backlog() == 20
    assert caplog.text.count("waking 1 partitions failed") == 1
    crashable_redis.restart()
    lonely.waker._silent_until = 0
    assert wake(lonely, [log.partitions[0]]) == 1
    assert lonely.redis is not None
    lonely.redis.close()
    lonely.close()
