"""`celery -A tasks migrate`: bring the database's schema up to this program's."""

import click

from db.migrate import upgrade
from tasks.commands.base import app_of, command, database, echo_json, json_option, timeout_option


@command("migrate")
@timeout_option
@json_option
def migrate(ctx: click.Context, *, as_json: bool) -> None:
    """Create or upgrade the schema. Safe to repeat, and from several machines at once."""
    with database(ctx):
        # Alembic would wait for a frozen server for ever.
        pass
    before, after = upgrade(app_of(ctx).database_url)
    if as_json:
        echo_json({"before": before, "after": after})
    elif before == after:
        click.echo(f"schema is up to date (version {after})")
    else:
        click.echo(f"schema upgraded from version {before or 'none'} to {after}")
