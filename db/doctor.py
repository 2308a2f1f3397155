"""Looks at a Postgres and a database from every side Tidemark depends on; changes nothing.

Each check reads for itself and yields findings, so that one which may not look, or finds no schema, spoils no other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import time
from typing import Any

import psycopg
from psycopg import errors

from config.settings import Settings
from db.doctor_schema import check_functions, check_privileges, check_rules, check_tables, check_version
from db.doctor_settings import check_defaults, check_settings
from db.findings import Finding, Level, quote_identifier, quote_literal
from db.statements import run
from db.status import _dispatch as read_dispatch
from db.status import _holders

_OLDEST, _NEWEST = 15, 18
_MAJOR = 10_000
_ROWS = 100
_LONG_SECONDS = 60.0
_TOO_LONG_SECONDS = 3600.0
_SKEW_WARN, _SKEW_FAIL = 2.0, 30.0
_MANY_DEAD = 50_000
# Postgres forces a vacuum at 200 million and stops at two thousand million.
_OLD_XIDS, _TOO_OLD_XIDS = 1_000_000_000, 1_800_000_000
_BUSY = 0.8
_MILLISECOND = 0.001
# Told, not judged: the settings of the transactions pin the plans with it and without.
_HINT_PLAN = {
    None: "not loaded, nor needed: settings pin the plans",
    True: "loaded; the statements' hints are used, beside the settings that pin the plans",
    False: "loaded, but pg_hint_plan.enable_hint is off; settings pin the plans",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Server:
    """What several checks ask of the server."""

    version: int
    version_text: str
    in_recovery: bool
    encoding: str
    xid_age: int
    connections: int
    connected: int
    user: str
    database: str
    monitor: bool
    # None where pg_hint_plan is not loaded; False where it is told to ignore hints.
    hint_plan: bool | None

    @property
    def major(self) -> int:
        return self.version // _MAJOR


def read_server(conn: psycopg.Connection[Any]) -> Server:
    """Read it."""
    row = run(conn, "doctor_server").fetchone()
    assert row is not None  # noqa: S101 - we are connected to this database
    return Server(
        version=row[0],
        version_text=row[1],
        in_recovery=row[2],
        encoding=row[3],
        xid_age=row[4],
        connections=row[5],
        connected=row[6],
        user=row[7],
        database=row[8],
        monitor=row[9],
        hint_plan=row[10],
    )


def examine(conn: psycopg.Connection[Any], settings: Settings) -> Iterator[tuple[str, list[Finding]]]:
    """Every check's name and findings; `conn` in autocommit mode, and none of its settings changed."""
    server = read_server(conn)
    embedded = settings.database_url is None
    checks: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
        ("server", lambda: check_server(server)),
        ("connections", lambda: check_connections(server, settings)),
        ("clock", lambda: check_clock(conn)),
        ("settings", lambda: check_settings(conn, embedded=embedded)),
        ("role and database defaults", lambda: check_defaults(conn)),
        ("version", lambda: check_version(conn)),
        ("tables", lambda: check_tables(conn)),
        ("constraints and indexes", lambda: check_rules(conn)),
        ("functions", lambda: check_functions(conn)),
        ("privileges", lambda: check_privileges(conn, monitor=server.monitor)),
        ("cluster and fan-out", lambda: check_dispatch(conn, settings)),
        ("transactions", lambda: check_transactions(conn)),
        ("vacuum", lambda: check_vacuum(conn, server)),
    )
    with_schema = True
    for name, check in checks:
        if not with_schema and name in _NEED_SCHEMA:
            continue
        findings = list(_guarded(name, check))
        if name == "version":
            with_schema = _has_schema(conn)
        yield name, findings


# Without a schema, one finding says so; twenty would say it no better.
_NEED_SCHEMA = {
    "tables",
    "constraints and indexes",
    "functions",
    "privileges",
    "cluster and fan-out",
    "transactions",
}


def _has_schema(conn: psycopg.Connection[Any]) -> bool:
    return bool(run(conn, "doctor_tables").fetchall())


