"""`celery -A tasks servers`: keep the embedded servers up, and say where they are."""

import signal
import threading

import click

from tasks.commands.base import app_of, command, echo_json, json_option


@command("servers")
@json_option
@click.option("--print", "only_print", is_flag=True, help="Print the addresses and end; the servers may end, too.")
def servers(ctx: click.Context, *, as_json: bool, only_print: bool) -> None:
    """Run the embedded Postgres and Redis until Ctrl-C, for psql and programs of your own.

    Workers, beat and commands share them; without this command they run as long as any of those does.
    """
    app = app_of(ctx)
    addresses = {"TIDEMARK_DATABASE_URL": app.database_url, "TIDEMARK_BROKER_URL": app.broker_url}
    if as_json:
        echo_json(addresses)
    else:
        for name, url in addresses.items():
            click.echo(f"export {name}='{url}'")
    if only_print:
        return
    click.echo("running; Ctrl-C ends", err=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
