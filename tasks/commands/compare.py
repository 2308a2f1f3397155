"""`celery -A tasks compare`: a candidate strategy beside the current one, and whether the difference is real."""

import click
from rich.console import Group, RenderableType

from config.errors import SettingsError
from tasks.commands.base import JSON, TIMEOUT, Server, answer, app_of, command, reaching
from tasks.commands.display import NOTHING, number, table, text
from tasks.compare import Comparison, forget, read

_NOTHING_COMPARED = (
    "nothing is compared; give all workers a candidate, and some time: "
    "TIDEMARK_CANDIDATE=incremental TIDEMARK_CANDIDATE_PERCENT=10"
)
_STYLES = {"real": "bold green", "not shown": "yellow", "too few transactions": "yellow"}


@command("compare", TIMEOUT, JSON)
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 0.9999),
    default=0.99,
    help="How sure an interval is to hold the true value.",
)
@click.option("--reset", is_flag=True, help="Drop what was compared so far, and show nothing.")
def compare(ctx: click.Context, confidence: float, *, reset: bool) -> None:
    """Show what the candidate strategy (TIDEMARK_CANDIDATE) brings.

    By what all workers noted since the candidate was set, or since --reset: the newest 5,000 transactions of its
    partitions, and of as many partitions that keep the current strategy. A transaction is compared with one that had
    about as many events and partitions.
    """
    redis = app_of(ctx).redis
    if redis is None:
        raise SettingsError("compare reads what workers noted in Redis; there is none: set TIDEMARK_REDIS_URL")
    with reaching(ctx, Server.REDIS):
        if reset:
            forget(redis)
        found = read(redis, confidence=confidence)
    said = "compared from now on" if reset else None if found else _NOTHING_COMPARED
    message = {} if said is None else {"message": said}
    document = {"comparisons": [comparison.as_dict() for comparison in found], **message}
    answer(ctx, document, Group(*map(text, message.values()), *map(_table, found)))


def _table(found: Comparison) -> RenderableType:
    sides = (found.current, found.candidate)
    shown = table("", f">{found.current.strategy}", f">{found.candidate.strategy}, candidate")
    rows = {
        "transactions": [number(side.transactions) for side in sides],
        "of them without events": [number(side.empty) for side in sides],
        "failed attempts": [number(side.failed) for side in sides],
        "events": [number(side.events) for side in sides],
        "events/s in transactions": [number(round(side.events_per_second)) for side in sides],
        "µs an event": [_rounded(side.micros_per_event) for side in sides],
        "lock wait, ms": [_rounded(side.lock_wait_ms) for side in sides],
    }
    for name, values in rows.items():
        shown.add_row(name, *values)
    return Group(shown, "", text(found.words, _STYLES[found.verdict]))


def _rounded(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}"
