"""`celery -A tasks adopt`: takes over the log of the seed's system."""

from dataclasses import asdict

import click

from db.adopt import Adoption, discard
from db.adopt import adopt as adopt_log
from tasks.commands.base import JSON, TIMEOUT, answer, command, database
from tasks.commands.display import count, progress
from tasks.commands.parameters import NAME


@command("adopt", TIMEOUT, JSON)
@click.option("--schema", type=NAME, default="public", help="Where the seed's tables are.")
@click.option("--dry-run", is_flag=True, help="Look whether they can be adopted, and write nothing.")
@click.option("--discard", "back", is_flag=True, help="Take back what was copied, where that is not complete.")
def adopt(ctx: click.Context, schema: str, *, dry_run: bool, back: bool) -> None:
    """Take over topics, batches and unprocessed events of the seed's system from its tables in this database.

    Every batch keeps its offset. Stop the seed's programs first. After Ctrl-C or a crash run it again: it goes on
    where it was. The topics appear in the last step, when all batches were compared with the seed's.
    """
    if back and dry_run:
        raise click.UsageError("--discard and --dry-run exclude each other", ctx)
    with database(ctx) as conn, progress(ctx) as bar:
        if back:
            gone = discard(conn)
            answer(ctx, {"discarded": gone}, f"taken back: {count(gone, 'batch')}")
            return
        task = bar.add_task("copied and compared", total=None)

        def watch(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        adopted = adopt_log(conn, schema=schema, dry_run=dry_run, watch=watch)
    answer(ctx, {**asdict(adopted), "dry_run": dry_run}, _say(adopted, schema))


def _say(adopted: Adoption, schema: str) -> str:
    what = f"{count(adopted.topics, 'topic')}, {count(adopted.partitions, 'partition')}"
    what += f", {count(adopted.batches, 'batch')}, {count(adopted.pending, 'event')} without an offset"
    if adopted.checked:
        return f"adopted: {what}\n{count(adopted.copied, 'batch')} copied now, all compared with the seed's"
    if adopted.complete:
        return f"nothing to do, all that schema {schema} holds is adopted: {what}"
    return f"can be adopted: {what}\nnothing was written"
