"""Interleaved measurements and their medians."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One run: seconds by the clock, CPU seconds of the server's processes, units of work done, log written."""

    seconds: float
    cpu_seconds: float
    units: int
    # 0 where it was not looked at.
    log_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """All runs of one arm."""

    samples: tuple[Sample, ...]

    @property
    def rate(self) -> float:
        """Units per second, the median run."""
        return statistics.median(s.units / s.seconds for s in self.samples)

    @property
    def cpu_micros(self) -> float:
        """Microseconds of server CPU per unit, the median run."""
        return statistics.median(s.cpu_seconds / s.units for s in self.samples) * 1e6

    @property
    def log_bytes(self) -> float:
        """Bytes of log per unit, the median run."""
        return statistics.median(s.log_bytes / s.units for s in self.samples)


def interleave(
    arms: Mapping[str, Callable[[], Sample]], rounds: int, *, tick: Callable[[], object] = lambda: None
) -> dict[str, Result]:
    """Run every arm once per round, so that whatever disturbs the machine disturbs all of them.

    Every second round goes backwards: no arm always follows the same other one.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in arms}
    for number in range(rounds):
        names = list(arms)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            samples[name].append(arms[name]())
            tick()
    return {name: Result(samples=tuple(values)) for name, values in samples.items()}


def share(ours: Result, limit: Result) -> float:
    """Our rate as a share of the limit's: the median of the rounds' ratios."""
    return statistics.median(
        (a.units / a.seconds) / (b.units / b.seconds) for a, b in zip(ours.samples, limit.samples, strict=True)
    )
