"""`celery -A tasks health PROGRAM` and `servers`: programs and embedded servers of this machine."""

import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict

import click

from config.embedded.keeper import Lease
from config.heartbeat import PROGRAMS, Program, examine, heartbeat_file
from tasks.commands.base import JSON, answer, app_of, command

_TICK = 0.5


@command("health", JSON)
@click.argument("program", type=click.Choice(PROGRAMS))
@click.option("--ready", is_flag=True, help="Ask whether it does its work by now, too.")
def health(ctx: click.Context, program: Program, *, ready: bool) -> None:
    """Tell by its heartbeat file whether a worker, beat or the exporter lives; exit code 1 when it does not.

    Looks at a file only, so a broker or database that is away makes no difference. Where starting celery's program for
    that is too much: python -m config.heartbeat FILE [--ready].
    """
    found = examine(heartbeat_file(app_of(ctx).settings, program))
    healthy = found.ready if ready else found.alive
    answer(ctx, asdict(found), f"{program}: {found.reason}", err=not healthy)
    if not healthy:
        ctx.exit(1)


@command("servers", JSON)
@click.option("--print", "only_print", is_flag=True, help="Print the addresses and end; the servers may end, too.")
def servers(ctx: click.Context, *, only_print: bool) -> None:
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
        both = "TIDEMARK_DATABASE_URL and TIDEMARK_BROKER_URL"
        raise click.ClickException(f"{both} are set: no embedded server is needed")
    urls = {name: lease.url for name, lease in leases.items()}
    answer(ctx, urls, "\n".join(f"export {name}='{url}'" for name, url in urls.items()))
    if not only_print:
        _watch(leases)


def _watch(leases: Mapping[str, Lease]) -> None:
    """Say when a server ends and when it runs again; end with an error when nobody would start it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    said = ""
    with suppress(KeyboardInterrupt):
        while True:
            down = [name for name, lease in leases.items() if not lease.runs()]
            now = f"{' and '.join(down)}: ended, and is being started again" if down else "running; Ctrl-C ends"
            if now != said:
                click.echo(now, err=True)
            said = now
            time.sleep(_TICK)
