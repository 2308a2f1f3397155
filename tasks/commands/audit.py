"""`celery -A tasks audit [TOPIC]`: check the invariants on the live database."""

import time

import click
from rich.console import Console

from db.audit import AuditResult
from db.audit import audit as audit_log
from db.status import records_to_audit
from db.topics import names_of
from tasks.commands.base import command, database, echo_json, json_option, timeout_option
from tasks.commands.display import console, count, number, progress, text
from tasks.commands.parameters import NAME

_SHOWN = 10
_LOOK_SECONDS = 0.3


@command("audit")
@click.argument("topic", type=NAME, required=False)
@click.option("--from-scratch", is_flag=True, help="Read every batch again, also those audited before.")
@timeout_option
@json_option
def audit(ctx: click.Context, topic: str | None, *, from_scratch: bool, as_json: bool) -> None:
    """Check the invariants of the log, or of one TOPIC.

    Exit code 1 when one is broken. Takes no locks, and goes on where the last audit stopped, also after Ctrl-C.
    """
    with database(ctx) as conn, progress(ctx) as bar:
        task = bar.add_task("records", total=None)
        looked = 0.0

        def look() -> bool:
            nonlocal looked
            if not bar.disable and time.monotonic() - looked >= _LOOK_SECONDS:
                looked = time.monotonic()
                bar.update(task, completed=max(0, total - records_to_audit(conn, topic)))
            return False

        total = 0
        if not bar.disable:
            # From scratch all of it is ahead, whatever the last audit wrote down.
            total = records_to_audit(conn, topic)
            bar.update(task, total=total)
        result = audit_log(conn, topic=topic, from_scratch=from_scratch, stop=look)
        names = names_of(conn, sorted({v.partition_id for v in result.violations}))
    if as_json:
        echo_json(_as_dict(result, names))
    else:
        _show(console(ctx), result, names)
    if result.violations:
        ctx.exit(1)


def _as_dict(result: AuditResult, names: dict[int, tuple[str, int]]) -> dict[str, object]:
    return {
        "partitions": result.partitions,
        "batches": result.batches,
        "complete": result.complete and result.partitions > 0,
        "violations": [
            {
                "invariant": v.invariant,
                "topic": names.get(v.partition_id, (None, None))[0],
                "partition": names.get(v.partition_id, (None, None))[1],
                "partition_id": v.partition_id,
                "offset": v.offset,
                "detail": v.detail,
            }
            for v in result.violations
        ],
    }


def _show(out: Console, result: AuditResult, names: dict[int, tuple[str, int]]) -> None:
    read = f"{count(result.partitions, 'partition')}, {count(result.batches, 'new batch')} read"
    if not result.partitions:
        out.print(text("nothing to audit: there is no topic", "yellow"))
        return
    if not result.violations:
        out.print(text(f"{read}: all invariants hold", "green"))
        return
    out.print(text(f"{read}: {count(len(result.violations), 'violation')}", "bold red"))
    if not result.complete:
        out.print(text("The audit ended early; repair these and repeat it.", "yellow"))
    for v in result.violations[:_SHOWN]:
        topic, partition = names.get(v.partition_id, (None, None))
        where = f"partition id {v.partition_id}" if topic is None else f"{topic}, partition {partition}"
        at = "" if v.offset is None else f", offset {number(v.offset)}"
        out.print()
        out.print(text(f"{v.invariant}: {where}{at}", "bold"))
        out.print(text(f"  {v.detail}"))
    if len(result.violations) > _SHOWN:
        out.print()
        out.print(text(f"… and {number(len(result.violations) - _SHOWN)} more (--json lists them)", "dim"))
