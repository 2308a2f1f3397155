"""How commands show things: colour only on a terminal, and names cannot reach it unescaped.

On a terminal 80 columns suffice: names that are too long end in an ellipsis, other text goes on below. Where there is
no terminal a program may read the lines, so nothing is cut or broken in two.
"""

import re
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
from rich.console import Console, RenderableType
from rich.filesize import pick_unit_and_suffix
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import Progress

_UNITS = {"d": 86_400, "h": 3600, "min": 60}
_ONE_DECIMAL_BELOW = 10
_STATEMENT = 200
_NARROWEST = 20
# More than any line of ours.
_NEVER_WRAPPED = 20_000

NOTHING = "-"


def console(ctx: click.Context, *, err: bool = False) -> Console:
    """Standard output, or standard error; plain where it is no terminal or colour was refused (-C, NO_COLOR)."""
    made = Console(
        stderr=err,
        no_color=True if ctx.obj.no_color else None,
        markup=False,
        emoji=False,
        highlight=False,
        # FORCE_COLOR and the like are about colours: a pipe stays a pipe.
        force_terminal=(sys.stderr if err else sys.stdout).isatty(),
    )
    made.width = max(made.width, _NARROWEST) if made.is_terminal else _NEVER_WRAPPED
    return made


def progress(ctx: click.Context) -> "Progress":
    """Progress bars on standard error, gone when done; invisible where that is no terminal."""
    from rich import progress as bars  # noqa: PLC0415 - slow to import, and few commands have bars

    target = console(ctx, err=True)
    description = bars.TextColumn("{task.description}", markup=False)
    shown = description, bars.BarColumn(bar_width=None), bars.MofNCompleteColumn(), bars.TimeRemainingColumn()
    return bars.Progress(*shown, console=target, transient=True, disable=not target.is_terminal)


def plain(value: object) -> str:
    """Text with control characters spelt out: a name or a key must not move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def text(value: object, style: str = "") -> Text:
    """A piece of output, in a style."""
    return Text(plain(value), style=style, overflow="fold")


def label(value: object) -> Text:
    """A name in a table: where it has no room it ends in an ellipsis, so that every row stays one line."""
    # The text says so and not the column, which would take the room of the others.
    return Text(plain(value), overflow="ellipsis", no_wrap=True)


def table(*columns: str) -> Table:
    """A table without lines. A column whose name starts with `>` is aligned to the right and keeps its room."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        right = column.startswith(">")
        header = text(column.removeprefix(">"))
        made.add_column(header, justify="right" if right else "left", no_wrap=right, overflow="fold")
    return made


def pairs(*rows: tuple[RenderableType, RenderableType], gap: int = 2) -> Table:
    """A name and what belongs to it, which stands to the right of the name also where it folds."""
    made = Table.grid(padding=(0, gap, 0, 0))
    made.add_column(no_wrap=True)
    made.add_column(overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def number(value: int) -> str:
    """1234567 as `1,234,567`."""
    return f"{value:,}"


def size(value: int) -> str:
    """Bytes as `1.5 MiB`."""
    unit, suffix = pick_unit_and_suffix(value, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"], 1024)
    return f"{value} B" if unit == 1 else f"{value / unit:,.1f} {suffix}"


def duration(seconds: float | None) -> str:
    """Seconds as `0.4 s`, `12 s`, `3 min`, `2 h` or `5 d`."""
    if seconds is None:
        return NOTHING
    for unit, length in _UNITS.items():
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < _ONE_DECIMAL_BELOW else f"{seconds:.0f} s"


def moment(milliseconds: int) -> str:
    """Milliseconds since the epoch as a date and time, UTC; as they are beyond what dates reach."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, tz=UTC).isoformat(sep=" ", timespec="milliseconds")[:23]
    except (ValueError, OverflowError, OSError):
        return str(milliseconds)


def statement(query: str | None) -> str:
    """A query on one line, without comments."""
    line = " ".join(re.sub(r"--[^\n]*", " ", query or "").split())
    return line if len(line) <= _STATEMENT else f"{line[: _STATEMENT - 1]}…"


def count(value: int, noun: str) -> str:
    """`1 partition`, `2 partitions`, `2 batches`."""
    ending = "" if value == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number(value)} {noun}{ending}"
