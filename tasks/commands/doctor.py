"""`celery -A tasks doctor`: look at everything Tidemark depends on, and say how to repair what is not right."""

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from time import time
from typing import Any
from urllib.parse import urlsplit

import click
import kombu.exceptions
import psycopg
from redis import RedisError
from rich.console import Group, RenderableType
from rich.padding import Padding

from config.errors import EmbeddedServerError, SettingsError, TransientDatabaseError
from config.redis import RedisAddress, is_redis
from config.settings import Settings
from db.doctor import Finding, Level, Row, examine, judge, judge_clock, worst
from db.pool import open_connection
from tasks.app import TidemarkApp
from tasks.commands.base import JSON, answer, app_of, command
from tasks.commands.display import duration, pairs, progress, text
from tasks.commands.situation import REDIS_SECONDS, SILENT_SECONDS, Hints, read_hints

_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
_PREFIX = "TIDEMARK_"
# Read by the tests alone.
_TESTS = "TIDEMARK_TEST_"
_OLDEST_REDIS, _NEWEST_REDIS = (6, 2), 8
_FULL = 0.9
_ANSWER_SECONDS = 1.0
_POSTGRES_SECONDS = 4.0


@command("doctor", JSON)
@click.option("--bad", is_flag=True, help="Show only what is not right.")
def doctor(ctx: click.Context, *, bad: bool) -> None:
    """Check servers, settings, schema, privileges, programs and environment.

    Each check is ok, warn (slower or less safe than it could be) or fail (wrong), and what is not right comes with the
    reason and what repairs it. Changes nothing. Exit code 1 when a check fails.
    """
    findings = []
    with progress(ctx) as bar:
        task = bar.add_task("looking", total=None)
        for found in _examine(app_of(ctx)):
            findings.append(found)
            bar.update(task, description=found.area, advance=1)
    document = {"level": worst(findings), "findings": [asdict(finding) for finding in findings]}
    answer(ctx, document, Group(*_show(findings, only_bad=bad)))
    if worst(findings) is Level.FAIL:
        ctx.exit(1)


def _examine(app: TidemarkApp) -> Iterator[Finding]:
    yield from judge(check_environment())
    try:
        broker_url, redis_url, database_url = app.broker_url, app.redis_url, app.database_url
    except (EmbeddedServerError, TransientDatabaseError) as error:
        why, repair = str(error), "set TIDEMARK_DATABASE_URL and TIDEMARK_BROKER_URL"
        yield from judge([_silent("servers", "embedded servers", why, repair)])
        return
    yield from judge(check_broker(broker_url, redis_url))
    yield from judge(check_programs(app, read_hints(app)))
    try:
        # As a broker connects: Tidemark's own settings would hide the server's.
        with open_connection(database_url, timeout=_POSTGRES_SECONDS) as conn:
            yield from examine(conn, app.settings)
    except (TransientDatabaseError, SettingsError, psycopg.Error) as error:
        yield from judge([_silent("server", "Postgres", str(error), "start it, or correct TIDEMARK_DATABASE_URL")])


def _silent(area: str, check: str, why: str, repair: str) -> Row:
    return _row(area, check, check, Level.FAIL, "does not answer", " ".join(why.split()), repair)


# --- the environment


def check_environment(environment: Mapping[str, str] = os.environ) -> Iterator[Row]:
    """Variables that look like ours and are none."""
    known = {f"{_PREFIX}{name}".upper() for name in Settings.model_fields}
    # Names are read without regard to case, as pydantic-settings does.
    ours = [name for name in environment if name.upper().startswith(_PREFIX)]
    unknown = sorted(name for name in ours if name.upper() not in known and not name.upper().startswith(_TESTS))
    for name in unknown:
        near = difflib.get_close_matches(name.upper(), known, n=1)
        why = "It has no effect." + (f" Did you mean {near[0]}?" if near else "")
        yield _row("environment", name, name, Level.WARN, "no setting of Tidemark's", why, f"unset {name}")
    if not unknown:
        count = sum(name.upper() in known for name in ours)
        yield _row("environment", f"{_PREFIX}…", None, Level.OK, f"{count} set, all known")


# --- Redis


def check_broker(broker_url: str, redis_url: str | None) -> Iterator[Row]:
    """Every Redis there is; another kind of broker is only named."""
    if not is_redis(broker_url):
        yield _row("redis", "broker", None, Level.OK, f"{urlsplit(broker_url).scheme}, not a Redis")
    urls = {url: None for url in (broker_url, redis_url) if url is not None and is_redis(url)}
    for number, url in enumerate(urls):
        name = "Redis" if number == 0 else "Redis for results"
        try:
            yield from _redis(name, url)
        except (RedisError, ValueError) as error:
            repair = "start it, or correct TIDEMARK_BROKER_URL and TIDEMARK_REDIS_URL"
            yield _silent("redis", name, f"{type(error).__name__}: {error}", repair)


