"""`celery -A tasks rebase`: make a restored database work in its new cluster."""

import click
import psycopg

from db.rebase import rebase as rebase_cursors
from tasks.commands.base import app_of, command, echo_json, json_option


@command("rebase")
@json_option
def rebase(ctx: click.Context, *, as_json: bool) -> None:
    """After a restore into another cluster: give the cursors transaction ids of this one.

    Stop all brokers and workers first; until this has run, they refuse to work anyway.
    """
    # Not from the pool: rewriting all pending events may take longer than its time-outs allow.
    with psycopg.connect(app_of(ctx).database_url, autocommit=True) as conn:
        result = rebase_cursors(conn)
    if as_json:
        echo_json(None if result is None else {"was": result.was, "now": result.now, "pending": result.pending_events})
    elif result is None:
        click.echo("nothing to do: the database is in the cluster its cursors belong to")
    else:
        click.echo(f"rebased from cluster {result.was} to {result.now}; {result.pending_events} events pending")
