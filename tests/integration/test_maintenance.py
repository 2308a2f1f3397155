"""The maintenance tasks: what one turn does, and what it leaves for the next."""

import logging
from typing import Any

import pytest
from psycopg import Connection

from db.commit import commit_object
from db.materialize import materialize
from db.topics import set_retention
from tasks.app import TidemarkApp
from tasks.maintenance import audit, retain
from tests.integration.conftest import MakeApp, make_topic


@pytest.fixture
def app(make_app: MakeApp) -> TidemarkApp:
    return make_app(broker_url="redis://127.0.0.1:1/0", delete_batch=2)


@pytest.fixture
def ids(conn: Connection[Any]) -> list[int]:
    """A topic of four partitions with five old batches in each, all materialized."""
    ids = make_topic(conn, partitions=4)
    for number in range(5):
        commit_object(conn, f"object-{number}", ids, [10] * 4, [0] * 4, [100] * 4, [1_000 + number] * 4)
    materialize(conn, ids)
    return ids


def count(conn: Connection[Any], table: str) -> int:
    row = conn.execute(f"select count(*) from tidemark.{table}".encode()).fetchone()
    assert row is not None
    return int(row[0])


def test_a_turn_that_is_over_leaves_the_rest_to_the_next(
    app: TidemarkApp, conn: Connection[Any], ids: list[int]
) -> None:
    set_retention(conn, "orders", retention_ms=60_000, retention_bytes=None)
    app.settings = app.settings.model_copy(update={"maintenance_seconds": 0.0})
    turns = [retain(app)["deleted"] for _ in range(40)]

    assert 0 < turns[0] < 20
    assert sum(turns) == 20
    assert count(conn, "record_batch_events") == 0


def test_one_turn_applies_the_limits_of_every_topic(app: TidemarkApp, conn: Connection[Any], ids: list[int]) -> None:
    nothing = {"deleted": 0, "log_bytes": 0, "objects_freed": 0, "producers_expired": 0}
    assert retain(app) == nothing
    set_retention(conn, "orders", retention_ms=60_000, retention_bytes=None)

    assert retain(app) == nothing | {"deleted": 20, "log_bytes": 2_000, "objects_freed": 5}
    assert count(conn, "record_batches") == 0


def test_an_audit_reports_what_is_broken_and_logs_it(
    app: TidemarkApp, conn: Connection[Any], ids: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    sound = audit(app)
    assert (sound["partitions"], sound["batches"], sound["violations"], sound["complete"]) == (4, 20, 0, True)

    conn.execute("update tidemark.runs set end_offset = end_offset + 1 where partition_id = %s", (ids[2],))
    with caplog.at_level(logging.ERROR):
        broken = audit(app)

    assert broken["violations"] >= 1
    assert broken["first"]
    assert "invariant broken" in caplog.text
