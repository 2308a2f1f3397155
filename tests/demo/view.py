"""Shows a run: a panel that is redrawn on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tests.demo.check import Finding
from tests.demo.figures import Figures
from tests.demo.fleet import Flower

_WIDTH = 80
_LINE_SECONDS = 1.0
_OFFSETS_A_LINE = 8


class View(Protocol):
    """Shows how far a run is; `phase` says what is going on, `elapsed` is seconds since the demo began."""

    def show(self, phase: str, elapsed: float, figures: Figures) -> None: ...


class Screen:
    """Everything the demo prints."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        if self._console.width > _WIDTH and self._console.is_terminal:
            self._console.width = _WIDTH

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def follow(self, flower: Flower) -> Iterator[View]:
        """What shows the run inside the block."""
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            with Live(console=self._console, auto_refresh=False, transient=False) as live:
                yield _Panel(live, flower)
        else:
            yield _Lines(self)

    def report(self, findings: Sequence[Finding]) -> None:
        """One line for each invariant, and the first offending row below those that are broken."""
        for finding in findings:
            broken = finding.violation is not None
            line = Text(f"{finding.number} {finding.name:<16} {finding.counted:<50} ")
            line.append("VIOLATED" if broken else "ok", style="bold red" if broken else "green")
            self._console.print(line, soft_wrap=True)
            if finding.violation is not None:
                self.say(f"    {finding.violation}")


class _Lines:
    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._next = 0.0
        self._phase = ""
        self._write("", "", "committed", "per s", "materialized", "per s", "backlog", "lag p50", "p99")

    def show(self, phase: str, elapsed: float, figures: Figures) -> None:
        # The first line of every phase is shown, the last phase in full.
        if time.monotonic() < self._next and phase == self._phase:
            return
        self._phase = phase
        self._next = time.monotonic() + _LINE_SECONDS
        self._write(
            f"{elapsed:.1f} s",
            phase,
            f"{figures.committed:,}",
            f"{figures.committed_rate:,.0f}",
            f"{figures.materialized:,}",
            f"{figures.materialized_rate:,.0f}",
            f"{figures.backlog:,}",
            seconds_text(figures.lag_p50),
            seconds_text(figures.lag_p99),
        )

    def _write(self, at: str, phase: str, *columns: str) -> None:
        widths = (9, 6, 12, 6, 7, 7, 6)
        numbers = " ".join(f"{text:>{width}}" for text, width in zip(columns, widths, strict=True))
        self._screen.say(f"{at:>7}  {phase:<9} {numbers}")


class _Panel:
    def __init__(self, live: Live, flower: Flower) -> None:
        self._live = live
        self._flower = flower

    def show(self, phase: str, elapsed: float, figures: Figures) -> None:
        self._live.update(self._draw(phase, elapsed, figures), refresh=True)

    def _draw(self, phase: str, elapsed: float, figures: Figures) -> RenderableType:
        numbers = Table.grid(padding=(0, 2))
        numbers.add_column(style="bold", width=13)
        numbers.add_column(justify="right", width=12)
        numbers.add_column(justify="right", width=20)
        numbers.add_row("events", "total", "a second", style="dim")
        numbers.add_row("committed", f"{figures.committed:,}", f"{figures.committed_rate:,.0f}")
        numbers.add_row("materialized", f"{figures.materialized:,}", f"{figures.materialized_rate:,.0f}")
        numbers.add_row("backlog", f"{figures.backlog:,}", "")
        numbers.add_row("lag", f"p50 {seconds_text(figures.lag_p50)}", f"p99 {seconds_text(figures.lag_p99)}")
        offsets = Table.grid(padding=(0, 1))
        offsets.add_column(style="bold", width=14, no_wrap=True, overflow="ellipsis")
        for _ in range(_OFFSETS_A_LINE):
            offsets.add_column(justify="right", min_width=6)
        offsets.add_row("end offsets", "", style="dim")
        for topic, ends in figures.end_offsets.items():
            for first in range(0, len(ends), _OFFSETS_A_LINE):
                line = ends[first : first + _OFFSETS_A_LINE]
                offsets.add_row("" if first else topic, *map(str, line))
        flower = Text.assemble(("Flower  ", "bold"), self._flower.login)
        return Panel(
            Group(numbers, "", offsets, "", flower),
            title=f"Tidemark: {phase}",
            subtitle=f"{elapsed:.0f} s",
            width=min(_WIDTH, self._live.console.width),
        )


def seconds_text(value: float | None) -> str:
    """Seconds with two decimals, a dash for none."""
    return "-" if value is None else f"{value:.2f} s"


def shards_text(shards: Sequence[int]) -> str:
    """Neighbours as ranges: `0-2, 5`."""
    ranges: list[list[int]] = []
    for shard in sorted(shards):
        if ranges and ranges[-1][-1] == shard - 1:
            ranges[-1].append(shard)
        else:
            ranges.append([shard])
    return ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in ranges) or "none"