def _guarded(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except (errors.InsufficientPrivilege, errors.UndefinedTable, errors.UndefinedFunction, errors.UndefinedColumn) as e:
        message = e.diag.message_primary or str(e)
        yield Finding(
            area="server",
            check=name,
            level=Level.WARN,
            found="could not be looked at",
            why=f"Postgres says: {message}.",
            mend=("connect as the owner of the schema",),
        )


def check_server(server: Server) -> Iterator[Finding]:
    """Version, role of the server, encoding, extension."""
    finding = Finding(area="server", check="Postgres", level=Level.OK, found=server.version_text)
    if server.major < _OLDEST:
        yield _worse(finding, Level.FAIL, f"Tidemark needs {_OLDEST} or later.", f"upgrade to Postgres {_NEWEST}")
    elif server.major > _NEWEST:
        yield _worse(finding, Level.WARN, f"Tidemark was tested up to {_NEWEST}.", "install a newer tidemark")
    else:
        yield finding
    finding = Finding(area="server", check="primary", level=Level.OK, found="yes")
    if server.in_recovery:
        finding = Finding(area="server", check="primary", level=Level.OK, found="no, in recovery")
        yield _worse(finding, Level.FAIL, "A standby takes no commits.", "let TIDEMARK_DATABASE_URL name the primary")
    else:
        yield finding
    finding = Finding(area="server", check="encoding", level=Level.OK, found=server.encoding)
    if server.encoding != "UTF8":
        fix = f"create database {quote_identifier(server.database)} template template0 encoding 'UTF8';"
        yield _worse(finding, Level.FAIL, "Object keys are any text; this encoding cannot hold it.", fix)
    else:
        yield finding
    yield Finding(area="server", check="pg_hint_plan", level=Level.OK, found=_HINT_PLAN[server.hint_plan])


def check_connections(server: Server, settings: Settings) -> Iterator[Finding]:
    """Whether workers, and one process with its whole pool open, find room."""
    wanted = settings.shards + settings.pool_open
    found = f"{server.connections} allowed, {server.connected} in use"
    finding = Finding(area="server", check="connections", level=Level.OK, found=found)
    fix = (f"alter system set max_connections = {max(200, 2 * wanted)};", "restart Postgres")
    if server.connections < wanted:
        why = (
            f"{settings.shards} shards take a connection each, and a process with threads up to "
            f"TIDEMARK_POOL_OPEN = {settings.pool_open}."
        )
        yield _worse(finding, Level.WARN, why, *fix)
    elif server.connected > _BUSY * server.connections:
        yield _worse(finding, Level.WARN, "Nearly all are taken; the next worker may find none.", *fix)
    else:
        yield finding


def check_clock(conn: psycopg.Connection[Any]) -> Iterator[Finding]:
    """This machine's clock against the server's, less what the round trip leaves open."""
    before = time()
    row = run(conn, "doctor_clock").fetchone()
    after = time()
    assert row is not None  # noqa: S101 - a function call returns a row
    yield judge_clock("Postgres", row[0], before, after)


def judge_clock(server: str, theirs: float, before: float, after: float) -> Finding:
    """A server's clock, asked between two moments of ours."""
    ahead = theirs - (before + after) / 2
    off = max(0.0, abs(ahead) - (after - before) / 2)
    finding = Finding(
        area="clock",
        check=server,
        level=Level.OK,
        found=f"{off:.3f} s {'ahead of' if ahead > 0 else 'behind'} this machine" if off >= _MILLISECOND else "agrees",
    )
    if off < _SKEW_WARN:
        return finding
    level = Level.FAIL if off >= _SKEW_FAIL else Level.WARN
    why = "Lag, retention by time and the expiry of beat's tasks compare clocks."
    return _worse(finding, level, why, "synchronize both machines' clocks (chrony, systemd-timesyncd)")


def check_dispatch(conn: psycopg.Connection[Any], settings: Settings) -> Iterator[Finding]:
    """Whether the log belongs to this cluster, and fan-out keeps up."""
    dispatch = read_dispatch(conn)
    undispatched = dispatch.undispatched
    finding = Finding(area="schema", check="cluster identifier", level=Level.OK, found="the log's own")
    if not dispatch.own_cluster:
        finding = Finding(area="schema", check="cluster identifier", level=Level.OK, found="another cluster's")
        why = "The database was restored or moved; commits and workers refuse to work here."
        yield _worse(finding, Level.FAIL, why, "stop all brokers and workers", "celery -A tasks rebase")
    else:
        yield finding
    found = f"saw something new {dispatch.last:.0f} s ago" if undispatched is None else f"{undispatched:.0f} s behind"
    finding = Finding(area="activity", check="fan-out", level=Level.OK, found=found)
    patience = max(_LONG_SECONDS / 2, 20 * settings.fan_out_interval)
    if undispatched is None or undispatched < patience:
        yield finding
        return
    level = Level.FAIL if undispatched >= 10 * patience else Level.WARN
    why = "Commits wait that nobody handed to a worker."
    yield _worse(finding, level, why, "celery -A tasks beat", "celery -A tasks worker")


def check_transactions(conn: psycopg.Connection[Any]) -> Iterator[Finding]:
    """What has been open too long, and slots that nobody reads."""
    good = True
    for holder in _holders(conn):
        seconds, name = holder.seconds or 0.0, holder.name
        if seconds < _LONG_SECONDS and holder.state != "inactive":
            continue
        good = False
        whose = f"of {holder.user} in {holder.database}, for {seconds:.0f} s"
        behind = f"{holder.state}" + f", {seconds:.0f} s behind" * bool(seconds)
        found, mend = {
            "session": (f"pid {name} {whose}, {holder.state}", (f"select pg_terminate_backend({name});",)),
            "standby": (f"pid {name} ({holder.application}), {behind}", ("end the query that runs there",)),
            "prepared transaction": (
                f"{name} {whose}",
                (f"commit prepared {quote_literal(name)};", f"or: rollback prepared {quote_literal(name)};"),
            ),
            "replication slot": (f"{name}, {behind}", (f"select pg_drop_replication_slot({quote_literal(name)});",)),
        }[holder.kind]
        why = "It keeps dead rows from vacuum"
        if holder.has_id:
            why += ", and what it commits from its offsets"
        elif holder.state == "inactive":
            why = "It keeps the write-ahead log, and perhaps dead rows, for ever"
        level = Level.FAIL if seconds >= _TOO_LONG_SECONDS else Level.WARN
        check = "long transaction" if holder.kind == "session" else holder.kind
        yield Finding(area="activity", check=check, level=level, found=found, why=f"{why}.", mend=mend)
    if good:
        yield Finding(
            area="activity", check="transactions", level=Level.OK, found=f"none older than {_LONG_SECONDS:.0f} s"
        )


def check_vacuum(conn: psycopg.Connection[Any], server: Server) -> Iterator[Finding]:
    """Dead rows by table, whether vacuum is at it, and how old the oldest transaction id is."""
    bad = False
    running: list[str] = []
    for table, _, _, live, dead, seconds, phase in run(conn, "doctor_tables").fetchall():
        if phase is not None:
            running.append(f"{table} ({phase})")
        if dead < _MANY_DEAD or dead < live / 2:
            continue
        bad = True
        when = "never" if seconds is None else f"{seconds:.0f} s ago"
        now = f", vacuum is at it ({phase})" if phase else ""
        yield Finding(
            area="activity",
            check=f"dead rows in {table}",
            level=Level.WARN,
            found=f"{dead:,} beside {live:,}, vacuumed {when}{now}",
            why="Vacuum does not keep up, or an old transaction holds it back.",
            mend=(f"vacuum (analyze) tidemark.{table};",),
        )
    if not bad:
        found = f"few; vacuum runs on {', '.join(running)}" if running else "few"
        yield Finding(area="activity", check="dead rows", level=Level.OK, found=found)
    finding = Finding(
        area="activity", check="transaction ids", level=Level.OK, found=f"oldest is {server.xid_age:,} back"
    )
    if server.xid_age < _OLD_XIDS:
        yield finding
    else:
        level = Level.FAIL if server.xid_age >= _TOO_OLD_XIDS else Level.WARN
        yield _worse(finding, level, "At 2,000,000,000 Postgres takes no more writes.", "vacuum (freeze);")


def _worse(finding: Finding, level: Level, why: str, *mend: str) -> Finding:
    return Finding(area=finding.area, check=finding.check, level=level, found=finding.found, why=why, mend=tuple(mend))
