"""Which programs the demo runs: the same that everybody runs, by the same command lines."""

import base64
import secrets
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tasks
from config.queues import CONTROL, MAINTENANCE, shard_queue
from tests.demo.plan import Places, Plan
from tests.demo.producer import Order
from tests.demo.programs import Program, Programs

_CELERY = (sys.executable, "-m", "celery", "-A", "tasks")
_HOST = "127.0.0.1"
_ANSWER_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Flower:
    """Where the user finds Flower."""

    port: int
    user: str = "tidemark"
    password: str = field(default_factory=lambda: secrets.token_urlsafe(9))

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.port}"

    def answers(self) -> bool:
        """Whether the page with the workers comes for this login."""
        login = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        request = urllib.request.Request(f"{self.url}/workers", headers={"Authorization": f"Basic {login}"})
        try:
            # No proxy, whatever the environment says: it would not know our loopback address.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=_ANSWER_SECONDS) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Fleet:
    """The programs, by what they do."""

    shards: Sequence[Program]
    beat: Program
    control: Program
    flower: Program
    producers: Sequence[Program]


def start_fleet(
    plan: Plan,
    places: Places,
    programs: Programs,
    environment: Mapping[str, str],
    partition_ids: Sequence[int],
    flower: Flower,
) -> Fleet:
    """Start them all at once; they take some seconds of CPU to load."""
    environment = {**environment, "PYTHONPATH": _python_path(environment)}
    shards = [
        programs.start(
            f"worker of shard {shard}",
            _worker(plan, f"shard-{shard}", shard_queue(shard), "-c", "1", "-P", "solo"),
            environment,
        )
        for shard in range(plan.shards)
    ]
    # Two slots: fan-out must not wait for maintenance.
    control = programs.start(
        "control worker", _worker(plan, "control", f"{CONTROL},{MAINTENANCE}", "-c", "2"), environment
    )
    beat = programs.start("beat", [*_CELERY, "beat", "-l", "WARNING"], environment)
    # The password goes by the environment: everybody can read a command line.
    started_flower = programs.start(
        "flower",
        [*_CELERY, "flower", f"--address={_HOST}", f"--port={flower.port}", "--persistent=False"],
        {**environment, "FLOWER_BASIC_AUTH": f"{flower.user}:{flower.password}"},
    )
    producers = [
        programs.start(
            f"producer {number}",
            [sys.executable, "-m", "tests.demo.producer", _order(plan, places, partition_ids, number)],
            environment,
            may_end=True,
        )
        for number in range(plan.producers)
    ]
    return Fleet(shards=shards, control=control, beat=beat, flower=started_flower, producers=producers)


def ledger_of(places: Places, number: int) -> Path:
    """A producer's ledger, which appears when it is ready."""
    return places.ledgers / f"producer-{number}.jsonl"


def _worker(plan: Plan, name: str, queues: str, *options: str) -> list[str]:
    # Events are what Flower lives on; mingle would have every worker wait a second for all others.
    node = f"demo-{plan.name}-{name}@%h"
    quiet = ("--without-gossip", "--without-mingle", "-l", "WARNING")
    return [*_CELERY, "worker", "-Q", queues, *options, "-n", node, "-E", *quiet]


def _order(plan: Plan, places: Places, partition_ids: Sequence[int], number: int) -> str:
    return Order(
        number=number,
        key_prefix=plan.key_prefix,
        rate=plan.rate,
        partition_ids=list(partition_ids),
        objects=str(places.objects),
        ledger=str(ledger_of(places, number)),
    ).to_json()


def _python_path(environment: Mapping[str, str]) -> str:
    """Find the packages we were imported from, wherever the programs look otherwise."""
    ours = str(Path(tasks.__file__).parents[1])
    theirs = environment.get("PYTHONPATH")
    return f"{ours}:{theirs}" if theirs else ours


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        return int(probe.getsockname()[1])
