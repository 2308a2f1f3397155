"""`celery -A tasks rebase`: make a restored database work in its new cluster."""

from dataclasses import asdict

import click

from db.rebase import rebase as rebase_log
from tasks.commands.base import command, database, echo_json, json_option, timeout_option


@command("rebase")
@timeout_option
@json_option
def rebase(ctx: click.Context, *, as_json: bool) -> None:
    """After a restore into another cluster: place new commits after all that are there.

    Stop all brokers and workers first; until this has run, they refuse to work anyway.
    """
    with database(ctx) as conn:
        result = rebase_log(conn)
    if result is None:
        said = "nothing to do: the database is in the cluster its log belongs to"
    else:
        said = f"rebased from cluster {result.was or 'unknown'} to {result.now}"
    if as_json:
        echo_json({"rebased": result is not None, **(asdict(result) if result else {}), "message": said})
    else:
        click.echo(said)
