"""`celery -A tasks compare`: a candidate strategy beside the current one, and whether the difference is real."""

import click
from rich.console import Console

from config.errors import SettingsError
from tasks.commands.base import Server, app_of, command, echo_json, json_option, reaching, timeout_option
from tasks.commands.display import NOTHING, console, number, table, text
from tasks.compare import Comparison, Estimate, SideFigures, forget, read

_NOTHING_COMPARED = (
    "nothing is compared; give all workers a candidate, and some time: "
    "TIDEMARK_CANDIDATE=incremental TIDEMARK_CANDIDATE_PERCENT=10"
)
_STYLES = {"real": "bold green", "not shown": "yellow", "too few transactions": "yellow"}


@command("compare")
@click.option(
    "--confidence",
    type=click.FloatRange(0.5, 0.9999),
    default=0.99,
    show_default=True,
    help="How sure an interval is to hold the true value.",
)
@click.option("--reset", is_flag=True, help="Drop what was compared so far, and show nothing.")
@timeout_option
@json_option
def compare(ctx: click.Context, confidence: float, *, reset: bool, as_json: bool) -> None:
    """Show what the candidate strategy (TIDEMARK_CANDIDATE) brings.

    By the figures of all workers since the candidate was set, or since --reset: those of its partitions, and of as many
    that keep the current strategy. Transactions are compared with such as had about as many events and partitions.
    """
    redis = app_of(ctx).redis
    if redis is None:
        raise SettingsError("compare reads the workers' figures in Redis; there is none: set TIDEMARK_REDIS_URL")
    with reaching(ctx, Server.REDIS):
        if reset:
            forget(redis)
        found = read(redis, confidence=confidence)
    said = _NOTHING_COMPARED if not found else None
    if reset:
        said = "compared from now on"
    if as_json:
        message = {} if said is None else {"message": said}
        echo_json({"comparisons": [comparison.as_dict() for comparison in found], **message})
        return
    out = console(ctx)
    if said is not None:
        out.print(text(said))
    for comparison in found:
        _show(out, comparison)


def _show(out: Console, found: Comparison) -> None:
    sides = (found.current, found.candidate)
    shown = table("", f">{found.current.strategy}", f">{found.candidate.strategy}, candidate")
    for name, values in (
        ("transactions", [number(side.transactions) for side in sides]),
        ("of them without events", [number(side.empty) for side in sides]),
        ("events", [number(side.events) for side in sides]),
        ("events/s in transactions", [number(round(side.events_per_second)) for side in sides]),
        ("µs an event", [_interval(side.micros_per_event) for side in sides]),
        ("lock wait, ms", [_interval(side.lock_wait_ms) for side in sides]),
        ("failed attempts", [_errors(side) for side in sides]),
    ):
        shown.add_row(text(name), *(text(value) for value in values))
    out.print(shown)
    out.print()
    out.print(text(f"Time, transactions alike: {_words(found)}"))
    out.print(text(f"Lock wait: {_interval(found.lock_wait_difference_ms, signed=True)} ms, candidate less current"))
    out.print(text(f"Difference of times: {found.verdict}", _STYLES[found.verdict]))
    out.print(text(f"Brackets: {found.confidence:.4g} confidence; method: tasks/compare.py", "dim"))


def _words(found: Comparison) -> str:
    if found.time_ratio is None:
        return "nothing alike on both sides yet"
    a, b = found.compared
    return f"{_interval(found.time_ratio)} of {found.current.strategy}'s ({number(a)} and {number(b)} transactions)"


def _interval(estimate: Estimate | None, *, signed: bool = False) -> str:
    if estimate is None:
        return NOTHING
    kind = "+.3g" if signed else ".3g"
    return f"{estimate.value:{kind}} [{estimate.low:{kind}}, {estimate.high:{kind}}]"


def _errors(side: SideFigures) -> str:
    if side.error_rate is None:
        return NOTHING
    rate = side.error_rate
    return f"{number(side.errors)}: {rate.value:.2%} [{rate.low:.2%}, {rate.high:.2%}]"
