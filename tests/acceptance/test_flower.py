"""Flower as people see it, in headless Chromium; and ad-hoc jobs through its API."""

import base64
import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from config.queues import shard_of, shard_queue
from tasks.app import TidemarkApp
from tests.acceptance.conftest import Log, Programs
from tests.acceptance.nodes import Worker
from tests.acceptance.producers import commit_one
from tests.demo.programs import ROOT, free_port
from tests.support import wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
USER, PASSWORD = "somebody", "correct horse"
SCREENSHOTS = ROOT / "build" / "screenshots"

pytestmark = [
    pytest.mark.browser,
    # Playwright's own loop and pipes are closed when they are collected.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@dataclass(frozen=True, kw_only=True)
class Flower:
    """A running Flower, and how to talk to its API."""

    url: str

    def request(self, path: str, body: Any = None, *, password: str | None = PASSWORD) -> Any:
        request = urllib.request.Request(f"{self.url}{path}", data=None if body is None else json.dumps(body).encode())
        if password is not None:
            login = base64.b64encode(f"{USER}:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.loads(response.read() or b"null")

    def status(self, path: str, *, password: str | None) -> int:
        try:
            with urllib.request.urlopen(self._plain(path, password), timeout=20) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    def _plain(self, path: str, password: str | None) -> urllib.request.Request:
        request = urllib.request.Request(f"{self.url}{path}")
        if password is not None:
            login = base64.b64encode(f"{USER}:{password}".encode()).decode()
            request.add_header("Authorization", f"Basic {login}")
        return request


@pytest.fixture
def worker(start: Programs) -> Worker:
    return start.worker()


@pytest.fixture
def flower(start: Programs, tmp_path: Path) -> Flower:
    port = free_port()
    login = {"TIDEMARK_FLOWER_AUTH": f"{USER}:{PASSWORD}", "TIDEMARK_DATA_DIR": str(tmp_path)}
    process = start.celery("flower", "flower", f"--port={port}", env=login)
    flower = Flower(url=f"http://127.0.0.1:{port}")

    def flower_answers() -> bool:
        assert process.running, process.output()
        try:
            return flower.request("/api/tasks") is not None
        except (urllib.error.URLError, ConnectionError):
            return False

    wait_until(flower_answers, timeout=60, interval=0.2)
    return flower


@pytest.fixture
def page(flower: Flower) -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright  # noqa: PLC0415 - only with a browser

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(
            http_credentials={"username": USER, "password": PASSWORD}, viewport={"width": 1280, "height": 800}
        )
        page = context.new_page()
        page.set_default_timeout(30_000)
        yield page
        browser.close()


def shot(page: Any, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


def test_nobody_gets_in_without_the_password(flower: Flower) -> None:
    for path in ("/", "/workers", "/tasks", "/api/tasks", "/api/workers"):
        assert flower.status(path, password=None) == 401
        assert flower.status(path, password="wrong") == 401
        assert flower.status(path, password=PASSWORD) == 200


def knows(flower: Flower, worker: Worker) -> bool:
    """Flower lists the worker, and hears of its tasks: it asks for their events some time after it lists it."""
    flower.request("/api/task/async-apply/tasks.fan_out", {"args": []})
    tasks = flower.request("/api/tasks?state=SUCCESS")
    return worker.hostname() in flower.request("/api/workers?refresh=1") and bool(tasks)


def test_the_pages_read_well(flower: Flower, worker: Worker, page: Any, app: TidemarkApp, log: Log) -> None:
    """Materialize tasks by name of topic and partitions, with their metrics; a worker with its queues."""

    def flower_knows_the_worker() -> bool:
        return knows(flower, worker)

    wait_until(flower_knows_the_worker, timeout=60, interval=0.5)
    for n in range(3):
        commit_one(log.conn, log.ledger, f"bucket/{n}", log.partitions)
    started = flower.request("/api/task/async-apply/tasks.materialize_topic", {"args": ["orders"]})
    assert started["task-id"]
    log.wait_until_drained()
    log.check()
    shards = {shard_of(partition, app.settings.shards) for partition in log.partitions}

    def flower_has_seen_all_of_them() -> list[dict[str, Any]]:
        tasks = [
            task
            for task in flower.request("/api/tasks?taskname=tasks.materialize").values()
            if task["state"] == "SUCCESS"
        ]
        return tasks if len(tasks) == len(shards) else []

    tasks = wait_until(flower_has_seen_all_of_them, timeout=60, interval=0.2)
    assert all(task["args"].startswith("(orders/") for task in tasks)
    assert all("'events_processed': 6" in task["result"] for task in tasks)

    page.goto(f"{flower.url}/tasks")
    page.wait_for_selector("#tasks-table tbody tr td a")
    rows = page.locator("#tasks-table tbody tr", has_text="materialize (orders/")
    text = "\n".join(rows.all_inner_texts())
    shot(page, "flower-tasks")
    assert "orders/" in text
    assert "6 events, 18 records" in text
    assert "SUCCESS" in text
    assert all(page.locator("#tasks-table tbody tr td a[href*='/task/']").all()), "the id leads to a task's page"
    right = page.locator("#tasks-table thead th", has_text="Runtime").first.bounding_box()
    assert right["x"] + right["width"] < 1100, "no column falls off, and there is room for the result"

    page.goto(f"{flower.url}/task/{tasks[0]['uuid']}")
    page.wait_for_selector("text=tasks.materialize")
    details = page.inner_text("body")
    shot(page, "flower-task")
    assert "orders/" in details
    assert "lock wait" in details

    page.goto(f"{flower.url}/workers")
    page.wait_for_selector(f"text={worker.hostname()}")
    shot(page, "flower-workers")

    page.goto(f"{flower.url}/worker/{worker.hostname()}")
    page.wait_for_selector("text=Queues")
    page.click("text=Queues")
    page.wait_for_selector("#tab-queues >> text=materialize.0")
    queues = page.inner_text("#tab-queues")
    # The tab fades in.
    page.wait_for_timeout(600)
    shot(page, "flower-worker-queues")
    for queue in (*map(shard_queue, range(app.settings.shards)), "control", "maintenance"):
        assert queue in queues


def test_a_failed_task_says_why(flower: Flower, worker: Worker, page: Any) -> None:
    """In the list, beside what it was asked."""

    def flower_knows_the_worker() -> bool:
        return knows(flower, worker)

    wait_until(flower_knows_the_worker, timeout=60, interval=0.5)
    failed = flower.request("/api/task/async-apply/tasks.materialize_topic", {"args": ["nosuch"]})["task-id"]

    def the_failure_is_known() -> bool:
        found = flower.request("/api/tasks").get(failed, {})
        return bool(found.get("state") == "FAILURE")

    wait_until(the_failure_is_known, timeout=20, interval=0.2)
    page.goto(f"{flower.url}/tasks")
    page.wait_for_selector(f"#tasks-table tbody tr:has(a[href*='{failed}'])")
    row = page.locator(f"#tasks-table tbody tr:has(a[href*='{failed}'])").inner_text()
    shot(page, "flower-failed-task")
    assert "UnknownTopicError" in row
    assert "nosuch" in row


def test_a_job_lands_on_the_queues_of_its_shards(flower: Flower, start: Programs, app: TidemarkApp, log: Log) -> None:
    """A worker resolves the topic's name; no worker serves a shard yet, so the tasks can be looked at."""
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    start.worker("-Q", "control")
    flower.request("/api/task/async-apply/tasks.materialize_topic", {"args": ["orders"]})
    flower.request("/api/task/async-apply/tasks.materialize", {"kwargs": {"partition_ids": log.partitions[:1]}})
    asked = shard_of(log.partitions[0], app.settings.shards)

    def the_queues() -> dict[int, int]:
        assert app.redis
        return {shard: int(app.redis.llen(shard_queue(shard))) for shard in range(app.settings.shards)}

    def every_shard_has_its_task() -> bool:
        return the_queues() == {shard: 2 if shard == asked else 1 for shard in range(app.settings.shards)}

    wait_until(every_shard_has_its_task)
    start.worker()
    log.wait_until_drained()
    log.check()


def test_a_job_by_ids_for_two_shards_is_refused(flower: Flower, log: Log) -> None:
    """The router looks at the arguments, whoever publishes."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        flower.request("/api/task/async-apply/tasks.materialize", {"args": [log.partitions[:2]]})
    refused.value.close()
    assert refused.value.code >= 400
