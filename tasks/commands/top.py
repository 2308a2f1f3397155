"""`celery -A tasks top [TOPIC…]`: status, live."""

import json
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count as counter

import click
from rich.console import Group
from rich.live import Live
from rich.text import Text

from db.pool import connect
from db.status import read_status
from tasks.commands.base import app_of, command, json_option
from tasks.commands.display import NOTHING, console, duration, number, plain, text
from tasks.commands.parameters import NAME, Seconds
from tasks.commands.situation import Situation, stuck_partitions
from tasks.commands.status import after_option

_END_KEYS = {"q", "Q", "\x03", "\x04", "\x1b"}


@command("top")
@click.argument("topic", type=NAME, nargs=-1)
@click.option(
    "--interval",
    type=Seconds(0.1, 3600),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Look this often.",
)
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many looks.")
@after_option
@json_option
def top(
    ctx: click.Context, topic: tuple[str, ...], interval: float, count: int | None, after: float, *, as_json: bool
) -> None:
    """Show status, live, what lags first.

    q or Ctrl-C ends.

    Without a terminal, or with --json, it prints lines: one a topic, or one JSON document a look.
    """
    app = app_of(ctx)
    out = console(ctx)
    names = topic or None

    def looks(pause: Callable[[float], bool]) -> Iterator[Situation]:
        """A situation each interval, until `pause` says that it is enough."""
        with connect(app.database_url, app.settings) as conn:
            before = read_status(conn, names)
            for look in counter(1):
                if pause(interval):
                    return
                reading = read_status(conn, names)
                yield Situation(
                    reading=reading,
                    rates=reading.rates(before),
                    stuck=stuck_partitions(app),
                    settings=app.settings,
                    after=after,
                )
                before = reading
                if look == count:
                    return

    # Ctrl-C is how this ends.
    with suppress(KeyboardInterrupt):
        if as_json or not out.is_terminal:
            for situation in looks(_sleep):
                click.echo(json.dumps(situation.as_dict(), default=str) if as_json else _lines(situation))
            return
        with _keys() as pressed, Live(console=out, screen=True, auto_refresh=False) as live:
            for situation in looks(pressed):
                heading = text(f"{time.strftime('%H:%M:%S')}  every {duration(interval)}, q ends", "dim")
                live.update(Group(heading, Text(), situation.render(busiest_first=True)), refresh=True)


def _sleep(seconds: float) -> bool:
    time.sleep(seconds)
    return False


@contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds, or until a key that ends us is pressed: then it returns True."""
    if not sys.stdin.isatty():
        yield _sleep
        return
    before = termios.tcgetattr(sys.stdin)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([sys.stdin], [], [], left)[0] and sys.stdin.read(1) in _END_KEYS:
                return True
        return False

    try:
        tty.setcbreak(sys.stdin)
        yield pressed
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _lines(situation: Situation) -> str:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    backlogs = situation.reading.backlogs()
    rates = situation.rates or {}
    lines = []
    for topic in situation.reading.topics:
        backlog = backlogs[topic.name]
        lag = NOTHING if backlog.lag is None else duration(backlog.lag)
        lines.append(
            f"{moment} {plain(topic.name)} end={topic.end_offsets} backlog={backlog.events} "
            f"lag={lag.replace(' ', '')} records/s={number(round(rates.get(topic.name, 0.0)))}"
        )
    return "\n".join(lines or [f"{moment} no topics"])
