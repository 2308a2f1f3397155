"""`celery -A tasks doctor`: look at everything Tidemark depends on, and say how to mend what is not right."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import groupby

import click
import psycopg
from rich.console import Console
from rich.padding import Padding

from config.errors import EmbeddedServerError
from config.settings import Settings
from db.doctor import examine
from db.findings import Finding, Level, worst
from db.pool import CONNECT_SECONDS
from tasks.app import TidemarkApp
from tasks.commands.base import app_of, command, echo_json, json_option
from tasks.commands.display import console, hanging, progress, text
from tasks.doctoring import check_broker, check_environment

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


@command("doctor")
@click.option("--bad", is_flag=True, help="Show only what is not right.")
@json_option
def doctor(ctx: click.Context, *, bad: bool, as_json: bool) -> None:
    """Check servers, settings, schema, privileges and environment.

    Each check is ok, warn (slower or less safe than it could be) or fail (wrong), and what is not right comes with the
    reason and what mends it. Changes nothing. Exit code 1 when a check fails.
    """
    app = app_of(ctx)
    with progress(ctx) as bar:
        task = bar.add_task("looking", total=None)
        findings = []
        for found in _examine(app):
            findings.append(found)
            bar.update(task, description=found.area, advance=1)
    if as_json:
        echo_json({"level": worst(findings), "findings": [asdict(finding) for finding in findings]})
    else:
        _show(console(ctx), findings, only_bad=bad)
    if worst(findings) is Level.FAIL:
        ctx.exit(1)


def _examine(app: TidemarkApp) -> Iterator[Finding]:
    settings = app.settings
    yield from check_environment()
    try:
        broker_url, redis_url, database_url = app.broker_url, app.redis_url, app.database_url
    except (EmbeddedServerError, psycopg.OperationalError) as error:
        yield _failed("servers", "embedded servers", error, "set TIDEMARK_DATABASE_URL and TIDEMARK_BROKER_URL")
        return
    yield from check_broker(broker_url, redis_url)
    yield from _postgres(database_url, settings)


def _postgres(url: str, settings: Settings) -> Iterator[Finding]:
    try:
        # As a broker connects: Tidemark's own settings would hide the server's.
        with psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_SECONDS) as conn:
            for _, findings in examine(conn, settings):
                yield from findings
    except (psycopg.OperationalError, psycopg.ProgrammingError) as error:
        yield _failed("server", "Postgres", error, "start it, or correct TIDEMARK_DATABASE_URL")


def _failed(area: str, check: str, error: Exception, mend: str) -> Finding:
    why = " ".join(str(error).split())
    return Finding(area=area, check=check, level=Level.FAIL, found="does not answer", why=why, mend=(mend,))


def _show(out: Console, findings: list[Finding], *, only_bad: bool) -> None:
    shown = [f for f in findings if not only_bad or f.level is not Level.OK]
    for area, group in groupby(sorted(shown, key=lambda f: _areas(findings).index(f.area)), key=lambda f: f.area):
        out.print(text(area.capitalize(), "bold"))
        for finding in group:
            lead = text(f"{finding.level.value:<4}", _STYLES[finding.level])
            what = text(f"{finding.check}: {finding.found}")
            why = [text(finding.why)] * bool(finding.why)
            mend = [Padding(text(statement, "cyan"), (0, 0, 0, 2), expand=False) for statement in finding.mend]
            out.print(hanging(lead, what, *why, *mend))
        out.print()
    counts = Counter(finding.level for finding in findings)
    out.print(text(", ".join(f"{counts[level]} {level}" for level in Level), _STYLES[worst(findings)]))


def _areas(findings: list[Finding]) -> list[str]:
    return list(dict.fromkeys(finding.area for finding in findings))
