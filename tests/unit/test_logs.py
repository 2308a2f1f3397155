"""Logs: one JSON object a line, with what one searches for."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from psycopg import OperationalError

from config.errors import TransientDatabaseError
from config.settings import Settings
from db.materialize import MaterializationMetrics
from tasks import logs
from tasks.app import TidemarkApp
from tasks.drain import DrainLog
from tasks.jobs import Job
from tasks.names import PartitionNames

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
    assert event["event"] == "two lines of text"
    assert (event["level"], event["logger"], event["count"], event["path"]) == ("info", "tests.logs", 3, str(json_file))
    assert event["timestamp"].endswith("Z")
    assert not any(name.startswith("_") for name in event)


def raised(error: Exception) -> None:
    password = "s3cr3t-local"  # noqa: F841 - what a traceback with variables would show
    raise error


def test_an_exception_is_its_type_message_and_place_on_one_line(json_file: Path) -> None:
    try:
        raised(ValueError("first\nsecond"))
    except ValueError:
        log.exception("it failed", extra={"stage": "place"})
    event = only(json_file)
    assert (event["event"], event["stage"], event["error"]) == ("it failed", "place", "ValueError: first second")
    places = event["raised_at"].split(" > ")
    assert [place.split(" ")[1] for place in places] == [
        "test_an_exception_is_its_type_message_and_place_on_one_line",
        "raised",
    ]
    assert all(place.startswith("unit/test_logs.py:") for place in places)
    assert "s3cr3t" not in json_file.read_text("utf-8")


@pytest.mark.parametrize("error", [TransientDatabaseError("Postgres is away"), OperationalError("refused")])
def test_what_an_outage_caused_needs_no_place(error: Exception, json_file: Path) -> None:
    try:
        raised(error)
    except type(error):
        log.exception("it failed")
    assert "raised_at" not in only(json_file)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_password_is_logged_whoever_passes_it(log_format: str, restored: None, tmp_path: Path) -> None:
    """Those of the servers wherever they stand, and every URL's."""
    file = tmp_path / "log"
    app = TidemarkApp("logged")
    app.settings = Settings(
        database_url="postgresql://me:pgS3CR3T@db/tidemark?ssl_mode=require",
        broker_url="redis://:re%2FdisS3CR3T@redis:6379/0",
        flower_auth="me:flowerS3CR3T",
    )
    settings = Settings.model_validate({"log_format": log_format})
    logs.configure(settings, level="INFO", file=str(file), secrets=logs.secrets_of(app))
    log.warning("pgS3CR3T re/disS3CR3T flowerS3CR3T", extra={"kwargs": {"password": "pgS3CR3T"}})
    log.warning("connecting to %s", "amqp://other:otherS3CR3T@host//")
    try:
        raised(ValueError("invalid dsn: postgresql://me:pgS3CR3T@db/tidemark"))
    except ValueError:
        log.exception("failed")
    assert len(lines(file)) == 3
    assert "S3CR3T" not in file.read_text("utf-8")
    app.close()


def test_a_file_that_logrotate_moved_is_opened_again(json_file: Path) -> None:
    log.info("before")
    json_file.rename(json_file.with_suffix(".1"))
    log.info("after")
    assert only(json_file)["event"] == "after"


def test_a_job_names_its_task_topics_partitions_and_shard(json_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = TidemarkApp("logged")
    app.settings = Settings(shards=4, broker_url="amqp://nobody")
    app.once(PartitionNames)._known.update({6: ("orders", 1), 10: ("orders", 2), 14: ("payments", 0)})
    done = MaterializationMetrics(events_processed=5, records=9, transactions=1)

    @app.task(base=Job, name="tasks.some", shared=False)
    def some() -> None:
        DrainLog(app).finished([6, 10, 14], done)

    some.apply(task_id="the-task")
    log.info("later")
    during, after = (e for e in map(json.loads, lines(json_file)) if e["logger"] in {"tasks.drain", "tests.logs"})
    assert (during["task"], during["task_id"]) == ("tasks.some", "the-task")
    assert (during["partitions"], during["shard"]) == ("orders/1-2 payments/0", 2)
    assert (during["events"], during["records"]) == (5, 9)
    assert not {"task", "task_id"} & after.keys()
    app.close()


def test_what_was_not_done_is_not_said(json_file: Path) -> None:
    app = TidemarkApp("logged")
    app.settings = Settings()
    DrainLog(app).finished([1], MaterializationMetrics())
    assert lines(json_file) == []
    app.close()


def test_debug_shows_the_life_of_tasks(restored: None, tmp_path: Path) -> None:
    file = tmp_path / "log"
    logs.configure(Settings(log_format="json"), level="DEBUG", file=str(file))
    logging.getLogger("celery.app.trace").info("Task succeeded")
    assert [json.loads(line)["event"] for line in lines(file)] == ["Task succeeded"]


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
