"""The whole system under load: `python -m tests.benchmarks.sustained [--first DIR] [--rounds N] [--seconds S]`.

Producers that commit as fast as they can, beat and two real workers, against the same producers alone, and against the
first edition where DIR is a checkout of it. Rates are from the first commit until the last event has its offset. Also a
part of all benchmarks.
"""

import argparse
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.bench import Bench
from tests.benchmarks.editions import AUTOVACUUM, ROOT, Edition, judged
from tests.benchmarks.measure import Sample
from tests.benchmarks.plan import Measurement, compared
from tests.benchmarks.report import draw_backlogs

_WORKERS = 2
# Servers, workers and producers have to start.
_AROUND = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What producers do, and what is asked of the whole system beside the first edition and the producers alone."""

    partitions: int
    batches: int
    producers: int
    vs_first: str
    vs_alone: str

    def __str__(self) -> str:
        return f"{self.partitions:,} partitions, {self.batches:,} a commit, {self.producers} producers"


LOADS = (
    Load(partitions=1_000, batches=1_500, producers=2, vs_first=">= 1.5", vs_alone=">= 0.6"),
    Load(partitions=1_000, batches=100, producers=4, vs_first=">= 1.3", vs_alone=">= 0.75"),
)


def run(load: Load, seconds: float, directory: Path = ROOT, *, workers: int = _WORKERS) -> dict[str, Any]:
    """One run on a server of its own; without workers the producers alone."""
    with Edition(directory, AUTOVACUUM) as edition:
        found: dict[str, Any] = edition.do(
            "sustained",
            partitions=load.partitions,
            batches=load.batches,
            producers=load.producers,
            seconds=seconds,
            workers=workers,
        )
    return found


def plan_sustained(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    del bench  # each run has a server of its own

    def sample(load: Load, seconds: float, workers: int) -> Sample:
        found = run(load, seconds, workers=workers)
        return Sample(seconds=found["seconds"], cpu_seconds=0.0, units=found["units"], log_bytes=found["log_bytes"])

    seconds = 3.0 if quick else 8.0
    return [
        compared(
            "sustained",
            str(load),
            {"ours": partial(sample, load, seconds, _WORKERS), "limit": partial(sample, load, seconds, 0)},
            rounds,
            seconds=seconds + _AROUND,
            note="limit: the producers alone",
        )
        for load in LOADS[: 1 if quick else None]
    ]


def measure(load: Load, seconds: float, rounds: int, first: Path | None) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm, interleaved."""
    arms = {"ours": partial(run, load, seconds), "alone": partial(run, load, seconds, workers=0)}
    if first:
        arms["first"] = partial(run, load, seconds, first)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in list(arms)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(arms[name]())
    return found


def show(load: Load, found: dict[str, list[dict[str, Any]]]) -> None:
    """Medians, and ours as a multiple of the others': the median of the rounds' ratios."""
    aims = {"events/s": {"alone": load.vs_alone, "first": load.vs_first}, "log": {"first": "<= 0.6"}}
    aims["commit p50"] = {"first": "<= 1"}
    figures: dict[str, Callable[[dict[str, Any]], float]] = {
        "events/s, end to end": lambda r: r["units"] / r["seconds"],
        "commit p50, ms": lambda r: r["p50"],
        "commit p99, ms": lambda r: r["p99"],
        "log, bytes an event": lambda r: r["log_bytes"] / r["units"],
        "longest backlog, events": lambda r: max((waiting for _, waiting in r["backlog"]), default=0),
    }
    for kind in found["ours"][0]["cpu"]:
        figures[f"CPU of {kind}, µs an event"] = partial(_cpu, kind)
    others = [name for name in found if name != "ours"]
    titles = (*found, *(f"/ {name}" for name in others))
    sys.stdout.write("\n" + f"{load!s:<46}" + "".join(f"{title:>12}" for title in titles) + "\n")
    for what, figure in figures.items():
        values = {name: [figure(r) for r in runs] for name, runs in found.items()}
        line = f"  {what:<44}" + "".join(map(_number, map(statistics.median, values.values())))
        notes = ""
        for name in others:
            pairs = [(a, b) for a, b in zip(values["ours"], values[name], strict=True) if b]
            ratio = statistics.median(a / b for a, b in pairs) if pairs else None
            line += f"{'' if ratio is None else f'{ratio:.2f}':>12}"
            aim = next((its[name] for start, its in aims.items() if what.startswith(start) and name in its), "")
            notes += f"  {name}: {judged(ratio, aim)}" if aim else ""
        sys.stdout.write(line + notes + "\n")
    sys.stdout.flush()


def _number(value: float) -> str:
    return f"{value:>12,.0f}" if value >= 1_000 else f"{value:>12.4g}"


def _cpu(kind: str, found: dict[str, Any]) -> float:
    return float(found["cpu"].get(kind, 0.0) / found["units"] * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--first", type=Path, help="checkout of the first edition")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20.0, help="of commits in each run (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="of the chart (default: %(default)s)")
    arguments = parser.parse_args()
    # An end by SIGTERM stops the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    charts = {}
    for load in LOADS:
        found = measure(load, arguments.seconds, arguments.rounds, arguments.first)
        show(load, found)
        # Of the last round; alone there is none.
        charts[str(load)] = {name: found[name][-1]["backlog"] for name in found if name != "alone"}
    draw_backlogs(charts, arguments.output)


if __name__ == "__main__":
    main()
