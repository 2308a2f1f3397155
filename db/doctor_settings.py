"""Server settings against what Tidemark wants of them; `config/postgresql.conf` has the reasons at length.

To be read on a connection that changed none of them: what a broker's session gets, not what Tidemark's own pool sets.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from db.findings import Finding, Level, quote_identifier, quote_literal
from db.statements import run

AREA = "settings"

_UNITS = {
    "B": 1,
    "kB": 2**10,
    "MB": 2**20,
    "GB": 2**30,
    "TB": 2**40,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1,
    "min": 60,
    "h": 3600,
    "d": 86_400,
}
_MIB = 2**20
_GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """`number` is the value in bytes, seconds or as it is; None where it is no number."""

    name: str
    value: str
    number: float | None
    source: str
    context: str
    pending_restart: bool


_Judge = Callable[[Setting, dict[str, Setting]], Level]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """`judge` says how bad a value is; `wanted` is what mends it. `size` rules are relaxed for the embedded server."""

    name: str
    wanted: str
    judge: _Judge
    why: str
    size: bool = False


def _is(*values: str, otherwise: Level) -> _Judge:
    return lambda setting, _: Level.OK if setting.value in values else otherwise


def _at_least(number: float) -> _Judge:
    return lambda setting, _: Level.OK if (setting.number or 0) >= number else Level.WARN


def _at_most(number: float) -> _Judge:
    return lambda setting, _: Level.OK if (setting.number or 0) <= number else Level.WARN


def _bounded(setting: Setting, _: dict[str, Setting]) -> Level:
    return Level.OK if (setting.number or 0) > 0 else Level.WARN


def _unbounded(setting: Setting, _: dict[str, Setting]) -> Level:
    return Level.OK if (setting.number or 0) == 0 else Level.WARN


def _above_shared_buffers(setting: Setting, every: dict[str, Setting]) -> Level:
    buffers = every.get("shared_buffers")
    return Level.WARN if buffers and (setting.number or 0) < (buffers.number or 0) else Level.OK


RULES = (
    Rule(
        name="fsync",
        wanted="on",
        judge=_is("on", otherwise=Level.FAIL),
        why="A crash of the machine corrupts the database.",
    ),
    Rule(
        name="full_page_writes",
        wanted="on",
        judge=_is("on", otherwise=Level.FAIL),
        why="A crash in the middle of a page's write corrupts it.",
    ),
    Rule(
        name="autovacuum",
        wanted="on",
        judge=_is("on", otherwise=Level.FAIL),
        why="Rows are not frozen, so Postgres stops one day; what retention deletes stays; statistics get old.",
    ),
    Rule(
        name="default_transaction_isolation",
        wanted="read committed",
        judge=_is("read committed", otherwise=Level.WARN),
        why="Repeated commits end in serialization errors where they would return the first result.",
    ),
    Rule(
        name="default_transaction_read_only",
        wanted="off",
        judge=_is("off", otherwise=Level.FAIL),
        why="Nothing can be committed.",
    ),
    Rule(
        name="shared_buffers",
        wanted="1GB",
        judge=_at_least(256 * _MIB),
        size=True,
        why="Pending events, partitions and the newest runs should fit; a quarter of memory.",
    ),
    Rule(
        name="effective_cache_size",
        wanted="4GB",
        judge=_above_shared_buffers,
        why="Below shared_buffers the planner thinks index scans dearer than they are.",
    ),
    Rule(
        name="work_mem",
        wanted="64MB",
        judge=_at_least(8 * _MIB),
        size=True,
        why="The largest sort of the cold path takes 4 MB, an audit's more; beyond work_mem they go to disk.",
    ),
    Rule(
        name="max_wal_size",
        wanted="4GB",
        judge=_at_least(2 * _GIB),
        size=True,
        why="Checkpoints forced by volume write every page whole again (checkpoint_segments was the name before 9.5).",
    ),
    Rule(
        name="checkpoint_timeout",
        wanted="15min",
        judge=_at_least(300),
        why="Frequent checkpoints write every changed page whole, again and again.",
    ),
    Rule(
        name="checkpoint_completion_target",
        wanted="0.9",
        judge=_at_least(0.8),
        why="A checkpoint that hurries makes commits wait for the disk.",
    ),
    Rule(
        name="wal_compression",
        wanted="off",
        judge=_is("off", "lz4", "zstd", otherwise=Level.WARN),
        why="pglz takes 40 % of the throughput after a checkpoint; lz4, where the build has it, a tenth.",
    ),
    Rule(
        name="jit",
        wanted="off",
        judge=_is("off", otherwise=Level.WARN),
        why="Compiling a short statement takes longer than running it.",
    ),
    Rule(
        name="random_page_cost",
        wanted="1.1",
        judge=_at_most(2),
        why="Made for disks with arms: on solid-state ones it keeps the planner from the indexes.",
    ),
    Rule(
        name="idle_in_transaction_session_timeout",
        wanted="60s",
        judge=_bounded,
        why="A forgotten transaction keeps its row locks and holds vacuum back. Tidemark's own connections set it.",
    ),
    Rule(
        name="idle_session_timeout",
        wanted="0",
        judge=_unbounded,
        why="Postgres closes connections that the pool keeps for later.",
    ),
    Rule(
        name="client_connection_check_interval",
        wanted="5s",
        judge=_bounded,
        why="A worker killed in the middle of a statement keeps its partitions locked until that ends.",
    ),
    Rule(
        name="track_activities",
        wanted="on",
        judge=_is("on", otherwise=Level.WARN),
        why="status and top cannot say what a partition waits for.",
    ),
    Rule(
        name="track_counts",
        wanted="on",
        judge=_is("on", otherwise=Level.FAIL),
        why="Autovacuum does not know what to do.",
    ),
)

# What a role or a database must not bring along, whoever connects.
_DEFAULTS = {
    "default_transaction_read_only": ({"on", "true", "1", "yes"}, Level.WARN),
    "default_transaction_isolation": ({"serializable", "repeatable read"}, Level.WARN),
}


def read_settings(conn: psycopg.Connection[Any]) -> dict[str, Setting]:
    """Every setting a rule speaks of, and that this server has."""
    names = [rule.name for rule in RULES]
    return {
        row[0]: Setting(
            name=row[0],
            value=_shown(row[1], row[2]),
            number=_number(row[1], row[2]),
            source=row[3],
            context=row[4],
            pending_restart=row[5],
        )
        for row in run(conn, "doctor_settings", (names,)).fetchall()
    }


def check_settings(conn: psycopg.Connection[Any], *, embedded: bool) -> Iterator[Finding]:
    """One finding for each rule; the embedded server may be small."""
    settings = read_settings(conn)
    for rule in RULES:
        setting = settings.get(rule.name)
        if setting is None:
            continue
        level = rule.judge(setting, settings)
        if level is not Level.OK and not (rule.size and embedded):
            yield Finding(
                area=AREA,
                check=rule.name,
                level=level,
                found=f"{setting.value}{_origin(setting)}",
                why=rule.why,
                mend=_mend(conn, setting, rule.wanted),
            )
        elif setting.pending_restart:
            yield Finding(
                area=AREA,
                check=rule.name,
                level=Level.WARN,
                found=f"{setting.value}, changed in the file",
                why="The new value waits for a restart of Postgres.",
                mend=("restart Postgres",),
            )
        else:
            yield Finding(area=AREA, check=rule.name, level=Level.OK, found=setting.value)


def check_defaults(conn: psycopg.Connection[Any]) -> Iterator[Finding]:
    """What roles and databases set for their sessions, where that is harmful."""
    harmful = False
    for role, database, name, value in run(conn, "doctor_defaults", (list(_DEFAULTS),)).fetchall():
        values, level = _DEFAULTS[name]
        if value.strip("'\"").lower() not in values:
            continue
        harmful = True
        why = next(rule.why for rule in RULES if rule.name == name)
        yield Finding(
            area=AREA,
            check="role and database defaults",
            level=level,
            found=f"{name} = {value} for {_whom(role, database)}",
            why=why,
            mend=(f"alter {_target(role, database)} reset {name};",),
        )
    if not harmful:
        yield Finding(area=AREA, check="role and database defaults", level=Level.OK, found="nothing harmful")


def _shown(value: str, unit: str | None) -> str:
    number = _number(value, unit)
    if unit is None or number is None or number < 0:
        return value
    if unit.lstrip("0123456789") in {"B", "kB", "MB", "GB", "TB"}:
        for name in ("GB", "MB", "kB"):
            if number >= _UNITS[name] and number % _UNITS[name] == 0:
                return f"{number / _UNITS[name]:g}{name}"
        return f"{number:g}B"
    if number == 0:
        return "0"
    return f"{number:g}s" if number >= 1 else f"{number * 1000:g}ms"


def _number(value: str, unit: str | None) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    if unit is None:
        return number
    match = re.fullmatch(r"(\d*)([A-Za-z]+)", unit)
    if match is None or match[2] not in _UNITS:
        return number
    return number * int(match[1] or 1) * _UNITS[match[2]]


def _origin(setting: Setting) -> str:
    return {
        "database": ", the database's default",
        "user": ", the role's default",
        "database user": ", the role's default in this database",
        "client": ", set by the connection",
        "environment variable": ", set by the environment",
        "command line": ", set on the server's command line",
    }.get(setting.source, "")


def _mend(conn: psycopg.Connection[Any], setting: Setting, wanted: str) -> tuple[str, ...]:
    role, database = conn.info.user, conn.info.dbname
    if setting.source == "database":
        return (f"alter {_target(None, database)} reset {setting.name};",)
    if setting.source == "user":
        return (f"alter {_target(role, None)} reset {setting.name};",)
    if setting.source == "database user":
        return (f"alter {_target(role, database)} reset {setting.name};",)
    if setting.source == "client":
        return (f"take {setting.name} out of TIDEMARK_DATABASE_URL and PGOPTIONS",)
    change = f"alter system set {setting.name} = {quote_literal(wanted)};"
    if setting.source == "command line":
        return (f"take {setting.name} off the server's command line, restart Postgres",)
    return (change, "restart Postgres") if setting.context == "postmaster" else (change, "select pg_reload_conf();")


def _target(role: str | None, database: str | None) -> str:
    if role is None:
        return f"database {quote_identifier(database)}" if database else "role all"
    return f"role {quote_identifier(role)}" + (f" in database {quote_identifier(database)}" if database else "")


def _whom(role: str | None, database: str | None) -> str:
    parts = [f"role {role}" if role else "all roles", f"database {database}" if database else ""]
    return " in ".join(part for part in parts if part)
