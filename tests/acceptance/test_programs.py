"""Workers and beat as one starts them: what they are called, what they say, and what they do to each other."""

import json
import socket

from redis import Redis

from tasks.app import TidemarkApp
from tests.acceptance.conftest import Log, Place, Programs
from tests.acceptance.producers import commit_one
from tests.demo.programs import celery_argv
from tests.support import wait_until


def test_names_and_first_words(start: Programs, app: TidemarkApp) -> None:
    """Celery's own name without `-n`, the banner with the queues to come, and a line when they are ready."""
    worker, beat = start.celery("worker", "worker"), start.celery("beat", "beat")

    def both_are_ready() -> bool:
        return "is ready" in worker.output() and "beat is ready" in beat.output()

    wait_until(both_are_ready, timeout=60)
    name = f"celery@{socket.gethostname()}"
    assert f"{name} is ready" in worker.output()
    assert list(app.control.inspect(timeout=5, limit=1).ping() or {}) == [name]
    banner = worker.output().partition("[tasks]")[0]
    assert ".> control " in banner
    assert "materialize.0 and up" in banner
    assert ".> materialize." not in banner
    shown = json.loads(start.run("status", "--json", "--interval", "0").stdout)
    assert {(p["program"], p["pid"]) for p in shown["programs"]} == {("worker", worker.pid), ("beat", beat.pid)}


def test_a_beat_whose_clock_is_an_hour_behind(start: Programs, log: Log) -> None:
    """Nothing that it schedules is taken for stale."""
    start.worker()
    start.process("beat", celery_argv("beat", "-l", "INFO", app="tests.acceptance.skewed"))
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    log.wait_until_drained()


def test_ticks_that_nobody_takes_do_not_pile_up(start: Programs, place: Place, log: Log) -> None:
    """Beat alone, for long: its queue stays short, and says so; then a worker goes on at once.

    The ticks come faster than any worker serves them: it takes the other queues in turn.
    """
    beat = start.process(
        "beat",
        celery_argv("beat", "-l", "INFO"),
        {"TIDEMARK_FAN_OUT_INTERVAL": "0.01", "TIDEMARK_SWEEP_INTERVAL": "60"},
    )
    with Redis.from_url(place.broker_url) as redis:

        def beat_has_stopped_adding() -> bool:
            return "nobody takes the ticks" in beat.output()

        wait_until(beat_has_stopped_adding, timeout=60)
        assert redis.llen("control") == 100
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    start.worker()
    log.wait_until_drained()


def test_one_of_two_beats_that_elect_each_other(start: Programs, place: Place, log: Log) -> None:
    """RedBeat finds its Redis without its address in Celery's configuration."""
    beats = [start.celery(f"beat{n}", "beat", "-l", "INFO", "-S", "redbeat.RedBeatScheduler") for n in (1, 2)]
    start.worker()
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    log.wait_until_drained()
    with Redis.from_url(place.broker_url) as redis:
        assert redis.exists("tidemark:beat::lock")
    assert all(beat.running for beat in beats)
