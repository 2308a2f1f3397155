"""What a part of the benchmarks is going to measure, before it does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.measure import Sample, interleave

Arm = Callable[[], Sample]
# Called after every run.
Tick = Callable[[], object]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Something that `take` measures in `runs` runs of roughly `seconds` each, and reports in one group."""

    group: str
    scenario: str
    runs: int
    seconds: float
    take: Callable[[Tick], list[Entry]]

    @property
    def expected_seconds(self) -> float:
        return self.runs * self.seconds


def seconds_for(events: int) -> float:
    """What a run of that many events takes with everything around it: a guess, for the estimate of the rest alone."""
    return 0.3 + events / 110_000


def compared(
    group: str, scenario: str, arms: Mapping[str, Arm], rounds: int, *, seconds: float, **more: Any
) -> Measurement:
    """The usual one: the arms `ours`, `baseline` and `limit` in turn, one entry."""

    def take(tick: Tick) -> list[Entry]:
        return [compare(group, scenario, interleave(arms, rounds, tick=tick), **more)]

    return Measurement(group=group, scenario=scenario, runs=len(arms) * rounds, seconds=seconds, take=take)
