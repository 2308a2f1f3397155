"""Signs of life: who writes them when, and what a probe makes of them."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import heartbeat as probe
from config.heartbeat import Heartbeat, examine, heartbeat_file, solo_silence
from config.settings import Settings
from tasks.programs import watch
from tests.support import wait_until
from tests.support_commands import new_app


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "worker.heartbeat"


@pytest.fixture
def beating(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heartbeat]:
    monkeypatch.setattr(probe, "INTERVAL", 0.02)
    heartbeat = Heartbeat(file, "worker", stale_after=60)
    yield heartbeat
    heartbeat.end()


def age(file: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(file, (then, then))


def test_from_start_to_end(beating: Heartbeat, file: Path) -> None:
    assert (examine(file).alive, examine(file).ready) == (True, False)
    beating.set_ready(ready=True)
    assert examine(file).ready
    age(file, 59)
    assert examine(file).ready
    age(file, 61)
    silent = examine(file)
    assert not silent.alive
    assert not silent.ready
    assert f"no sign of life for 61 s, more than 60 s: process {os.getpid()} hangs or is gone" in silent.reason
    beating.tick()
    assert examine(file).ready
    beating.end()
    assert examine(file).reason == f"{file} is not there: it does not run"


def test_nobody_else_may_read_it_and_a_shared_file_is_written_again(beating: Heartbeat, file: Path) -> None:
    assert file.stat().st_mode & 0o777 == 0o600
    file.unlink()
    beating.tick()
    assert examine(file).alive


def test_garbage_is_no_sign_of_life(file: Path) -> None:
    file.parent.mkdir()
    for text in ("", "{", "[]", '{"pid": 1}'):
        file.write_text(text)
        assert not examine(file).alive
        assert "cannot be read" in examine(file).reason


def test_while_it_waits_a_thread_beats(beating: Heartbeat, file: Path) -> None:
    beating.wait()
    age(file, 100)

    def it_beats() -> bool:
        return examine(file).alive

    wait_until(it_beats, timeout=5)
    beating.resume()
    time.sleep(0.1)
    age(file, 100)
    time.sleep(0.1)
    assert not examine(file).alive, "the main loop hangs, and nobody beats in its place"


def test_who_cannot_write_still_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    heartbeat = Heartbeat(tmp_path / "file" / "worker.heartbeat", "worker", stale_after=60)
    heartbeat.tick()
    heartbeat.set_ready(ready=True)
    assert [r.message for r in caplog.records] == ["cannot write the heartbeat file"]


def test_a_forked_child_leaves_its_parents_sign(
    beating: Heartbeat, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    beating.end()
    assert examine(file).alive


def test_beat_is_ready_after_its_first_tick(beating: Heartbeat, file: Path) -> None:
    published = []
    scheduler = SimpleNamespace(tick=lambda: 5.0, apply_async=lambda entry, **_: published.append(entry))
    app = new_app(broker_url="amqp://nobody")
    watch(scheduler, app, beating)
    age(file, 100)

    def it_beats_before_its_first_tick() -> bool:
        return examine(file).alive

    wait_until(it_beats_before_its_first_tick, timeout=5)
    assert not examine(file).ready
    assert scheduler.tick() == 5.0
    assert examine(file).ready
    time.sleep(0.1)
    for work in (scheduler.tick, lambda: scheduler.apply_async("fan_out", producer=None)):
        age(file, 1000)
        work()
        assert examine(file).alive
    assert published == ["fan_out"]
    app.close()


def test_where_the_file_is(tmp_path: Path) -> None:
    assert heartbeat_file(Settings(data_dir=tmp_path), "beat") == tmp_path / "beat.heartbeat"
    assert heartbeat_file(Settings(heartbeat_file=tmp_path / "x"), "beat") == tmp_path / "x"


@pytest.mark.parametrize("settings", [Settings(), Settings(task_seconds=200, visibility_timeout=10_000, retries=0)])
def test_a_busy_solo_worker_is_not_dead(settings: Settings) -> None:
    assert solo_silence(settings) > settings.hard_time_limit
    attempts = (settings.retries + 1) * max(settings.statement_timeout, settings.pool_wait)
    assert solo_silence(settings) > settings.task_seconds + attempts


def test_the_cheap_probe(beating: Heartbeat, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main([str(file)]) == 0
    assert probe.main([str(file), "--ready"]) == 1
    beating.set_ready(ready=True)
    assert probe.main(["--ready", str(file)]) == 0
    assert probe.main([]) == probe.main(["--what"]) == probe.main(["a", "b"]) == 2
    assert "usage" in capsys.readouterr().err


def test_the_cheap_probe_loads_nothing(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import sys, config.heartbeat; print(*sys.modules, sep='\\n')"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert not {"celery", "pydantic", "psycopg", "redis", "sqlalchemy"} & set(done.stdout.split())


def test_what_the_file_holds(beating: Heartbeat, file: Path) -> None:
    beating.set_ready(ready=True)
    expected = {"pid": os.getpid(), "program": "worker", "ready": True, "stale_after": 60}
    assert json.loads(file.read_text()) == expected
