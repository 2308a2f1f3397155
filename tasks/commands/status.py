"""`celery -A tasks status [TOPIC…]`: where materialization stands, what waits and what for."""

import time

import click

from db.status import read_status
from tasks.commands.base import app_of, command, database, echo_json, json_option, timeout_option
from tasks.commands.display import console
from tasks.commands.parameters import NAME, Seconds
from tasks.commands.situation import Situation, read_hints

after_option = click.option(
    "--after",
    type=Seconds(min=0),
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="Report what waits, or is open, this long.",
)


@command("status")
@click.argument("topic", type=NAME, nargs=-1)
@click.option(
    "--interval",
    type=Seconds(0, 60),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Measure the rate over this time; 0: do without.",
)
@after_option
@timeout_option
@json_option
def status(ctx: click.Context, topic: tuple[str, ...], interval: float, after: float, *, as_json: bool) -> None:
    """Show backlog, lag and rate, and what waits for what.

    Backlog counts events that have no offset yet; lag is the age of the oldest of them. Of celery's own command of
    this name, use `celery -A tasks workers` instead.
    """
    app = app_of(ctx)
    names = topic or None
    with database(ctx) as conn:
        reading = read_status(conn, names)
        rates = None
        if interval > 0:
            time.sleep(interval)
            before, reading = reading, read_status(conn, names)
            rates = reading.rates(before)
    situation = Situation(reading=reading, rates=rates, hints=read_hints(app), settings=app.settings, after=after)
    if as_json:
        echo_json(situation.as_dict())
    else:
        console(ctx).print(situation.render())
