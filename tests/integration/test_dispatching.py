"""Fan-out and sweep against a real broker: what is published, where to, and what a loss leaves behind."""

import json
from base64 import b64decode
from typing import Any

import kombu
import kombu.exceptions
import psycopg
import pytest
from psycopg import Connection
from redis import Redis

from config.queues import shard_queue
from db.discover import Pending
from tasks.app import TidemarkApp
from tasks.dispatch import dispatch, fan_out, hand_over, sweep
from tasks.drain import serve
from tasks.hints import QueuedTokens
from tests.integration.conftest import MakeApp, commit, make_topic
from tests.support import wait_until

SHARDS = 4


@pytest.fixture
def app(make_app: MakeApp) -> TidemarkApp:
    return make_app(shards=SHARDS)


@pytest.fixture
def ids(conn: Connection[Any]) -> list[int]:
    return make_topic(conn, partitions=8)


def messages_of(redis_url: str, *queues: str) -> list[dict[str, Any]]:
    """The keyword arguments and headers of the messages in these queues."""
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        raw = [json.loads(message) for queue in queues for message in redis.lrange(queue, 0, -1)]
    return [{**message["headers"], "kwargs": json.loads(b64decode(message["body"]))[1]} for message in raw]


def queued(redis_url: str) -> dict[str, list[dict[str, Any]]]:
    """Messages by queue: the keyword arguments and headers of each."""
    queues = [shard_queue(shard) for shard in range(SHARDS)]
    return {queue: found for queue in queues if (found := messages_of(redis_url, queue))}


def queued_ids(redis_url: str) -> list[int]:
    return sorted(i for ms in queued(redis_url).values() for m in ms for i in m["kwargs"]["partition_ids"])


def test_each_touched_partition_is_queued_on_its_shard_under_its_name(
    app: TidemarkApp, conn: Connection[Any], ids: list[int], redis_url: str
) -> None:
    commit(conn, "a", [ids[0], ids[4], ids[1], ids[0]])

    assert fan_out(app) == {"commits": 1, "partitions": 3, "tasks": 2}

    messages = queued(redis_url)
    assert {queue: [m["kwargs"]["partition_ids"] for m in ms] for queue, ms in messages.items()} == {
        f"materialize.{ids[0] % SHARDS}": [[ids[0], ids[4]]],
        f"materialize.{ids[1] % SHARDS}": [[ids[1]]],
    }
    assert sorted(m["argsrepr"] for ms in messages.values() for m in ms) == ["(orders/0,4)", "(orders/1)"]


def test_a_worker_takes_a_tick_next_and_starves_nobody(app: TidemarkApp) -> None:
    """Its control queue is never empty: the other queues are served in turn between the ticks."""
    taken: list[str] = []
    control, *shards = (app.amqp.queues[name] for name in ("control", shard_queue(0), shard_queue(1)))
    with app.connection_for_read() as connection, connection.channel() as channel:
        producer = kombu.Producer(channel)
        for queue in (control, control, control, control, *shards, *shards):
            producer.publish({}, exchange=queue.exchange, routing_key=queue.routing_key, declare=[queue])

        def take(body: object, message: kombu.Message) -> None:
            taken.append(message.delivery_info["routing_key"])
            message.ack()

        with kombu.Consumer(channel, [control, *shards], callbacks=[take], accept=["json"]) as consumer:
            consumer.qos(prefetch_count=1)
            while len(taken) < 8:
                connection.drain_events(timeout=5)
    assert taken == ["control", shard_queue(0), "control", shard_queue(1)] * 2


def test_commits_are_dispatched_once(app: TidemarkApp, conn: Connection[Any], ids: list[int], redis_url: str) -> None:
    commit(conn, "a", ids[:1])
    fan_out(app)

    assert fan_out(app) == {"commits": 0, "partitions": 0, "tasks": 0}
    assert queued_ids(redis_url) == ids[:1]


def test_a_queued_partition_is_not_queued_again_until_its_task_starts(
    app: TidemarkApp, conn: Connection[Any], ids: list[int], redis_url: str
) -> None:
    commit(conn, "a", ids[:1])
    fan_out(app)
    commit(conn, "b", ids[:2])
    fan_out(app)
    assert queued_ids(redis_url) == ids[:2]

    app.once(QueuedTokens).release(ids[:1])
    commit(conn, "c", ids[:2])
    fan_out(app)

    assert queued_ids(redis_url) == [ids[0], ids[0], ids[1]]


