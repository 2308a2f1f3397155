"""`python -m tests.demo`, or `make demo`: everything at once on this machine, under load, and checked."""

import click
import psycopg
import redis

from config.errors import TidemarkError
from config.settings import load_settings
from tests.demo.plan import Plan
from tests.demo.run import run
from tests.demo.view import Screen


@click.command("demo")
@click.option("--seconds", default=20.0, show_default=True, type=click.FloatRange(min=1), help="Produce so long.")
@click.option("--producers", default=8, show_default=True, type=click.IntRange(1, 64), help="Producer processes.")
@click.option(
    "--rate",
    default=10.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Commits a second of each producer, 24 to 48 batches each.",
)
@click.option("--workers", default=3, show_default=True, type=click.IntRange(1, 64), help="They share the shards.")
@click.option("--keep", is_flag=True, help="Stay up after the check, to look around, until Ctrl-C.")
@click.pass_context
def demo(ctx: click.Context, *, seconds: float, producers: int, rate: float, workers: int, keep: bool) -> None:
    """Run the whole pipeline under load, then check that nothing was lost, doubled or out of order.

    Starts servers, workers, beat and Flower, in a temporary directory, and stops them all in the end. Uses
    TIDEMARK_DATABASE_URL and TIDEMARK_BROKER_URL where they are set. Exit code 1 if an invariant is violated.
    """
    try:
        settings = load_settings()
        plan = Plan(
            seconds=seconds,
            producers=producers,
            rate=rate,
            workers=workers,
            shards=settings.shards,
            keep=keep,
            database_url=settings.database_url,
            broker_url=settings.broker_url,
        )
        ctx.exit(run(plan, settings, Screen()))
    except (TidemarkError, psycopg.Error, redis.RedisError) as error:
        raise click.ClickException(" ".join(str(error).split())) from error


if __name__ == "__main__":
    demo(prog_name="python -m tests.demo")
