"""Importing anything defines things, and does nothing else: another project's Celery stays what it was."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A process with a Celery app of its own; what can be changed from outside is compared before and after.
HOST = """
import json, logging, os, sys, threading, warnings
import celery, kombu.transport.redis as kombu_redis, psycopg
from celery import signals
from celery.worker.control import Panel

host = celery.Celery("host", broker="redis://host-broker/0")

@celery.shared_task(name="host.send_mail")
def send_mail(): ...

def state():
    return {
        "app": celery.current_app.main,
        "task's app": send_mail.app.main,
        "host's tasks": sorted(host.tasks),
        "broker": host.conf.broker_url,
        "kombu": [kind.__name__ for kind in kombu_redis.Transport.connection_errors],
        "signals": {n: len(s.receivers or ()) for n, s in vars(signals).items() if hasattr(s, "receivers")},
        "inspect": sorted(Panel.meta),
        "log": [str(h) for h in logging.getLogger().handlers],
        "environment": dict(os.environ),
        "threads": threading.active_count(),
        "files": sorted(os.listdir("/proc/self/fd")),
        "adapters": len(psycopg.adapters.types._registry),
    }

before = state()
import config, db, tasks
import %s
after = state()
print(json.dumps({name: [before[name], after[name]] for name in before if before[name] != after[name]}))
"""


def modules() -> list[str]:
    """Every module of ours but those that are programs of their own, or that Celery's programs load."""
    programs = {"db.migrations.env", "tasks.tracing"}
    # What answers `inspect shards` is a worker's and the command line's.
    loaded = {"tasks.programs", "tasks.inspection"}
    found = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("config", "db", "tasks")
        for file in sorted((ROOT / package).rglob("*.py"))
        if "versions" not in file.parts
    ]
    return [name for name in found if name not in programs | loaded]


def test_another_projects_celery_stays_what_it_was() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOST % ", ".join(modules())],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}
