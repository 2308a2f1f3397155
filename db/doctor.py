"""Looks at a Postgres and a database from every side Tidemark depends on; changes nothing.

What may be wrong stands in tables: `db/sql/doctor.sql`, a row for each, judged where it is read. Here is what those
tables need to know of this program, and what is judged from the facts that `status` shows. Each check reads for itself,
so that one which may not look, or finds no schema, spoils no other.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from math import inf
from time import time
from typing import NamedTuple

from psycopg import errors

from config.errors import SchemaVersionError
from config.settings import Settings
from db.migrate import migration_files, require_current
from db.statements import Connection, all_, routine_files, values
from db.status import Holder, Reading, read_status

_MIGRATE = "celery -A tasks migrate"
_LONG_SECONDS = 60.0
_TOO_LONG_SECONDS = 3600.0
_LOCKED_SECONDS = 5.0
_SKEW = 2.0, 30.0
_MANY_DEAD = 50_000
_MILLISECOND = 0.001

_TABLE = re.compile(r"^create table tidemark\.(\w+) \(\n(.*?)\n\)(?: with \(([^)]*)\))?;$", re.MULTILINE | re.DOTALL)
_CONSTRAINT = re.compile(r"^ *constraint (\w+) (.*?),?$", re.MULTILINE)
_FUNCTION = re.compile(r"^create or replace function tidemark\.(\w+)", re.MULTILINE)
_INDEX = re.compile(r"^(create (?:unique )?index (\w+) on ([\w.]+) .*;)$", re.MULTILINE)


class Level(StrEnum):
    """How bad it is: nothing to do; slower or less safe than it could be; wrong."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """`found` is what is there; where that is not right, `why`, and the statements or commands that `repair` it."""

    area: str
    check: str
    level: Level
    found: str
    why: str = ""
    repair: tuple[str, ...] = ()


class Row(NamedTuple):
    """One thing that may be wrong: whether it is, and what the finding is to say then."""

    area: str
    check: str
    bad: bool
    level: str
    found: str
    why: str = ""
    repair: Iterable[str] = ()
    # What the check is called where it looks at many things and this one is wrong.
    item: str | None = None


def judge(rows: Iterable[Row]) -> Iterator[Finding]:
    """What is wrong; for a check with nothing wrong, what is there. Rows of one check stand together."""
    for (area, check), group in groupby(rows, key=lambda row: (row.area, row.check)):
        found = list(group)
        wrong = [row for row in found if row.bad]
        for row in wrong or [Row(area, check, bad=False, level=Level.OK, found=found[0].found)]:
            level, repair = Level(row.level), tuple(row.repair)
            name = row.item or check
            yield Finding(area=area, check=name, level=level, found=row.found, why=row.why, repair=repair)


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among findings; ok for none."""
    return max((finding.level for finding in findings), key=list(Level).index, default=Level.OK)


def checks(conn: Connection, settings: Settings) -> dict[str, Callable[[], Iterable[Row]]]:
    """Every check by its name; `conn` in autocommit mode, and its settings as a broker's connection gets them."""

    def table(statement: str, *parameters: object) -> Callable[[], Iterable[Row]]:
        return lambda: all_(conn, Row, statement, parameters)

    return {
        "server": table("doctor_server", settings.shards, settings.pool_open),
        "clock": lambda: _clock(conn),
        "settings": table("doctor_settings", settings.database_url is None),
        "role and database defaults": table("doctor_defaults"),
        "version": lambda: _version(conn),
        "tables": table("doctor_tables", *_tables()),
        "constraints and indexes": table("doctor_rules", *_rules()),
        "functions": table("doctor_functions", _functions()),
        "privileges": table("doctor_privileges"),
        "activity": lambda: judge_activity(read_status(conn), settings),
        "vacuum": table("doctor_vacuum", _MANY_DEAD),
    }


# Without a schema, one finding says so; twenty would say it no better.
_NEED_SCHEMA = {"tables", "constraints and indexes", "functions", "privileges", "activity"}


def examine(conn: Connection, settings: Settings) -> Iterator[Finding]:
    """Every check's findings; see `checks` for the connection."""
    (has_schema,) = values(conn, "doctor_has_schema")
    for name, check in checks(conn, settings).items():
        if name in _NEED_SCHEMA and not has_schema:
            continue
        try:
            yield from list(judge(check()))
        except (errors.InsufficientPrivilege, SchemaVersionError) as error:
            why = f"Postgres says: {str(error).splitlines()[0]}."
            repair = (f'grant tidemark_worker to "{conn.info.user}";',)
            found = "could not be looked at"
            yield Finding(area="server", check=name, level=Level.WARN, found=found, why=why, repair=repair)


def _version(conn: Connection) -> Iterator[Row]:
    why = ""
    try:
        require_current(conn)
    except SchemaVersionError as error:
        why = f"{error}.".replace(f"; run: {_MIGRATE}", "")
    found = "another one" if why else "current"
    yield Row("schema", "version", bool(why), Level.FAIL, found, why, (_MIGRATE,))


def _definitions(kind: re.Pattern[str]) -> Iterator[tuple[str, ...]]:
    """What the migrations create, as they write it."""
    return (match for file in migration_files() for match in kind.findall(file.read_text("utf-8")))


def _tables() -> tuple[list[str], list[str | None]]:
    """Tables that should be there, and their storage parameters."""
    found = [(name, options or None) for name, _, options in _definitions(_TABLE)]
    return [name for name, _ in found], [options for _, options in found]


def _functions() -> list[str]:
    """Functions that should be there."""
    texts = (file.read_text("utf-8") for file in routine_files())
    return sorted({name for text in texts for name in _FUNCTION.findall(text)})


