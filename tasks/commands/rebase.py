"""`celery -A tasks rebase`: make a restored database work in its new cluster."""

from dataclasses import asdict

import click

from db.pool import connect
from db.rebase import rebase as rebase_log
from tasks.commands.base import app_of, command, echo_json, json_option


@command("rebase")
@json_option
def rebase(ctx: click.Context, *, as_json: bool) -> None:
    """After a restore into another cluster: place new commits after all that are there.

    Stop all brokers and workers first; until this has run, they refuse to work anyway.
    """
    app = app_of(ctx)
    with connect(app.database_url, app.settings) as conn:
        result = rebase_log(conn)
    if as_json:
        echo_json(None if result is None else asdict(result))
    elif result is None:
        click.echo("nothing to do: the database is in the cluster its log belongs to")
    else:
        click.echo(f"rebased from cluster {result.was or 'unknown'} to {result.now}")
