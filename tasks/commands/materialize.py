"""`celery -A tasks materialize TOPIC`: ask for a materialization now."""

import click
from celery.exceptions import TimeoutError as ResultTimeoutError

from tasks.commands.base import app_of, command, echo_json, json_option
from tasks.dispatch import enqueue


@command("materialize")
@click.argument("topic")
@click.option("-p", "--partition", type=click.IntRange(min=0), help="Only this partition.")
@click.option("--wait", is_flag=True, help="Wait until it is done, and print what was done.")
@click.option("--timeout", type=click.FloatRange(min=0), default=300, show_default=True, help="Seconds --wait waits.")
@json_option
def materialize(
    ctx: click.Context, topic: str, partition: int | None, *, wait: bool, timeout: float, as_json: bool
) -> None:
    """Materialize the backlog of TOPIC now: enqueue the tasks that do it."""
    app = app_of(ctx)
    if wait and app.redis_url is None:
        raise click.ClickException("--wait needs a Redis for results; set TIDEMARK_REDIS_URL")
    ids = enqueue(app, topic, partition, ignore_result=not wait)
    if not wait:
        if as_json:
            echo_json({"tasks": ids})
        else:
            click.echo(f"{topic}: {len(ids)} task{'s' * (len(ids) != 1)} queued")
        return
    try:
        done = [app.AsyncResult(i).get(timeout=timeout) for i in ids]
    except ResultTimeoutError:
        raise click.ClickException(
            f"{topic}: not done after {timeout:g} s; is a worker running (celery -A tasks worker)?"
        ) from None
    events, records = (sum(d[key] for d in done) for key in ("events_processed", "records"))
    if as_json:
        echo_json({"tasks": ids, "events": events, "records": records, "metrics": done})
    else:
        click.echo(f"{topic}: {events} events materialized, {records} records")
