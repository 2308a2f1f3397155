"""Shows how far the benchmarks are: a bar on a terminal, elsewhere a line when a measurement starts and ends."""

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from time import monotonic, strftime
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from tests.benchmarks.entry import Entry
from tests.benchmarks.plan import Measurement

# So many seconds are taken to have gone as expected: the first runs alone say little about the machine.
_PRIOR = 10.0


def remaining(*, expected: float, done: float, took: float, since: float) -> float:
    """Seconds that are left, when `done` of the `expected` seconds took `took`, and that was `since` seconds ago."""
    pace = (took + _PRIOR) / (done + _PRIOR)
    return max(0.0, (expected - done) * pace - since)


def ratios(entry: Entry) -> str:
    """What an entry says in a few words."""
    found = [
        f"{value:.2f} of the {name}"
        for name, value in (("baseline", entry.vs_baseline), ("limit", entry.vs_limit))
        if value is not None
    ]
    return ", ".join(found) or f"{entry.ours:,.0f} {entry.unit}"


class _Rest(ProgressColumn):
    """What is left, counted down between the runs."""

    def __init__(self, left: Callable[[], float]) -> None:
        super().__init__()
        self._left = left

    def render(self, task: Task) -> Text:
        return Text(f"{timedelta(seconds=round(self._left()))} left", style="progress.remaining")


class Display:
    """The progress through a plan: runs are counted, and weighted by what they are expected to take."""

    def __init__(
        self,
        console: Console,
        plans: Mapping[str, Sequence[Measurement]],
        *,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._console = console
        self._clock = clock
        measurements = [measurement for plan in plans.values() for measurement in plan]
        self._expected = sum(m.expected_seconds for m in measurements)
        self._runs_planned = sum(m.runs for m in measurements)
        self._runs = 0
        self._done = 0.0
        self._began = self._last = clock()
        self._now: tuple[str, Measurement] | None = None
        self._bar = Progress(
            TextColumn("{task.description:<30.30}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[runs]} runs"),
            TimeElapsedColumn(),
            _Rest(self.left),
            console=console,
            # Every refresh takes a little of the cores that are measured.
            refresh_per_second=2,
            expand=True,
            disable=not console.is_interactive,
        )
        self._task = self._bar.add_task("", total=self._expected, runs=self._counted())

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def left(self) -> float:
        took, since = self._last - self._began, self._clock() - self._last
        return remaining(expected=self._expected, done=self._done, took=took, since=since)

    def begin(self, part: str, measurement: Measurement) -> None:
        self._now = part, measurement
        self._bar.update(self._task, description=f"{part}: {measurement.scenario}")
        if not self._console.is_interactive:
            share = self._done / self._expected
            left = timedelta(seconds=round(self.left()))
            self._say(f"{measurement.scenario} ({measurement.runs} runs; {share:.0%} done, {left} left)")

    def tick(self) -> None:
        """A run is over."""
        assert self._now is not None
        self._runs += 1
        self._done += self._now[1].seconds
        self._last = self._clock()
        self._bar.update(self._task, completed=self._done, runs=self._counted())

    def end(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._say(f"{entry.scenario}: {ratios(entry)}")

    def _counted(self) -> str:
        return f"{self._runs}/{self._runs_planned}"

    def _say(self, what: str) -> None:
        """A line; on a terminal it scrolls away above the bar."""
        assert self._now is not None
        line = f"{strftime('%H:%M:%S')}  {self._now[0]:<10}{what}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
