"""What programs print about their configuration, and about a wrong one, holds no password.

Every test with programs looks for that at its end (`pytest_pyfunc_call` in conftest.py). Here is what no other test
provokes.
"""

import base64
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis

from tasks.app import TidemarkApp
from tests.acceptance.conftest import Log, Programs, secrets_of
from tests.acceptance.producers import commit_one
from tests.demo.programs import Process, free_port, leaks
from tests.support import wait_until

LOGIN = "somebody:c0rrect-h0rse-battery"
PAGES = (
    "/", "/workers", "/tasks", "/broker", "/metrics", "/healthcheck", "/api/workers?refresh=1", "/api/tasks",
    "/api/queues/length", "/worker/worker1@test", "/api/task/types",
)  # fmt: skip


def page(url: str) -> str:
    """What stands there, to whoever is logged in; an error's page as well."""
    request = urllib.request.Request(url)
    request.add_header("Authorization", f"Basic {base64.b64encode(LOGIN.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return str(response.read(), "utf-8")
    except urllib.error.HTTPError as error:
        with error:
            return str(error.read(), "utf-8")


def told(redis: Redis) -> dict[str, str]:
    """Every key of a Redis and what it holds."""
    reads: dict[str, Any] = {
        "string": redis.get,
        "hash": redis.hgetall,
        "set": redis.smembers,
        "list": lambda key: redis.lrange(key, 0, -1),
        "zset": lambda key: redis.zrange(key, 0, -1),
    }
    return {str(key): str(reads[str(redis.type(key))](key)) for key in redis.scan_iter()}


def test_nothing_that_a_program_shows_has_a_secret(start: Programs, app: TidemarkApp, log: Log, tmp_path: Path) -> None:
    """Command lines, answers to remote control, pages, metrics, and all that goes over Redis or stays there."""
    ports = {"flower": free_port(), "exporter": free_port()}
    redis = Redis.from_url(app.broker_url, decode_responses=True)
    heard: Any = redis.pubsub()  # type: ignore[no-untyped-call]
    heard.psubscribe("*")
    env = {"TIDEMARK_FLOWER_AUTH": LOGIN, "TIDEMARK_DATA_DIR": str(tmp_path)}
    programs: list[Process] = [
        start.celery("flower", "flower", f"--port={ports['flower']}", env=env),
        start.celery("exporter", "exporter", "--port", str(ports["exporter"]), env=env),
        start.celery("beat", "beat", "-S", "redbeat.RedBeatScheduler", env=env),
        start.worker("-E", env=env).process,
    ]

    def all_of_them_answer() -> bool:
        with suppress(OSError):
            return "worker1@test" in page(f"http://127.0.0.1:{ports['flower']}/api/workers?refresh=1") and (
                'source_up{source="broker"} 1.0' in page(f"http://127.0.0.1:{ports['exporter']}/metrics")
            )
        return False

    wait_until(all_of_them_answer, timeout=60, interval=0.2)
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    app.send_task("tasks.materialize_topic", ("orders",), ignore_result=False).get(timeout=20)
    log.wait_until_drained()

    shown = {
        f"{where} {path}": page(f"http://127.0.0.1:{port}{path}") for where, port in ports.items() for path in PAGES
    }
    shown |= {f"Redis {key}": value for key, value in told(redis).items()}
    while message := heard.get_message(timeout=0.1):
        shown[f"channel {len(shown)} {message['channel']}"] = str(message["data"])
    heard.close()
    for program in programs:
        process = psutil.Process(program.pid)
        for one in (process, *process.children(recursive=True)):
            shown[f"command line of {program.name} {one.pid}"] = "\0".join(one.cmdline())
    for arguments in (("inspect", "conf"), ("inspect", "stats"), ("report",)):
        done = start.run(*arguments)
        assert done.returncode == 0, done.stderr
        shown[" ".join(arguments)] = done.stdout

    secrets = secrets_of({**start.env, **env})
    assert len(secrets) == 3
    assert leaks(list(shown.items()), secrets) == []
    # That it would be found: the environment has them all, and is nobody else's to read.
    environment = Path(f"/proc/{programs[0].pid}/environ")
    assert len(leaks([("environment", environment.read_text())], secrets)) >= len(secrets)
    assert environment.stat().st_mode & 0o077 == 0
    kinds = {name.split(maxsplit=1)[0] for name in shown}
    assert kinds == {"flower", "exporter", "Redis", "channel", "command", "inspect", "report"}
    assert {"celery", "tidemark:beat"} <= {name.removeprefix("Redis ")[:13].partition("-")[0] for name in shown}
    assert "broker_url" in shown["inspect conf"] + shown["report"]


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_mistyped_database_url(start: Programs, app: TidemarkApp, log_format: str) -> None:
    """The driver refuses a parameter; what the worker logs of it has no password."""
    url = f"{start.env['TIDEMARK_DATABASE_URL']}&ssl_mode=require"
    worker = start.worker("-P", "solo", env={"TIDEMARK_DATABASE_URL": url, "TIDEMARK_LOG_FORMAT": log_format})
    app.send_task("tasks.fan_out")

    def the_worker_has_logged_the_failure() -> bool:
        return "cannot be read" in worker.logs()

    wait_until(the_worker_has_logged_the_failure)
