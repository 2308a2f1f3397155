"""The sequence of a run: servers, schema, topics, programs, load, drain, check, and the end of it all.

Whatever is started is entered into one stack before anything else can happen; the stack is unwound, with signals on
hold, however the run ends.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from config.embedded.host import tail
from config.settings import Settings
from db.migrate import upgrade
from db.pool import Database
from db.topics import create_topic, partition_ids
from tests.demo.check import check
from tests.demo.evidence import backlog, collect
from tests.demo.figures import Meter
from tests.demo.fleet import Fleet, Flower, leased_shards, ledger_of, start_fleet
from tests.demo.interrupts import Interrupted, Interrupts
from tests.demo.ledger import Ledger, LedgerTail, LedgerWriter
from tests.demo.observers import Reader, Watcher
from tests.demo.plan import PARTITIONS, Places, Plan
from tests.demo.producer import Shift, commit_everywhere
from tests.demo.programs import DemoError, Process, Programs
from tests.demo.servers import Servers
from tests.demo.view import Screen, shards_text

# Some seconds of CPU for each program: long on a machine that has other things to do.
_READY_SECONDS = 180.0
_DRAIN_SECONDS = 60.0
# Beyond the run itself: the last transactions, replays and pauses of a producer.
_FINISH_SECONDS = 30.0
_POLL = 0.1
_VIEW_SECONDS = 0.5
_HEAD_START = 0.2
_STOP_SECONDS = 10.0
_CONNECTIONS = 4


def run(plan: Plan, settings: Settings, screen: Screen) -> int:
    """Run the demo; returns its exit code. Raises DemoError where it could not run to its end."""
    with Interrupts() as interrupts:
        stack = ExitStack()
        try:
            try:
                return _Run(plan, settings, screen, interrupts, stack).run()
            finally:
                interrupts.hold()
        except Interrupted as signal:
            screen.say(f"{signal}: stopping everything")
            return signal.exit_code
        finally:
            stack.close()


class _Run:
    """What the steps of one run share."""

    def __init__(
        self, plan: Plan, settings: Settings, screen: Screen, interrupts: Interrupts, stack: ExitStack
    ) -> None:
        self._plan = plan
        self._settings = settings
        self._screen = screen
        self._interrupts = interrupts
        self._stack = stack
        self._began = time.monotonic()
        with interrupts.held():
            self._places = stack.enter_context(Places.temporary())

    def run(self) -> int:
        self._step("starting the servers" if self._plan.database_url is None else "using the servers given")
        self._servers = Servers(self._plan, self._places.directory, self._interrupts, self._stack)
        upgrade(self._servers.database_url)
        self._database = Database(self._servers.database_url, self._settings, threads=_CONNECTIONS)
        self._stack.callback(self._database.close)
        topics = self._create_topics()
        ids = [i for topic in topics.values() for i in topic]

        workers = f"{self._plan.workers} times celery -A tasks worker"
        self._step(f"starting {self._plan.producers} producers, beat, Flower and {workers}")
        environment = self._servers.environment(self._plan, self._places)
        self._programs = Programs(self._places.logs, environment, self._interrupts.held)
        self._stack.callback(self._programs.stop, _STOP_SECONDS)
        flower = Flower()
        fleet = start_fleet(self._plan, self._places, self._programs, ids, flower)
        self._ledger = Ledger()
        with (
            Watcher(self._database, ids, self._ledger) as self._watcher,
            Reader(self._database, self._watcher, self._ledger) as self._reader,
        ):
            self._meter = Meter(LedgerTail(self._places.ledgers), self._ledger, self._watcher, topics)
            self._await_ready(fleet, flower, ids)
            self._await_shares()
            until = "until Ctrl-C" if self._plan.keep else "until this run ends; with --keep until Ctrl-C"
            self._step(f"Flower: {flower.login}\n         ({until})")
            self._produce(fleet, flower, ids)
            self._watcher.finish()
            self._reader.finish()
            self._meter.read_ledgers()
        passed = self._check(ids)
        if self._plan.keep:
            self._keep(flower)
        self._step("stopping everything")
        return 0 if passed else 1

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._began

    def _step(self, text: str) -> None:
        self._screen.say(f"{self._elapsed:5.1f} s  {text}")

    def _create_topics(self) -> Mapping[str, Sequence[int]]:
        with self._database.connection() as conn:
            for topic in self._plan.topics:
                create_topic(conn, topic, PARTITIONS)
            return {topic: partition_ids(conn, topic) for topic in self._plan.topics}

    def _require_well(self) -> None:
        # A server first: the programs die of its death, and their messages are longer.
        self._servers.require_running()
        self._programs.require_well()
        self._watcher.require_well()
        self._reader.require_well()

    def _await(
        self, seconds: float, condition: Callable[[], bool], late: Callable[[], str], pause: float = _POLL
    ) -> None:
        """Wait until `condition`; DemoError with `late()` when that takes too long, or when something died."""
        deadline = time.monotonic() + seconds
        while not condition():
            self._require_well()
            if time.monotonic() > deadline:
                raise DemoError(f"after {seconds:g} s {late()}")
            time.sleep(pause)

    def _await_ready(self, fleet: Fleet, flower: Flower, ids: Sequence[int]) -> None:
        """Ready is when a commit to every partition has got its offsets: by beat, and by workers for all shards."""
        with self._database.connection() as conn, LedgerWriter(self._places.ledgers / "warm-up.jsonl") as ledger:
            commit_everywhere(conn, self._places.objects, ledger, f"{self._plan.key_prefix}warm-up", ids)
        self._await(
            _READY_SECONDS,
            lambda: all(self._watcher.end_offsets.values()),
            lambda: f"a first commit is not materialized\n{_logs((fleet.beat, *fleet.workers))}",
        )
        self._await(_READY_SECONDS, flower.answers, lambda: f"Flower does not answer\n{_logs([fleet.flower])}")
        self._await(
            _READY_SECONDS,
            lambda: all(ledger_of(self._places, number).exists() for number in range(self._plan.producers)),
            lambda: "a producer is not ready",
        )

    def _await_shares(self) -> None:
        """Wait until all workers have shards, as far as there are enough, and every shard has a worker."""
        shares: Mapping[str, Sequence[int]] = {}

        def shared() -> bool:
            nonlocal shares
            shares = leased_shards(self._programs)
            having = sum(map(bool, shares.values()))
            # While shares move a shard may have two workers for a moment.
            covered = sorted(shard for share in shares.values() for shard in share)
            return having >= min(self._plan.workers, self._plan.shards) and covered == list(range(self._plan.shards))

        self._await(_READY_SECONDS, shared, lambda: f"the workers have not shared the shards: {shares}")
        for name, share in shares.items():
            self._step(f"{name} leases shards {shards_text(share)}")

    def _produce(self, fleet: Fleet, flower: Flower, ids: Sequence[int]) -> None:
        shift = Shift(start=time.monotonic() + _HEAD_START, stop=time.monotonic() + _HEAD_START + self._plan.seconds)
        self._meter.begin()
        for producer in fleet.producers:
            producer.tell(shift.to_json())
        with self._screen.follow(flower) as view, self._database.connection() as conn:

            def show(phase: str | None = None) -> int:
                pending = backlog(conn, ids)
                if phase is None:
                    phase = "producing" if time.monotonic() < shift.stop else "finishing"
                view.show(phase, self._elapsed, self._meter.read(pending))
                return pending

            def finished() -> bool:
                show()
                return not _still_running(fleet.producers)

            self._await(
                self._plan.seconds + _FINISH_SECONDS,
                finished,
                lambda: f"not all producers have ended: {', '.join(_still_running(fleet.producers))}",
                _VIEW_SECONDS,
            )
            self._await(
                _DRAIN_SECONDS,
                lambda: show("draining") == 0,
                lambda: f"{backlog(conn, ids):,} events are not materialized\n{_logs((*fleet.workers, fleet.beat))}",
            )
            view.show("drained", self._elapsed, self._meter.totals(self._plan.seconds))

    def _check(self, ids: Sequence[int]) -> bool:
        with self._database.connection() as conn:
            evidence = collect(
                conn,
                ids,
                self._ledger,
                key_prefix=self._plan.key_prefix,
                objects=self._places.objects,
                looks=self._watcher.looks,
                fetched=self._reader.fetched,
            )
        findings = check(evidence)
        self._step("the invariants, against what producers, objects and observers say:")
        self._screen.report(findings)
        return all(finding.violation is None for finding in findings)

    def _keep(self, flower: Flower) -> None:
        self._screen.say(
            f"Flower        {flower.login}\n"
            f"Postgres      {self._servers.database_url}\n"
            f"Redis         {self._servers.broker_url}\n"
            f"everything stays up until Ctrl-C"
        )
        try:
            while True:
                self._servers.require_running()
                self._programs.require_well()
                time.sleep(_POLL)
        except Interrupted:
            # What it was to be ended by.
            return


def _still_running(programs: Sequence[Process]) -> list[str]:
    return [program.name for program in programs if program.running]


def _logs(programs: Sequence[Process]) -> str:
    return "\n".join(f"--- {program.name}\n{tail(program.log)}" for program in programs)
