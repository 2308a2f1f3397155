"""Health of real programs: alive and ready, through an outage of the broker; not alive when the main loop hangs."""

import time
from pathlib import Path

import pytest

from config.heartbeat import INTERVAL, examine
from tasks.app import TidemarkApp
from tests.acceptance.conftest import Log, Place, Programs
from tests.acceptance.producers import commit_one
from tests.servers import RedisServer
from tests.support import wait_until

# A beat is this old at most, on a machine that is busy with other things as well.
FRESH = INTERVAL + 2.5


@pytest.fixture
def place(database_url: str, crashable_redis: RedisServer, tmp_path: Path) -> Place:
    return Place(
        database_url=database_url,
        broker_url=crashable_redis.url,
        directory=tmp_path,
        settings={"TIDEMARK_DATA_DIR": str(tmp_path)},
    )


def age(file: Path) -> float:
    return time.time() - file.stat().st_mtime


def ready(file: Path) -> bool:
    return file.exists() and examine(file).ready


def test_a_broker_outage_kills_nobody(
    start: Programs, place: Place, crashable_redis: RedisServer, tmp_path: Path
) -> None:
    """Worker, solo worker, beat and exporter; one more of each kind starts during the outage."""
    files = {name: tmp_path / f"{name}.sign" for name in ("prefork", "solo", "beat", "late", "late_beat")}

    def env(name: str) -> dict[str, str]:
        return {"TIDEMARK_HEARTBEAT_FILE": str(files[name])}

    start.worker(env=env("prefork"), wait=False)
    start.worker("-P", "solo", env=env("solo"), wait=False)
    start.celery("beat", "beat", env=env("beat"))
    exporter = start.celery("exporter", "exporter", "--port", "0")
    files["exporter"] = tmp_path / "exporter.heartbeat"

    def all_are_ready() -> bool:
        return all(ready(files[name]) for name in ("prefork", "solo", "beat", "exporter"))

    wait_until(all_are_ready, timeout=60)
    crashable_redis.kill()
    start.worker(env=env("late"), wait=False)
    start.celery("late_beat", "beat", env=env("late_beat"))

    def the_late_ones_live() -> bool:
        return files["late"].exists() and files["late_beat"].exists()

    wait_until(the_late_ones_live, timeout=60)
    until = time.monotonic() + 2 * FRESH
    while time.monotonic() < until:
        assert all(examine(file).alive for file in files.values())
        time.sleep(0.2)
    assert not ready(files["late"])
    assert exporter.running
    crashable_redis.restart()

    def the_late_ones_are_ready() -> bool:
        return ready(files["late"]) and ready(files["late_beat"])

    wait_until(the_late_ones_are_ready, timeout=60)


def test_a_hung_main_loop_is_not_alive(start: Programs, app: TidemarkApp, log: Log, tmp_path: Path) -> None:
    file = tmp_path / "worker.heartbeat"
    worker = start.worker("-I", "tests.acceptance.hanging")

    def the_worker_is_ready() -> bool:
        return ready(file)

    wait_until(the_worker_is_ready)
    probe = start.run("health", "worker", "--ready")
    assert (probe.returncode, probe.stdout) == (0, "worker: ready\n")
    app.control.broadcast("hang", arguments={"seconds": 120})

    def it_is_silent() -> bool:
        return age(file) > 2 * INTERVAL + 1

    wait_until(it_is_silent, timeout=20)
    assert worker.process.running
    # As old as it will be in a minute.
    worker.process.kill()
    gone = start.run("health", "beat")
    assert gone.returncode == 1
    assert "beat.heartbeat is not there: it does not run" in gone.stderr
    assert "Traceback" not in gone.stderr


def test_a_busy_solo_worker_lives_and_leaves_no_sign(
    start: Programs, app: TidemarkApp, log: Log, tmp_path: Path
) -> None:
    """Its loop waits for a lock with the task; silence is expected, and its limit is above that."""
    file = tmp_path / "worker.heartbeat"
    worker = start.worker("-P", "solo")
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions[:1])
    with log.conn.transaction():
        log.conn.execute("select from tidemark.topic_partitions where id = %s for no key update", (log.partitions[0],))
        app.send_task("tasks.materialize", kwargs={"partition_ids": log.partitions[:1]})

        def it_is_silent() -> bool:
            return age(file) > INTERVAL + 1

        wait_until(it_is_silent, timeout=20)
        assert examine(file).ready
    log.wait_until_drained()
    worker.process.end()
    assert not file.exists()


def test_the_exporter_as_a_program(start: Programs, log: Log, tmp_path: Path) -> None:
    wrong = start.run("exporter", "--address", "256.0.0.1", "--port", "0")
    assert wrong.returncode == 1
    assert "Error: cannot listen on 256.0.0.1 port 0" in wrong.stderr
    assert "Traceback" not in wrong.stderr
