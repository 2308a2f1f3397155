"""Logs: one JSON object a line, with what one searches for."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from celery import signals

from config.settings import Settings
from db.materialize import MaterializationMetrics
from tasks import logs
from tasks.app import TidemarkApp
from tasks.materialization import describe

log = logging.getLogger("tests.logs")


@pytest.fixture
def restored() -> Iterator[None]:
    """The root logger is pytest's; it gets it back."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in logs._CHATTER}
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    structlog.contextvars.clear_contextvars()


def lines(file: Path) -> list[str]:
    return file.read_text("utf-8").splitlines()


@pytest.fixture
def json_file(restored: None, tmp_path: Path) -> Path:
    file = tmp_path / "log"
    logs.configure(Settings(log_format="json"), level="INFO", file=str(file))
    return file


def only(file: Path) -> dict[str, Any]:
    (line,) = lines(file)
    event: dict[str, Any] = json.loads(line)
    return event


def test_an_event_is_a_json_object_on_a_line(json_file: Path) -> None:
    log.info("two\nlines of %s", "text", extra={"path": json_file, "count": 3})
    event = only(json_file)
    assert event["event"] == "two\nlines of text"
    assert (event["level"], event["logger"], event["count"], event["path"]) == ("info", "tests.logs", 3, str(json_file))
    assert event["timestamp"].endswith("Z")
    assert not any(name.startswith("_") for name in event)


def test_an_exception_stays_on_the_line(json_file: Path) -> None:
    try:
        raise ValueError("first\nsecond")  # noqa: TRY301
    except ValueError:
        log.exception("it failed", extra={"stage": "place"})
    event = only(json_file)
    (error,) = event["exception"]
    assert (event["event"], event["stage"], error["exc_type"], error["exc_value"]) == (
        "it failed",
        "place",
        "ValueError",
        "first\nsecond",
    )
    assert error["frames"][-1]["filename"] == __file__


def test_a_materialization_names_topic_partitions_shard_and_task(json_file: Path) -> None:
    app = TidemarkApp("logged", set_as_current=False)
    app.settings = Settings(shards=4)
    app.names._known = {6: ("orders", 1), 10: ("orders", 2), 14: ("payments", 0)}
    # Importing `tasks` has connected the signals.
    task = SimpleNamespace(name="tasks.materialize", app=app)
    signals.task_prerun.send(sender=app, task_id="the-task", task=task)
    describe(app, [6, 10, 14], MaterializationMetrics(events_processed=5, records=9, transactions=1))
    signals.task_postrun.send(sender=app, task_id="the-task", task=task)
    log.info("later")
    during, after = map(json.loads, lines(json_file))
    assert (during["task"], during["task_id"]) == ("tasks.materialize", "the-task")
    assert (during["partitions"], during["shard"]) == ("orders/1-2 payments/0", 2)
    assert (during["events"], during["records"]) == (5, 9)
    assert not {"task", "task_id"} & after.keys()
    app.close()


def test_what_was_not_done_is_not_said(json_file: Path) -> None:
    app = TidemarkApp("logged", set_as_current=False)
    app.settings = Settings()
    describe(app, [1], MaterializationMetrics())
    assert lines(json_file) == []
    app.close()


def test_celery_says_less(json_file: Path) -> None:
    for name in ("celery.worker.strategy", "celery.app.trace", "celery.beat"):
        logging.getLogger(name).info("Task received")
        logging.getLogger(name).warning("something is wrong")
    assert [json.loads(line)["event"] for line in lines(json_file)] == ["something is wrong"] * 3


def test_for_people(restored: None, tmp_path: Path) -> None:
    file = tmp_path / "log"
    logs.configure(Settings(log_format="console"), level="WARNING", file=str(file))
    log.info("below the level")
    log.warning("lock is held", extra={"partitions": "orders/1", "ms": 12.5})
    (line,) = lines(file)
    assert "\x1b" not in line, "no colour in a file"
    assert "lock is held" in line
    assert "partitions=orders/1" in line
    assert "ms=12.5" in line
