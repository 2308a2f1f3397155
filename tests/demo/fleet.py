"""Which programs the demo runs: the same that everybody runs, by the same command lines."""

import base64
import json
import secrets
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.demo.plan import Places, Plan
from tests.demo.producer import Order
from tests.demo.programs import HOST, Process, Programs, free_port
from tests.support import numbers_in

_ANSWER_SECONDS = 1.0
_INSPECT_SECONDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Flower:
    """Where the user finds Flower."""

    port: int = field(default_factory=free_port)
    user: str = "tidemark"
    password: str = field(default_factory=lambda: secrets.token_urlsafe(9))

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def login(self) -> str:
        return f"{self.url}  login {self.user} / {self.password}"

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

    workers: Sequence[Process]
    beat: Process
    flower: Process
    producers: Sequence[Process]


def start_fleet(plan: Plan, places: Places, programs: Programs, partition_ids: Sequence[int], flower: Flower) -> Fleet:
    """Start them all at once; they take some seconds of CPU to load."""
    # The name of the run tells its workers from others on a shared broker.
    names = [f"worker{number}@demo-{plan.name}" for number in range(1, plan.workers + 1)]
    workers = [programs.celery(name.split("@")[0], "worker", "-n", name) for name in names]
    beat = programs.celery("beat", "beat")
    # The password goes by the environment: everybody can read a command line.
    login = {"TIDEMARK_FLOWER_AUTH": f"{flower.user}:{flower.password}"}
    started_flower = programs.celery("flower", "flower", f"--port={flower.port}", env=login)
    producers = [
        programs.process(
            f"producer {number}",
            [sys.executable, "-m", "tests.demo.producer", _order(plan, places, partition_ids, number)],
            may_end=True,
        )
        for number in range(plan.producers)
    ]
    return Fleet(workers=workers, beat=beat, flower=started_flower, producers=producers)


def leased_shards(programs: Programs) -> Mapping[str, Sequence[int]]:
    """Which shards each worker has, as `celery -A tasks inspect shards` tells."""
    told = programs.run("inspect", "shards", "--json", "--timeout", str(_INSPECT_SECONDS))
    # With no answer at all it says so, and ends with an exit code of its own.
    answers = json.loads(told.stdout) if told.returncode == 0 else {}
    return {name: numbers_in(answers[name]["shards"]) for name in sorted(answers)}


def ledger_of(places: Places, number: int) -> Path:
    """A producer's ledger, which appears when it is ready."""
    return places.ledgers / f"producer-{number}.jsonl"


def _order(plan: Plan, places: Places, partition_ids: Sequence[int], number: int) -> str:
    return Order(
        number=number,
        key_prefix=plan.key_prefix,
        rate=plan.rate,
        partition_ids=list(partition_ids),
        objects=str(places.objects),
        ledger=str(ledger_of(places, number)),
    ).to_json()
