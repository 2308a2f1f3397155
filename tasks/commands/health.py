"""`celery -A tasks health PROGRAM`: whether a program on this machine lives, for supervisors."""

import click

from config.heartbeat import examine
from tasks.commands.base import app_of, command, echo_json, json_option
from tasks.health import PROGRAMS, Program, heartbeat_file


@command("health")
@click.argument("program", type=click.Choice(PROGRAMS))
@click.option("--ready", is_flag=True, help="Ask whether it does its work by now, too.")
@json_option
def health(ctx: click.Context, program: Program, *, ready: bool, as_json: bool) -> None:
    """Tell by its heartbeat file whether a worker, beat or the exporter lives; exit code 1 when it does not.

    Looks at a file only, so a broker or database that is away makes no difference. Where starting celery's program for
    that is too much: python -m config.heartbeat FILE [--ready].
    """
    found = examine(heartbeat_file(app_of(ctx).settings, program))
    healthy = found.ready if ready else found.alive
    if as_json:
        echo_json({"alive": found.alive, "ready": found.ready, "age": found.age, "reason": found.reason})
    else:
        click.echo(f"{program}: {found.reason}", err=not healthy)
    if not healthy:
        ctx.exit(1)
