"""`celery -A tasks servers`: keep the embedded servers up, and say where they are."""

import signal
import time
from collections.abc import Mapping

import click

from config.embedded.keeper import Lease
from tasks.commands.base import app_of, command, echo_json, json_option

_TICK = 0.5


@command("servers")
@json_option
@click.option("--print", "only_print", is_flag=True, help="Print the addresses and end; the servers may end, too.")
def servers(ctx: click.Context, *, as_json: bool, only_print: bool) -> None:
    """Run the embedded Postgres and Redis until Ctrl-C, for psql and programs of your own.

    Workers, beat and commands share them; without this command they run as long as any of those does. Where
    TIDEMARK_DATABASE_URL or TIDEMARK_BROKER_URL is set, that server is yours and only the other one runs.
    """
    app = app_of(ctx)
    leases = {}
    if app.settings.database_url is None:
        leases["TIDEMARK_DATABASE_URL"] = app.embedded_postgres
    if app.settings.broker_url is None:
        leases["TIDEMARK_BROKER_URL"] = app.embedded_redis
    if not leases:
        raise click.ClickException(
            "TIDEMARK_DATABASE_URL and TIDEMARK_BROKER_URL are set: no embedded server is needed"
        )
    if as_json:
        echo_json({name: lease.url for name, lease in leases.items()})
    else:
        for name, lease in leases.items():
            click.echo(f"export {name}='{lease.url}'")
    if not only_print:
        _watch(leases)


def _watch(leases: Mapping[str, Lease]) -> None:
    """Say when a server ends and when it runs again; end with an error when nobody would start it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    said = ""
    try:
        while True:
            down = [name for name, lease in leases.items() if not lease.runs()]
            now = f"{' and '.join(down)}: ended, and is being started again" if down else "running; Ctrl-C ends"
            if now != said:
                click.echo(now, err=True)
            said = now
            time.sleep(_TICK)
    except KeyboardInterrupt:
        return
