"""This edition beside the first one: `python -m tests.benchmarks.editions [--first DIR] [--only ITEM …] [--rounds N]`.

DIR is a checkout of the first edition (`git worktree add DIR 60589bc`), which is measured on a server of its own with
the same settings. All is interleaved, and ratios are medians. Without DIR only this edition is measured.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.benchmarks import edition
from tests.benchmarks.measure import Result, Sample, interleave, share

ROOT = Path(__file__).parents[2]
_ROW = "{:<54} {:>13} {:>13} {:>7}  {}"
# Vacuum is what a held snapshot keeps from its work.
AUTOVACUUM = {"autovacuum": "on", "autovacuum_naptime": "5s"}
# They are prepared transactions.
_WRITERS = {"max_prepared_transactions": "250"}


class Edition(AbstractContextManager["Edition"]):
    """A process that measures the edition in `directory` on a server of its own, with these settings."""

    def __init__(self, directory: Path, settings: Mapping[str, str] | None = None) -> None:
        # "-P": the directory of the script is not where modules are looked for.
        self._process = subprocess.Popen(
            [sys.executable, "-P", edition.__file__, json.dumps(settings or {})],
            cwd=directory,
            env={**os.environ, "PYTHONPATH": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, job: str, **arguments: Any) -> Any:
        """One of the jobs in edition.py."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([job, arguments]), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{job} in {self._process.args!r} ended with {self._process.wait()}")
        return json.loads(answer)

    def sample(self, job: str, **arguments: Any) -> Sample:
        answer = self.do(job, **arguments)
        return Sample(
            seconds=answer["seconds"], cpu_seconds=0.0, units=answer["units"], log_bytes=answer.get("log_bytes", 0)
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def judged(ratio: float | None, aim: str) -> str:
    """An aim as "<= 1.3", and whether the ratio misses it."""
    if not aim or ratio is None:
        return aim
    met = ratio <= float(aim[2:]) if aim.startswith("<=") else ratio >= float(aim[2:])
    return f"aim {aim}{'' if met else ' MISSED'}"


def say(what: str, cells: Iterable[str] = (), ratio: float | None = None, aim: str = "") -> None:
    """A row with up to two cells."""
    left, right, *_ = (*cells, "", "")
    row = _ROW.format(what, left, right, "" if ratio is None else f"{ratio:.2f}", judged(ratio, aim))
    print(row.rstrip(), flush=True)  # noqa: T201 -- what this program is for


class Items:
    """What can be measured; each says its rows."""

    def __init__(self, first: Path | None, rounds: int, passes: int, deleted: int) -> None:
        self._directories = {"ours": ROOT, **({"first": first} if first else {})}
        self._rounds = rounds
        self._passes = passes
        self._deleted = deleted

    def _start(self, stack: ExitStack, settings: Mapping[str, str] | None = None) -> dict[str, Edition]:
        return {
            name: stack.enter_context(Edition(directory, settings)) for name, directory in self._directories.items()
        }

    def _interleave(self, arms: Mapping[str, Callable[[], Sample]]) -> dict[str, Result]:
        return interleave(arms, self._rounds)

    def drain(self) -> None:
        """One client drains a backlog."""
        say("drain, events/s", ("ours", "first"))
        with ExitStack() as stack:
            editions = self._start(stack)
            for partitions, each, group, aim in (
                (16, 12_500, 1, ">= 3.5"),
                (10_000, 10, 2_000, ">= 2"),
                (100_000, 1, 2_000, ">= 1"),
            ):
                backlog = {"partitions": partitions, "events_each": each, "group": group}
                found = self._interleave(
                    {name: partial(its.sample, "drained", **backlog) for name, its in editions.items()}
                )
                name = f"  {partitions:,} x {each:,}"
                say(name, (f"{result.rate:,.0f}" for result in found.values()), *_against(found, aim))
                say("    log, bytes an event", (f"{result.log_bytes:,.0f}" for result in found.values()))

    def held(self) -> None:
        """Turns after many passes under a held snapshot, or retention under it, beside those without either."""
        say("held snapshot, 100 partitions, ms", ("before", "after"))
        for name, directory in self._directories.items():
            passes = self._passes if name == "ours" else self._passes // 5
            with self._twins(directory) as (young, old):
                old.do("Turns.hold")
                old.do("Turns.take", turns=passes)
                self._compare_turns(f"{name}, {passes:,} passes", young, old, "<= 1.3" if name == "ours" else "")
        with self._twins(ROOT) as (young, old):
            for it in (young, old):
                it.do("Turns.fill", events=self._deleted)
            old.do("Turns.hold")
            gone = old.do("Turns.retain", batches=max(300, self._deleted // 1_000))
            self._compare_turns(f"ours, {gone['deleted']:,} batches deleted", young, old, "<= 1.3")
            times = (f"{gone[which]:.2f}" for which in ("first", "last"))
            say("    transaction of retention, first and last fifth", times, gone["last"] / gone["first"])

    @contextmanager
    def _twins(self, directory: Path) -> Iterator[tuple[Edition, Edition]]:
        with Edition(directory, AUTOVACUUM) as young, Edition(directory, AUTOVACUUM) as old:
            for it in (young, old):
                it.do("Turns", partitions=100)
                it.do("Turns.take", turns=250)
            yield young, old

    def _compare_turns(self, title: str, young: Edition, old: Edition, aim: str) -> None:
        say(f"  {title}")
        found = [(young.do("Turns.take", turns=10), old.do("Turns.take", turns=10)) for _ in range(20)]
        for what in found[0][0]:
            cells = (f"{statistics.median(pair[n][what] for pair in found):.2f}" for n in (0, 1))
            say(f"    {what}", cells, statistics.median(after[what] / before[what] for before, after in found), aim)

    def fetch(self) -> None:
        """Fetches from random offsets, over runs that are full and runs of one or two batches."""
        say("fetch, ms", ("ours", "first"))
        for what, log, aim in (
            ("deep", {"partitions": 16, "commits": 134, "passes": False}, "<= 1.2"),
            ("thin", {"partitions": 1_000, "commits": 300, "passes": True}, "<= 1.5"),
        ):
            with ExitStack() as stack:
                editions = self._start(stack)
                for it in editions.values():
                    it.do("Log", **log)
                for batches in (1, 20, 100):
                    digests = {it.do("Log.fetch", batches=batches)["digest"] for it in editions.values()}
                    if len(digests) > 1:
                        raise RuntimeError(f"{what}, {batches} batches: the editions answered differently")
                    found = interleave(
                        {name: partial(it.sample, "Log.fetch", batches=batches) for name, it in editions.items()},
                        # Short ones, and so more of them.
                        4 * self._rounds,
                    )
                    times = (f"{1e3 / result.rate:.3f}" for result in found.values())
                    say(f"  {what} runs, {batches} batches", times, *_against(found, aim, of_times=True))

    def fanout(self) -> None:
        """Fan-outs over many partitions of which few are active."""
        say("fan-out, 100 active partitions, ms", ("of 1,000", "of 100,000"))
        self._each("fanned_out", [{"partitions": 1_000}, {"partitions": 100_000}], ["", "<= 1.2"], {})

    def writers(self) -> None:
        """Passes beside open transactions."""
        for others, who in ((False, "the same open writers"), (True, "writers that have committed by the next pass")):
            say(f"{who}, 2,000 partitions, ms", ("none", "with them"))
            arguments = [{"partitions": 2_000, "writers": writers, "others": others} for writers in (0, 50, 200)]
            # No aim was given for those that commit.
            self._each("beside_writers", arguments, ["", *(("", "") if others else ("<= 1.3", "<= 2"))], _WRITERS)

    def _each(self, job: str, arguments: list[dict[str, Any]], aims: list[str], settings: Mapping[str, str]) -> None:
        """A job with several arguments beside the one with the first of them, in each edition."""
        with ExitStack() as stack:
            editions = self._start(stack, settings)
            arms = {
                f"{name} {number}": partial(it.sample, job, **its)
                for name, it in editions.items()
                for number, its in enumerate(arguments)
            }
            found = self._interleave(arms)
        for name in editions:
            base = found[f"{name} 0"]
            for number in range(1, len(arguments)):
                result = found[f"{name} {number}"]
                what = ", ".join(f"{value:,} {key}" for key, value in arguments[number].items() if key != "others")
                times = (f"{1e3 / r.rate:.2f}" for r in (base, result))
                say(f"  {name}, {what}", times, share(base, result), aims[number] if name == "ours" else "")


def _against(found: Mapping[str, Result], aim: str, *, of_times: bool = False) -> tuple[float | None, str]:
    """Ours as a multiple of the first edition's, where that is measured, and the aim."""
    if "first" not in found:
        return None, ""
    pair = (found["first"], found["ours"]) if of_times else (found["ours"], found["first"])
    return share(*pair), aim


ITEMS = ("drain", "held", "fetch", "fanout", "writers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=Path, help="checkout of the first edition")
    parser.add_argument("--only", default=",".join(ITEMS), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--passes", type=int, default=3_000, help="under the held snapshot; the first edition a fifth")
    parser.add_argument("--deleted", type=int, default=500_000, help="batches for retention under it (%(default)s)")
    arguments = parser.parse_args()
    # An end by SIGTERM stops the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    items = Items(arguments.first, arguments.rounds, arguments.passes, arguments.deleted)
    for name in arguments.only.split(","):
        getattr(items, name)()


if __name__ == "__main__":
    main()
