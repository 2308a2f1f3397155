"""The pipeline end to end, through the real programs: commit, beat, fan-out, materialize, fetch; and jobs by hand."""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields

import pytest
from celery.exceptions import TimeoutError as ResultTimeoutError
from pytest_celery import CeleryTestSetup

from config.errors import UnknownPartitionError, UnknownTopicError
from db.fetch import fetch_batches
from db.materialize import MaterializationMetrics
from tasks.app import TidemarkApp
from tasks.dispatch import enqueue
from tests.acceptance.conftest import Log, Programs
from tests.acceptance.producers import Producers, commit_one
from tests.support import wait_until


def fetched(log: Log, partition_id: int) -> list[tuple[int, str]]:
    return [(b.start_offset, b.object_key) for b in fetch_batches(log.conn, partition_id, 0)]


def test_commits_become_visible_without_anybody_asking(
    celery_setup: CeleryTestSetup, start: Programs, log: Log, produce: Callable[..., Producers]
) -> None:
    """Commit → beat → fan-out → materialize → fetch, under concurrent producers; then the history check."""
    start.beat()
    commit_one(log.conn, log.ledger, "bucket/first", [log.partitions[0]])
    first = log.partitions[0]

    def the_first_commit_is_visible() -> bool:
        return fetched(log, first) == [(0, "bucket/first")]

    wait_until(the_first_commit_is_visible)
    producers = produce()

    def many_batches_are_committed() -> bool:
        return len(log.ledger.sent) > 400

    wait_until(many_batches_are_committed)
    producers.stop()
    log.wait_until_drained()
    assert log.check() == len(log.ledger.sent)


@pytest.fixture
def three_commits(log: Log) -> Iterator[list[int]]:
    """Objects in the first three partitions; no beat runs, so only a job can materialize them."""
    for n in range(3):
        commit_one(log.conn, log.ledger, f"bucket/{n}", log.partitions[:3])
    yield log.partitions[:3]
    log.check()


def metrics_of(result: dict[str, object]) -> tuple[object, object]:
    names = {f.name for f in fields(MaterializationMetrics)} - {
        "backlog_partition_ids",
        "busy_partition_ids",
        "stuck_partition_ids",
        "moved",
    }
    assert names <= result.keys()
    return result["events_processed"], result["records"]


def test_ad_hoc_jobs(
    celery_setup: CeleryTestSetup, app: TidemarkApp, start: Programs, log: Log, three_commits: list[int]
) -> None:
    """One worker, every way to ask for a materialization: each does exactly its part."""
    ids = enqueue(app, "orders", 1, ignore_result=False)
    done = [app.AsyncResult(i).get(timeout=20) for i in ids]
    assert [metrics_of(d) for d in done] == [(3, 9)]
    assert log.backlog() == 6

    # By task, as Flower's API or another program would send it: the task resolves the names in the worker.
    published = app.send_task("tasks.materialize_partition", ("orders", 0), ignore_result=False)
    assert len(published.get(timeout=20)) == 1

    def partition_0_is_done() -> bool:
        return log.backlog() == 3

    wait_until(partition_0_is_done)

    waited = start.run("materialize", "orders", "--wait", "--timeout", "20", "--json")
    assert (waited.returncode, waited.stderr) == (0, "")
    report = json.loads(waited.stdout)
    assert (report["events"], report["records"]) == (3, 9)
    assert sum(int(str(metrics_of(m)[0])) for m in report["metrics"]) == 3
    assert len(report["tasks"]) == 4, "eight partitions on four shards are four tasks"
    assert log.backlog() == 0

    commit_one(log.conn, log.ledger, "bucket/again", three_commits)
    called = start.run("call", "tasks.materialize_topic", "--args", '["orders"]')
    assert called.returncode == 0, called.stderr
    log.wait_until_drained()

    failing = app.send_task("tasks.materialize_topic", ("nosuch",), ignore_result=False)
    with pytest.raises(UnknownTopicError, match="nosuch"):
        failing.get(timeout=20)


def test_a_job_for_a_topic_that_does_not_exist(app: TidemarkApp, start: Programs, log: Log) -> None:
    for arguments, words in (
        (("nosuch",), "nosuch"),
        (("orders", "-p", "8"), "has no partition 8; it has partitions 0 to 7"),
    ):
        failed = start.run("materialize", *arguments)
        assert failed.returncode == 1, failed
        assert words in failed.stderr
        assert "Traceback" not in failed.stderr
    with pytest.raises(UnknownTopicError, match="nosuch"):
        enqueue(app, "nosuch", None)
    with pytest.raises(UnknownPartitionError, match="no partition -1"):
        enqueue(app, "orders", -1)


def test_waiting_without_a_worker_says_so(start: Programs, log: Log, app: TidemarkApp) -> None:
    commit_one(log.conn, log.ledger, "bucket/1", [log.partitions[0]])
    late = start.run("materialize", "orders", "-p", "0", "--wait", "--timeout", "0.5")
    assert late.returncode == 1
    assert "is a worker running" in late.stderr
    with pytest.raises(ResultTimeoutError):
        app.AsyncResult("nobody-has-this-id").get(timeout=0.1)
