"""Messages of a stranger: whoever reaches the broker can put anything into a queue.

Each of them is refused, counted by its reason and logged in one line. Nothing of it is executed; the worker goes on.
"""

import base64
import json
import pickle
import subprocess
import zlib
from collections import Counter
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery.exceptions import NotRegistered
from redis import Redis

from config.errors import InvalidJobError, UnknownPartitionError
from tasks.app import TidemarkApp
from tasks.exporter import worker_metrics
from tasks.metrics import read
from tests.acceptance.conftest import Log, Programs
from tests.acceptance.producers import commit_one
from tests.support import wait_until

NOTHING_FOLLOWS: dict[str, Any] = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
FINE = [[], {}, NOTHING_FOLLOWS]
PURGE: dict[str, Any] = {
    "task": "tasks.purge",
    "args": [],
    "kwargs": {},
    "options": {},
    "subtask_type": None,
    "immutable": True,
}
# Stands in every body, and must stand nowhere else.
MARK = "d0nt-dump-me"


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.check_call, (["touch", str(self._file)],)


def envelope(body: Any, *, task: Any = "tasks.fan_out", kind: str = "application/json", **changes: Any) -> str:
    """A message as Kombu keeps it in Redis. `changes` are headers; those of `properties` are properties."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"lang": "py", "task": task, "id": str(uuid4()), "retries": 0, "timelimit": [None, None], "eta": None}
    properties = {
        "body_encoding": "base64",
        "delivery_tag": str(uuid4()),
        "delivery_info": {"exchange": "", "routing_key": "control"},
        **changes.pop("properties", {}),
    }
    return json.dumps(
        {
            "body": base64.b64encode(data).decode(),
            "content-type": kind,
            "content-encoding": "utf-8",
            "headers": {**headers, **changes},
            "properties": properties,
        }
    )


def arguments(task: str, *args: Any, **kwargs: Any) -> str:
    return envelope([args, kwargs, NOTHING_FOLLOWS], task=task)


def messages(trap: Path) -> dict[str, list[str]]:
    """By the reason for which they are refused."""
    nested = b"[" * 100_000 + b"]" * 100_000
    return {
        "envelope": [
            MARK,
            "[]",
            "7",
            "{}",
            nested.decode(),
            '{"properties": []}',
            '{"properties": {"delivery_tag": "1"}, "headers": "7"}',
            envelope(FINE, properties={"delivery_info": 7}),
            envelope(FINE, properties={"delivery_tag": ["1"]}),
            envelope(FINE, properties={"delivery_info": {}}),
        ],
        "content": [
            envelope(pickle.dumps(Trap(trap)), kind="application/x-python-serialize"),
            envelope(f"!!python/object/apply:subprocess.call [[touch, {trap}]]".encode(), kind="application/x-yaml"),
            envelope(FINE, kind="text/plain"),
            envelope(zlib.compress(b"[" * 1_000_000), compression="zlib"),
        ],
        "size": [
            envelope([["x" * 10_000_000], {}, NOTHING_FOLLOWS], task="tasks.materialize_topic"),
            arguments("tasks.materialize", list(range(1, 1_000_001))),
        ],
        "body": [
            envelope(f'{{"{MARK}'.encode()),
            envelope(nested),
            envelope(b"null"),
            envelope(b""),
            envelope({MARK: 1}),
            envelope([1, 2]),
            envelope([MARK, {}, {}]),
            envelope([[], 7, {}]),
            envelope([[], {}, 7]),
            # Celery's first protocol, without headers.
            envelope({"task": "tasks.fan_out", "id": "1", "args": [], "kwargs": {}, "eta": MARK}),
        ],
        "task": [envelope(FINE, task="os.system"), envelope([[], {"task": PURGE, "it": [[]]}, {}], task="celery.map")],
        "headers": [
            envelope(FINE, task=["tasks.purge"]),
            envelope(FINE, task=None),
            envelope(FINE, id=None),
            envelope(FINE, id=["1"]),
            envelope(FINE, eta="2126-01-01T00:00:00+00:00"),
            envelope(FINE, eta="never"),
            envelope(FINE, eta=7),
            envelope(FINE, expires="never"),
            envelope(FINE, expires=0.0),
            envelope(FINE, retries=10**9),
            envelope(FINE, retries=-(10**9)),
            envelope(FINE, stamped_headers=7),
            envelope(FINE, shadow="x" * 100_000),
            envelope(FINE, group={"1": 1}),
        ],
        "workflow": [
            envelope([[], {}, NOTHING_FOLLOWS | {"callbacks": [PURGE]}]),
            envelope([[], {}, NOTHING_FOLLOWS | {"errbacks": [PURGE]}]),
            envelope([[], {}, NOTHING_FOLLOWS | {"chain": [PURGE]}]),
            envelope([[], {}, NOTHING_FOLLOWS | {"chord": PURGE}], group="1"),
        ],
        "arguments": [
            arguments("tasks.fan_out", 1, 2),
            arguments("tasks.fan_out", unknown=MARK),
            arguments("tasks.materialize", [-1]),
            arguments("tasks.materialize", [10**30]),
            arguments("tasks.materialize", [[[[1]]]]),
            arguments("tasks.materialize", []),
            arguments("tasks.materialize_topic", [MARK]),
            arguments("tasks.materialize_partition", "orders", partition=True),
            arguments("tasks.materialize_partition", "orders"),
        ],
    }


@pytest.mark.timeout(120)
def test_messages_of_a_stranger(start: Programs, app: TidemarkApp, log: Log, tmp_path: Path) -> None:
    worker = start.worker()
    pid, trap = worker.pid, tmp_path / "trap"
    sent = messages(trap)
    expected = Counter({reason: len(found) for reason, found in sent.items()})
    # Not the app's client, which waits half a second: a message of 10 MB may take longer.
    redis = Redis.from_url(app.broker_url, decode_responses=True)
    for number, message in enumerate(message for found in sent.values() for message in found):
        redis.lpush("control", message)
        if number % 10 == 0:
            commit_one(log.conn, log.ledger, f"bucket/{number}", log.partitions)
            app.send_task("tasks.materialize_topic", ("orders",))
    # Who else may set a limit: with this one the pool's process would be killed.
    redis.lpush("control", envelope([["orders"], {}, {}], task="tasks.materialize_topic", timelimit=[0.001, 0.001]))
    # To all workers: remote control, and the events that workers tell each other and nobody of ours hears.
    told = [*sent["content"][:2], *sent["envelope"][1:7], "no JSON", envelope([1, 2])]
    for channel in ("/0.celery.pidbox", "/0.celeryev/worker.heartbeat"):
        for message in told:
            redis.publish(channel, message)
    expected += Counter(content=2, envelope=6)

    def counted() -> dict[str, float]:
        family = next(m for m in worker_metrics(read(redis)) if m.name == "tidemark_messages_refused")
        return {s.labels["reason"]: s.value for s in family.samples}

    def all_are_counted() -> bool:
        assert worker.process.running, worker.logs()
        return sum(counted().values()) >= expected.total()

    wait_until(all_are_counted, timeout=60)
    log.wait_until_drained()
    log.check()

    # The longest task that the settings admit is none of a stranger's, though nobody has such partitions.
    longest = app.send_task("tasks.materialize", ([2**31 - 4 * n for n in range(1, 10_001)],), ignore_result=False)
    with pytest.raises(UnknownPartitionError):
        longest.get(timeout=20)
    # Nobody's mistake stays without an answer.
    for error, task, args in ((NotRegistered, "tasks.nosuch", ()), (InvalidJobError, "tasks.materialize_topic", (7,))):
        with pytest.raises(error):
            app.send_task(task, args, ignore_result=False).get(timeout=20)

    assert worker.pid == pid
    assert worker.process.running
    assert not trap.exists()
    assert set(start.stats(worker)) == {"tasks.materialize", "tasks.materialize_topic"}
    assert redis.hlen("unacked") == 0
    lines = worker.logs().partition(" ready.")[2].splitlines()[1:]
    refused = Counter(line.partition(" reason=")[2].split()[0] for line in lines if "a message was refused" in line)
    assert refused == counted() == expected + Counter(task=1, arguments=1)
    unwanted = ("Traceback", "time limit", MARK)
    assert [line for line in lines if len(line) > 1_500 or any(word in line for word in unwanted)] == []
    assert [line for line in lines if not line[:4].isdecimal()] == [], "one line each, with its time"
