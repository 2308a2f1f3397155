"""A task with one bad partition: the others are served, and the bad one is reported by name."""

import logging
from time import monotonic
from typing import Any

import pytest
from psycopg import Connection, errors
from redis import Redis

from config.settings import BATCHINGS
from db.materialize import MaterializationMetrics, materialize
from tasks import exporter, metrics
from tasks.app import TidemarkApp
from tasks.drain import drain as drain_sides
from tasks.drain import together
from tasks.metrics import WorkerMetrics
from tests.integration.conftest import MakeApp, commit, make_topic
from tests.support import Connect

PARTITIONS = 40


def drain(app: TidemarkApp, ids: list[int]) -> MaterializationMetrics:
    return together(drain_sides(app, ids))


@pytest.fixture
def ids(conn: Connection[Any]) -> list[int]:
    return make_topic(conn, partitions=PARTITIONS)


@pytest.fixture(params=BATCHINGS)
def app(request: pytest.FixtureRequest, make_app: MakeApp) -> TidemarkApp:
    return make_app(lock_timeout=0.1, shards=1, batching=request.param)


def served(conn: Connection[Any]) -> list[int]:
    return [row[0] for row in conn.execute("select distinct partition_id from tidemark.runs order by 1").fetchall()]


def fill_up(conn: Connection[Any], partition_id: int) -> None:
    """A log that has room for nothing more."""
    materialize(conn, [partition_id])
    conn.execute("update tidemark.runs set end_offset = %s where partition_id = %s", (2**63 - 1, partition_id))


@pytest.mark.parametrize("bad", [0, 17, PARTITIONS - 1])
def test_a_partition_that_cannot_be_placed(
    bad: int, app: TidemarkApp, conn: Connection[Any], ids: list[int], redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    commit(conn, "before", ids)
    fill_up(conn, ids[bad])
    commit(conn, "after", ids)
    with caplog.at_level(logging.ERROR, logger="tasks"):
        done = drain(app, ids)

    assert served(conn) == ids
    assert done.events_processed == 2 * (PARTITIONS - 1)
    assert done.stuck_partition_ids == (ids[bad],)
    assert done.as_dict()["stuck_partitions"] == 1
    # Halved: two transactions for each power of two, not one for each partition.
    assert done.errors <= 7
    record = next(r for r in caplog.records if r.message == "partitions cannot be materialized")
    assert vars(record)["partitions"] == f"orders/{bad}"
    assert "out of range" in vars(record)["error"]
    app.once(WorkerMetrics).flush()
    with Redis.from_url(redis_url, decode_responses=True) as redis:
        assert list(metrics.read_stuck(redis, seconds=60)) == [f"orders/{bad}"]
        assert metrics.read_stuck(redis, seconds=-60) == {}
        stuck = next(m for m in exporter.worker_metrics(metrics.read(redis)) if m.name == "tidemark_materialize_stuck")
    assert [sample.value for sample in stuck.samples] == [1.0]


def test_partitions_that_somebody_has_locked(
    app: TidemarkApp, connect: Connect, conn: Connection[Any], ids: list[int]
) -> None:
    """One short wait in all, whatever their number; and none of the others waits for it."""
    commit(conn, "a", ids)
    holder = connect(autocommit=False)
    locked = [ids[0], ids[20], ids[21]]
    holder.execute("select from tidemark.topic_partitions where id = any(%s) for update", (locked,))
    began = monotonic()
    done = drain(app, ids)
    assert monotonic() - began < 5
    assert served(conn) == [i for i in ids if i not in locked]
    assert sorted(done.stuck_partition_ids) == locked
    assert done.errors == 1
    holder.rollback()
    assert drain(app, ids).events_processed == len(locked)


def test_a_partition_alone_fails_as_its_task(app: TidemarkApp, conn: Connection[Any], ids: list[int]) -> None:
    commit(conn, "before", ids[:1])
    fill_up(conn, ids[0])
    commit(conn, "after", ids[:1])
    with pytest.raises(errors.NumericValueOutOfRange):
        drain(app, ids[:1])


def test_where_nothing_works_it_is_not_tried_for_each(app: TidemarkApp, conn: Connection[Any], ids: list[int]) -> None:
    conn.execute("create function broken() returns trigger language plpgsql as $$ begin raise 'broken'; end $$")
    conn.execute("create trigger broken before insert on tidemark.runs for each row execute function broken()")
    commit(conn, "a", ids)
    with pytest.raises(errors.RaiseException):
        drain(app, ids)
    assert served(conn) == []