def test_a_token_that_outlived_its_task_expires(
    make_app: MakeApp, redis_url: str, conn: Connection[Any], ids: list[int]
) -> None:
    app = make_app(shards=SHARDS, queued_seconds=0.05)
    commit(conn, "a", ids[:1])
    fan_out(app)

    def queued_again() -> bool:
        sweep(app)
        return queued_ids(redis_url) == [ids[0], ids[0]]

    wait_until(queued_again)
    app.database.close()


def test_the_sweep_finds_what_a_flushed_redis_lost(
    app: TidemarkApp, conn: Connection[Any], ids: list[int], redis_url: str
) -> None:
    commit(conn, "a", ids)
    fan_out(app)
    with Redis.from_url(redis_url) as redis:
        redis.flushall()
    assert fan_out(app)["tasks"] == 0

    assert sweep(app) == {"partitions": 8, "tasks": SHARDS}
    assert queued_ids(redis_url) == ids


def test_a_broker_that_is_down_leaves_the_commits_to_be_found_again(
    make_app: MakeApp, redis_url: str, conn: Connection[Any], ids: list[int]
) -> None:
    commit(conn, "a", ids[:1])
    down = make_app(shards=SHARDS, broker_url="redis://127.0.0.1:1/0")
    down.conf.task_publish_retry = False
    with pytest.raises(kombu.exceptions.OperationalError):
        fan_out(down)
    down.database.close()

    up = make_app(shards=SHARDS)
    assert fan_out(up)["partitions"] == 1
    up.database.close()


def test_tokens_of_what_could_not_be_published_are_dropped(
    app: TidemarkApp, conn: Connection[Any], ids: list[int]
) -> None:
    conn.close()
    with pytest.raises(psycopg.OperationalError):
        # Fails at learning the partition's name, after its token is set.
        dispatch(app, conn, [Pending(partition_id=ids[0], events=1)])
    assert app.once(QueuedTokens).acquire(ids[:1]) == ids[:1]


def test_after_too_many_commits_the_sweep_takes_over(
    app: TidemarkApp, conn: Connection[Any], ids: list[int], redis_url: str
) -> None:
    for number in range(3):
        commit(conn, f"object-{number}", [ids[number]])

    assert fan_out(app, commits_at_most=2)["partitions"] == 3
    assert queued_ids(redis_url) == ids[:3]
    assert fan_out(app)["commits"] == 0


def test_a_task_of_fewer_shards_is_grouped_again(
    make_app: MakeApp, conn: Connection[Any], ids: list[int], redis_url: str
) -> None:
    """Published with 2 shards, taken by a worker with 4: queued once more, by its shards, whose tokens it keeps."""
    commit(conn, "a", ids)
    old = make_app(shards=2)
    fan_out(old)
    (group, _) = (m["kwargs"]["partition_ids"] for m in messages_of(redis_url, "materialize.0", "materialize.1"))
    new = make_app(shards=4)
    with Redis.from_url(redis_url) as redis:
        redis.delete("materialize.0", "materialize.1")
    done = serve(new, group)
    assert done["transactions"] == 0
    found = {queue: m["kwargs"]["partition_ids"] for queue, ms in queued(redis_url).items() for m in ms}
    shards = {i % 4 for i in group}
    assert found == {shard_queue(shard): [i for i in group if i % 4 == shard] for shard in shards}
    assert len(shards) == 2
    assert new.once(QueuedTokens).acquire(group) == []


def test_what_cannot_be_handed_over_may_be_queued_again(make_app: MakeApp, ids: list[int], redis_url: str) -> None:
    """The broker is away, the Redis with the tokens is not."""
    app = make_app(broker_url="redis://127.0.0.1:1/0", redis_url=redis_url)
    with pytest.raises(kombu.exceptions.OperationalError):
        hand_over(app, ids[:2])
    assert app.once(QueuedTokens).acquire(ids[:2]) == ids[:2]


def test_tokens_of_purged_messages_count_for_nothing_after_seconds(
    app: TidemarkApp, conn: Connection[Any], ids: list[int], redis_url: str
) -> None:
    commit(conn, "a", ids)
    fan_out(app)
    purged = shard_queue(ids[0] % SHARDS)
    with Redis.from_url(redis_url) as redis:
        redis.delete(purged)
        assert sweep(app)["tasks"] == 0, "a message may be on its way"
        for i in ids:
            redis.pexpire(f"tidemark:queued:{i}", 60_000 - 5_100)
    assert sweep(app)["tasks"] == 1
    assert queued_ids(redis_url) == ids
    (message,) = queued(redis_url)[purged]
    assert message["kwargs"]["partition_ids"] == [i for i in ids if shard_queue(i % SHARDS) == purged]
