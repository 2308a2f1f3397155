"""`celery -A tasks materialize TOPIC`: ask for a materialization now."""

import click
from celery.exceptions import TimeoutError as ResultTimeoutError

from db.status import find_partition
from tasks.commands.base import Server, app_of, command, database, echo_json, json_option, reaching
from tasks.commands.display import count, number
from tasks.commands.parameters import NAME, PARTITION, Seconds


@command("materialize")
@click.argument("topic", type=NAME)
@click.option("-p", "--partition", type=PARTITION, help="Only this partition.")
@click.option("--wait", is_flag=True, help="Wait until it is done, and print what was done.")
@click.option(
    "--timeout", type=Seconds(0), default=300, show_default=True, metavar="SECONDS", help="How long --wait waits."
)
@json_option
def materialize(
    ctx: click.Context, topic: str, partition: int | None, *, wait: bool, timeout: float, as_json: bool
) -> None:
    """Materialize the backlog of TOPIC now: enqueue the tasks that do it."""
    from tasks.dispatch import enqueue  # noqa: PLC0415 - not for --help

    app = app_of(ctx)
    if wait and app.redis_url is None:
        raise click.ClickException("--wait needs a Redis for results; set TIDEMARK_REDIS_URL")
    # What follows tries again and again when a server is away: better to know before.
    with database(ctx) as conn:
        find_partition(conn, topic, partition or 0)
    with reaching(ctx, Server.BROKER), app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1)
    ids = enqueue(app, topic, partition, ignore_result=not wait)
    if not wait:
        if as_json:
            echo_json({"tasks": ids})
        else:
            click.echo(f"{topic}: {count(len(ids), 'task')} queued")
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
        click.echo(f"{topic}: {count(events, 'event')} materialized, {number(records)} records")