def _rules() -> tuple[list[str], list[str], list[str]]:
    """Constraints and indexes that should be there: their names, their tables, and what makes them again."""
    found = [
        (name, f"tidemark.{table}", f"alter table tidemark.{table} add constraint {name} {what};")
        for table, body, _ in _definitions(_TABLE)
        for name, what in _CONSTRAINT.findall(body)
    ]
    found += [(name, table, ddl) for ddl, name, table in _definitions(_INDEX)]
    return [name for name, *_ in found], [table for _, table, _ in found], [ddl for *_, ddl in found]


def _clock(conn: Connection) -> Iterator[Row]:
    before = time()
    (theirs,) = values(conn, "doctor_clock")
    yield judge_clock("Postgres", theirs, before, time())


def _graded(
    area: str, check: str, amount: float, limits: tuple[float, float], found: str, why: str, *repair: str
) -> Row:
    """What is a warning from one limit on, and a failure from another."""
    warn, fail = limits
    return Row(area, check, amount >= warn, Level.FAIL if amount >= fail else Level.WARN, found, why, repair)


def judge_clock(server: str, theirs: float, before: float, after: float) -> Row:
    """A server's clock, asked between two moments of ours, less what the round trip leaves open."""
    ahead = theirs - (before + after) / 2
    off = max(0.0, abs(ahead) - (after - before) / 2)
    found = f"{off:.3f} s {'ahead of' if ahead > 0 else 'behind'} this machine" if off >= _MILLISECOND else "agrees"
    why = "Lag, retention by time and the expiry of beat's tasks compare clocks."
    repair = "synchronize both machines' clocks (chrony, systemd-timesyncd)"
    return _graded("clock", server, off, _SKEW, found, why, repair)


def judge_activity(reading: Reading, settings: Settings) -> Iterator[Row]:
    """Whether the log belongs to this cluster, fan-out and workers keep up, and what stands in their way."""
    dispatch = reading.dispatch
    found = "the log's own" if dispatch.own_cluster else "another cluster's"
    why = "The database was restored or moved; commits and workers refuse to work here."
    rebase = ("stop all brokers and workers", "celery -A tasks rebase")
    yield Row("schema", "cluster identifier", not dispatch.own_cluster, Level.FAIL, found, why, rebase)
    patience = max(_LONG_SECONDS / 2, 20 * settings.fan_out_interval)
    behind = dispatch.undispatched or 0.0
    found = (
        f"saw something new {dispatch.last:.0f} s ago" if dispatch.undispatched is None else f"{behind:.0f} s behind"
    )
    why = "Commits wait that nobody handed to a worker."
    repair = ("celery -A tasks beat", "celery -A tasks worker")
    yield _graded("activity", "fan-out", behind, (patience, 10 * patience), found, why, *repair)
    lag = max((p.lag or 0.0 for p in reading.pending), default=0.0)
    found = f"{lag:.0f} s, {len(reading.pending)} partitions have a backlog" if reading.pending else "no backlog"
    why, help_text = "What was committed cannot be read yet.", "celery -A tasks status says what it waits for"
    yield _graded("activity", "lag", lag, (_LONG_SECONDS, settings.overdue_seconds), found, why, help_text)
    yield from _locks(reading)
    long = [h for h in reading.holders if h.state == "inactive" or (h.seconds or 0.0) >= _LONG_SECONDS]
    if not long:
        yield Row("activity", "transactions", bad=False, level=Level.OK, found=f"none older than {_LONG_SECONDS:.0f} s")
    yield from map(_holder, long)


def _locks(reading: Reading) -> Iterator[Row]:
    yield Row("activity", "locks", bad=False, level=Level.OK, found="none that others wait for")
    names = {p.partition_id: f"{p.topic}/{p.partition}" for p in reading.pending}
    held = {
        r.name: (r, r.age or 0.0, names[min(r.partition_ids)] + f" and {len(r.partition_ids) - 1} more")
        for r in reading.row_locks
    }
    for w in reading.lock_waits:
        what = f"a lock ({w.lock})" if w.topic is None else f"{w.topic}/{w.partition}"
        held.setdefault(w.blocker.name, (w.blocker, w.waited, what))
    why = "Workers pass over what is locked, or wait; what was committed there has no offsets."
    for blocker, seconds, what in held.values():
        found = f"{blocker} holds {what.removesuffix(' and 0 more')}, for {seconds:.0f} s"
        yield _graded("activity", "locks", seconds, (_LOCKED_SECONDS, _LONG_SECONDS), found, why, blocker.repair)


def _holder(h: Holder) -> Row:
    """What has been open too long, or a slot that nobody reads."""
    seconds = h.seconds or 0.0
    whose = f"of {h.user} in {h.database}, for {seconds:.0f} s"
    behind = f"{h.state}" + f", {seconds:.0f} s behind" * bool(seconds)
    if h.kind == "replication slot":
        found, repair = f"{h.name}, {behind}", f"select pg_drop_replication_slot('{h.name}');"
    elif h.kind == "standby":
        found, repair = f"pid {h.name} ({h.application}), {behind}", "end the query that runs there"
    else:
        found, repair = f"{h.session} {whose}" + f", {h.state}" * bool(h.state), h.session.repair
    why = "It keeps dead rows from vacuum."
    if h.has_id:
        why = "It keeps dead rows from vacuum, and what it commits from its offsets."
    elif h.state == "inactive":
        why = "It keeps the write-ahead log, and perhaps dead rows, for ever."
    check = "long transaction" if h.kind == "session" else h.kind
    return _graded("activity", check, seconds, (-inf, _TOO_LONG_SECONDS), found, why, repair)
