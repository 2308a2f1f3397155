"""`celery -A tasks status [TOPIC…]`: where materialization stands, what waits and what for; `top`: the same, live."""

import json
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice

import click
from rich.console import Group
from rich.live import Live
from sparklines import sparklines

from db.status import read_status
from tasks.commands.base import JSON, OUTPUT, TIMEOUT, answer, app_of, command, database
from tasks.commands.display import console, duration, number, plain, text
from tasks.commands.parameters import NAME, Seconds
from tasks.commands.situation import Situation, read_hints

# How far back the curves reach, and with how many bars.
_SECONDS = 300.0
_WIDTH = 10
# Lag and records per second by topic.
_Look = dict[str, tuple[float, ...]]
_NOTHING_YET = (0.0, 0.0)
_END_KEYS = {"q", "Q", "\x03", "\x04", "\x1b"}

_AFTER = click.Option(["--after"], type=Seconds(min=0), default=5.0, help="Report what waits, or is open, this long.")


@command("status", _AFTER, TIMEOUT, JSON)
@click.argument("topic", type=NAME, nargs=-1)
@click.option("--interval", type=Seconds(0, 60), default=1.0, help="Measure the rate over this time; 0: do without.")
def status(ctx: click.Context, topic: tuple[str, ...], interval: float, after: float) -> None:
    """Show backlog, lag and rate, and what waits for what.

    Backlog counts events that have no offset yet; lag is the age of the oldest of them. Of celery's own command of
    this name, use `celery -A tasks workers` instead.
    """
    app = app_of(ctx)
    with database(ctx) as conn:
        reading, rates = read_status(conn, topic or None), None
        if interval > 0:
            time.sleep(interval)
            before, reading = reading, read_status(conn, topic or None)
            rates = reading.rates(before)
    situation = Situation(reading=reading, rates=rates, hints=read_hints(app), settings=app.settings, after=after)
    answer(ctx, situation.as_dict(), situation.render())


@command("top", _AFTER, TIMEOUT, JSON)
@click.argument("topic", type=NAME, nargs=-1)
@click.option("--interval", type=Seconds(0.1, 3600), default=1.0, help="Look this often.")
@click.option("-n", "--count", type=click.IntRange(min=1), help="End after so many looks.")
def top(ctx: click.Context, topic: tuple[str, ...], interval: float, count: int | None, after: float) -> None:
    """Show status, live, what lags first.

    q or Ctrl-C ends.

    Without a terminal, or with --json, it prints lines: one a topic, or one JSON document a look.
    """
    app, out, as_json = app_of(ctx), console(ctx), OUTPUT in ctx.meta

    def looks(pause: Callable[[float], bool | None]) -> Iterator[Situation]:
        """A situation each interval, until `pause` says that it is enough."""
        with database(ctx) as conn:
            before = read_status(conn, topic or None)
            while not pause(interval):
                now = read_status(conn, topic or None)
                hints, rates = read_hints(app), now.rates(before)
                yield Situation(reading=now, rates=rates, hints=hints, settings=app.settings, after=after)
                before = now

    # Ctrl-C is how this ends.
    with suppress(KeyboardInterrupt):
        if as_json or not out.is_terminal:
            for situation in islice(looks(time.sleep), count):
                click.echo(json.dumps(situation.as_dict(), default=str) if as_json else _lines(situation))
            return
        curves = Curves(interval)
        with _keys() as pressed, Live(console=out, screen=True, auto_refresh=False) as live:
            for situation in islice(looks(pressed), count):
                curves.add(situation)
                what = f"every {duration(interval)}, curves of {duration(curves.seconds)}, q ends"
                heading = text(f"{time.strftime('%H:%M:%S')}  {what}", "dim")
                live.update(Group(heading, "", situation.render(curves.of)), refresh=True)


class Curves:
    """Lag and rate of each topic over the last minutes, a line of bars each.

    A bar is the greatest value of some looks: of one at first, of twice as many whenever the line is full, until it
    reaches back far enough; then the oldest falls off.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._looks = 0
        self._looks_per_bar = 1
        self._bars: list[_Look] = []

    @property
    def seconds(self) -> float:
        """How far back the line reaches."""
        return len(self._bars) * self._looks_per_bar * self._interval

    def add(self, situation: Situation) -> None:
        backlogs, rates = situation.reading.backlogs(), situation.rates or {}
        look: _Look = {t.name: (backlogs[t.name].lag or 0, rates.get(t.name, 0)) for t in situation.reading.topics}
        if self._looks % self._looks_per_bar:
            look = _greatest(self._bars.pop(), look)
        self._bars.append(look)
        self._looks += 1
        if len(self._bars) > _WIDTH:
            if self.seconds >= _SECONDS:
                del self._bars[0]
            else:
                self._bars = list(map(_greatest, self._bars[::2], [*self._bars[1::2], {}]))
                self._looks_per_bar *= 2

    def of(self, topic: str) -> tuple[str, str]:
        """The lines of its lag and its rate."""
        values = [bar.get(topic, _NOTHING_YET) for bar in self._bars]
        # From zero to the greatest of them; where all are zero the line lies on the ground.
        lag, rate = (sparklines(n, minimum=0, maximum=max(n) or 1)[0].rjust(_WIDTH) for n in zip(*values, strict=True))
        return lag, rate


def _greatest(a: _Look, b: _Look) -> _Look:
    return {t: tuple(map(max, a.get(t, _NOTHING_YET), b.get(t, _NOTHING_YET))) for t in a | b}


@contextmanager
def _keys() -> Iterator[Callable[[float], bool | None]]:
    """A function that waits so many seconds, or until a key that ends us is pressed: then it returns True."""
    if not sys.stdin.isatty():
        yield time.sleep
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
    backlogs, rates = situation.reading.backlogs(), situation.rates or {}
    lines = []
    for topic in situation.reading.topics:
        backlog = backlogs[topic.name]
        lines.append(
            f"{moment} {plain(topic.name)} end={topic.end_offsets} backlog={backlog.events} "
            f"lag={duration(backlog.lag).replace(' ', '')} records/s={number(round(rates.get(topic.name, 0.0)))}"
        )
    return "\n".join(lines or [f"{moment} no topics"])