def _redis(name: str, url: str) -> Iterator[Row]:
    info: dict[str, Any] = {}
    with RedisAddress.parse(url).client(seconds=REDIS_SECONDS) as client:
        # Sections one by one: managed servers may leave some out.
        for section in ("server", "memory", "persistence", "stats"):
            info |= client.info(section)
        before = time()
        seconds, microseconds = client.time()
        after = time()
    version = str(info.get("redis_version", "unknown version"))
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    old, why = numbers < _OLDEST_REDIS, "Tidemark needs 6.2 or later."
    yield _row("redis", name, old, Level.FAIL, version, why, "upgrade Redis")
    why = f"Tidemark was tested up to {_NEWEST_REDIS}."
    yield _row("redis", name, numbers[:1] > (_NEWEST_REDIS,), Level.WARN, version, why, "install a newer tidemark")
    why = "It answers no commands until it is done."
    yield _row("redis", name, info.get("loading"), Level.WARN, "loading its data", why)

    policy, limit = str(info.get("maxmemory_policy", "unknown")), int(info.get("maxmemory", 0))
    check, rewrite = f"{name}: eviction", "redis-cli config rewrite"
    why = "Under pressure Redis throws away queues, tokens and leases without a word."
    repair = "redis-cli config set maxmemory-policy noeviction"
    # Without a limit nothing is evicted, yet.
    level = Level.FAIL if limit else Level.WARN
    yield _row("redis", check, policy != "noeviction", level, policy, why, repair, rewrite)
    full = int(info.get("used_memory", 0)) / limit if limit else 0.0
    why, repair = "When it is full, nothing can be queued.", f"redis-cli config set maxmemory {2 * limit}"
    yield _row("redis", check, full > _FULL, Level.WARN, f"{policy}, {full:.0%} full", why, repair, rewrite)

    kept = bool(int(info.get("aof_enabled", 0)))
    why = "A restart of Redis loses what is queued; it is found again, but only by the next sweep."
    repair = "redis-cli config set appendonly yes"
    check = f"{name}: append-only file"
    yield _row("redis", check, not kept, Level.WARN, "on" if kept else "off", why, repair, rewrite)
    why = "Redis may refuse writes until its disk takes them again."
    for key, check in (("rdb_last_bgsave_status", "snapshot"), ("aof_last_write_status", "append-only file")):
        status = str(info.get(key, "ok"))
        repair = "free space on Redis' disk, or look into its log"
        yield _row("redis", f"{name}: last {check}", status != "ok", Level.FAIL, status, why, repair)
    yield judge_clock(name, int(seconds) + int(microseconds) / 1e6, before, after)


# --- programs


def check_programs(app: TidemarkApp, hints: Hints) -> Iterator[Row]:
    """Whether workers and a beat are up, and go by as many shards as this command."""
    if hints.error is not None:
        # Said already. Workers would be asked by way of the broker.
        return
    workers = {worker.name for worker in hints.workers} or _answering(app)
    found = f"{len(workers)} up: {', '.join(sorted(workers))}" if workers else "none is up"
    why = "Nothing is materialized."
    yield _row("programs", "workers", not workers, Level.WARN, found, why, "celery -A tasks worker")
    if hints.programs is None:
        return
    tick = hints.seen("beat")
    found = "none is up" if tick is None else f"last tick {duration(tick)} ago"
    why = "Commits that nobody announced, and what a lost message left behind, are not looked for."
    bad = tick is None or tick >= SILENT_SECONDS
    yield _row("programs", "beat", bad, Level.WARN, found, why, "celery -A tasks beat")
    differ = hints.shards_differ(app.settings.shards)
    found = differ or f"{app.settings.shards}, here and in all programs"
    why = "Some publish to queues that nobody reads, or two workers meet at a partition."
    repair = "set TIDEMARK_SHARDS to one number everywhere, and restart what had another"
    yield _row("programs", "shards", differ is not None, Level.FAIL, found, why, repair)


def _answering(app: TidemarkApp) -> set[str]:
    """Workers that answer a call to all of them, where none has reported: without a Redis none does."""
    try:
        with app.connection_for_read() as connection:
            # Fails at once where the broker is away; a broadcast would go on trying.
            connection.ensure_connection(max_retries=1, timeout=_ANSWER_SECONDS)
            return set(app.control.inspect(timeout=_ANSWER_SECONDS, connection=connection).ping() or ())
    except kombu.exceptions.OperationalError:
        return set()


# --- output


def _row(area: str, check: str, bad: object, level: Level, found: str, why: str = "", *repair: str) -> Row:
    return Row(area=area, check=check, bad=bool(bad), level=level, found=found, why=why, repair=repair)


def _show(findings: Sequence[Finding], *, only_bad: bool) -> Iterator[RenderableType]:
    areas = list(dict.fromkeys(finding.area for finding in findings))
    shown = [f for f in findings if not only_bad or f.level is not Level.OK]
    for area, group in groupby(sorted(shown, key=lambda f: areas.index(f.area)), key=lambda f: f.area):
        yield text(area.capitalize(), "bold")
        for finding in group:
            body = [text(f"{finding.check}: {finding.found}"), *[text(finding.why)] * bool(finding.why)]
            repair = (Padding(text(statement, "cyan"), (0, 0, 0, 2), expand=False) for statement in finding.repair)
            lead = text(f"  {finding.level.value:<4}", _STYLES[finding.level])
            yield pairs((lead, Group(*body, *repair)), gap=1)
        yield ""
    counts = Counter(finding.level for finding in findings)
    yield text(", ".join(f"{counts[level]} {level}" for level in Level), _STYLES[worst(findings)])
