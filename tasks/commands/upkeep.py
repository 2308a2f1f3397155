"""`celery -A tasks audit`, `materialize`, `migrate` and `rebase`: what operators do with the log now and then."""

import time
from dataclasses import asdict
from typing import Any

import click
from celery.exceptions import TimeoutError as ResultTimeoutError
from rich.console import Group, RenderableType

from db.audit import AuditResult
from db.audit import audit as audit_log
from db.rebase import rebase as rebase_log
from db.status import find_partition, records_to_audit
from db.topics import names_of
from tasks.commands.base import JSON, TIMEOUT, Server, answer, app_of, command, database, reaching
from tasks.commands.display import count, number, progress, text
from tasks.commands.parameters import NAME, PARTITION, Seconds

_SHOWN = 10
_LOOK_SECONDS = 0.3


@command("migrate", TIMEOUT, JSON)
def migrate(ctx: click.Context) -> None:
    """Create or upgrade the schema. Safe to repeat, and from several machines at once."""
    from db.migrate import upgrade  # noqa: PLC0415 - SQLAlchemy, which no other command needs

    with database(ctx):
        # Alembic would wait for a frozen server for ever.
        pass
    warnings: list[str] = []
    before, after = upgrade(app_of(ctx).database_url, warn=warnings.append)
    for warning in warnings:
        what, _, statements = warning.partition("\n")
        click.echo(f"warning: {what}. Let a superuser run this, then migrate again:\n{statements}", err=True)
    said = f"schema upgraded from version {before or 'none'} to {after}"
    if before == after:
        said = f"schema is up to date (version {after})"
    answer(ctx, {"before": before, "after": after}, said)


@command("rebase", TIMEOUT, JSON)
def rebase(ctx: click.Context) -> None:
    """After a restore into another cluster: place new commits after all that are there.

    Stop all brokers and workers first; until this has run, they refuse to work anyway.
    """
    with database(ctx) as conn:
        result = rebase_log(conn)
    said = "nothing to do: the database is in the cluster its log belongs to"
    if result is not None:
        said = f"rebased from cluster {result.was or 'unknown'} to {result.now}"
    answer(ctx, {"rebased": result is not None, **(asdict(result) if result else {}), "message": said}, said)


@command("materialize", JSON)
@click.argument("topic", type=NAME)
@click.option("-p", "--partition", type=PARTITION, help="Only this partition.")
@click.option("--wait", is_flag=True, help="Wait until it is done, and print what was done.")
@click.option("--timeout", type=Seconds(0), default=300, help="How long --wait waits.")
def materialize(ctx: click.Context, topic: str, partition: int | None, *, wait: bool, timeout: float) -> None:
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
        answer(ctx, {"tasks": ids}, f"{topic}: {count(len(ids), 'task')} queued")
        return
    try:
        done = [app.AsyncResult(i).get(timeout=timeout) for i in ids]
    except ResultTimeoutError:
        late = f"not done after {timeout:g} s"
        raise click.ClickException(f"{topic}: {late}; is a worker running (celery -A tasks worker)?") from None
    events, records = (sum(d[key] for d in done) for key in ("events_processed", "records"))
    said = f"{topic}: {count(events, 'event')} materialized, {number(records)} records"
    answer(ctx, {"tasks": ids, "events": events, "records": records, "metrics": done}, said)


@command("audit", TIMEOUT, JSON)
@click.argument("topic", type=NAME, required=False)
@click.option("--from-scratch", is_flag=True, help="Read every batch again, also those audited before.")
def audit(ctx: click.Context, topic: str | None, *, from_scratch: bool) -> None:
    """Check the invariants of the log, or of one TOPIC.

    Exit code 1 when one is broken. Takes no locks, and goes on where the last audit stopped, also after Ctrl-C.
    """
    with database(ctx) as conn, progress(ctx) as bar:
        # From scratch all of it is ahead, whatever the last audit wrote down.
        total = 0 if bar.disable else records_to_audit(conn, topic)
        task = bar.add_task("records", total=total)
        looked = 0.0

        def look() -> bool:
            nonlocal looked
            if not bar.disable and time.monotonic() - looked >= _LOOK_SECONDS:
                looked = time.monotonic()
                bar.update(task, completed=max(0, total - records_to_audit(conn, topic)))
            return False

        result = audit_log(conn, topic=topic, from_scratch=from_scratch, stop=look)
        names = names_of(conn, sorted({v.partition_id for v in result.violations}))
    # A partition that has no name any more lost its topic.
    places = [names.get(v.partition_id, (None, None)) for v in result.violations]
    found = [{"topic": t, "partition": p, **asdict(v)} for (t, p), v in zip(places, result.violations, strict=True)]
    complete = result.complete and result.partitions > 0
    counts = {"partitions": result.partitions, "batches": result.batches, "complete": complete}
    answer(ctx, {**counts, "violations": found}, _show(result, found))
    if result.violations:
        ctx.exit(1)


def _show(result: AuditResult, violations: list[dict[str, Any]]) -> RenderableType:
    read = f"{count(result.partitions, 'partition')}, {count(result.batches, 'new batch')} read"
    if not result.partitions:
        return text("nothing to audit: there is no topic", "yellow")
    if not result.violations:
        return text(f"{read}: all invariants hold", "green")
    lines: list[RenderableType] = [text(f"{read}: {count(len(result.violations), 'violation')}", "bold red")]
    if not result.complete:
        lines.append(text("The audit ended early; repair these and repeat it.", "yellow"))
    for v in violations[:_SHOWN]:
        where = "{topic}, partition {partition}" if v["topic"] is not None else "partition id {partition_id}"
        at = "" if v["offset"] is None else f", offset {number(v['offset'])}"
        lines += ["", text(f"{v['invariant']}: {where.format(**v)}{at}", "bold"), text(f"  {v['detail']}")]
    if len(result.violations) > _SHOWN:
        more = f"… and {number(len(result.violations) - _SHOWN)} more (--json lists them)"
        lines += ["", text(more, "dim")]
    return Group(*lines)
