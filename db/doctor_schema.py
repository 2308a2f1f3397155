"""The schema against its definition in `db.schema`: version, tables, constraints, indexes, functions, privileges."""

from collections.abc import Iterator
from typing import Any

import psycopg
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import AddConstraint, CreateIndex, DDLElement

from config.errors import SchemaVersionError
from db.findings import Finding, Level, quote_identifier
from db.migrate import require_current
from db.schema import SCHEMA, metadata
from db.statements import routine_files, run

AREA = "schema"
MIGRATE = "celery -A tasks migrate"
# Each further index costs commits or materialization a fifth of their throughput and more.
_FEW_INDEXES = ("record_batch_events", "runs")
_PRODUCER_FUNCTIONS = {"commit_object", "partition_ids"}


def check_version(conn: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Whether the schema is this program's."""
    try:
        require_current(conn)
    except SchemaVersionError as error:
        yield Finding(
            area=AREA,
            check="version",
            level=Level.FAIL,
            found="another one",
            why=f"{error}.".replace(f"; run: {MIGRATE}", ""),
            mend=(MIGRATE,),
        )
    else:
        yield Finding(area=AREA, check="version", level=Level.OK, found="current")


def check_tables(conn: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Whether each table is there, written to the log, and has its storage parameters."""
    found = {row[0]: (row[1], dict(option.split("=", 1) for option in row[2])) for row in run(conn, "doctor_tables")}
    bad = False
    for table in metadata.sorted_tables:
        if table.name not in found:
            bad = True
            yield _missing("table", table.name)
            continue
        permanent, options = found[table.name]
        if not permanent:
            bad = True
            yield Finding(
                area=AREA,
                check=f"table {table.name}",
                level=Level.FAIL,
                found="unlogged",
                why="A crash empties it.",
                mend=(f"alter table {SCHEMA}.{table.name} set logged;",),
            )
        wanted: dict[str, str] = dict(table.dialect_options["postgresql"].get("with") or {})
        differing = {name: value for name, value in wanted.items() if options.get(name) != value}
        if differing:
            bad = True
            values = ", ".join(f"{name} = {value}" for name, value in differing.items())
            yield Finding(
                area=AREA,
                check=f"table {table.name}",
                level=Level.WARN,
                found=", ".join(f"{name} = {options.get(name, 'default')}" for name in differing),
                why="They leave room for updates in place.",
                mend=(f"alter table {SCHEMA}.{table.name} set ({values});",),
            )
        if options.get("autovacuum_enabled", "true").lower() in {"false", "off", "no", "0"}:
            bad = True
            yield Finding(
                area=AREA,
                check=f"table {table.name}",
                level=Level.FAIL,
                found="autovacuum is switched off",
                why="Dead rows pile up, and every read gets slower.",
                mend=(f"alter table {SCHEMA}.{table.name} reset (autovacuum_enabled);",),
            )
    if not bad:
        yield Finding(area=AREA, check="tables", level=Level.OK, found=f"all {len(metadata.tables)}, as defined")


def check_rules(conn: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Whether every constraint and index is there and valid, and no index too many."""
    rows = run(conn, "doctor_rules").fetchall()
    tables = {row[0] for row in run(conn, "doctor_tables").fetchall()}
    names = {(row[0], row[3]): row[2] for row in rows}
    bad = False
    expected = 0
    # What it takes to make each of ours again.
    statements: dict[tuple[str, bool], tuple[str, DDLElement]] = {
        **{
            (str(constraint.name), False): (table.name, AddConstraint(constraint, isolate_from_table=False))
            for table in metadata.sorted_tables
            for constraint in table.constraints
            if constraint.name
        },
        **{
            (str(index.name), True): (table.name, CreateIndex(index))
            for table in metadata.sorted_tables
            for index in table.indexes
        },
    }
    for (name, is_index), (table_name, make) in sorted(statements.items(), key=lambda item: item[0]):
        if table_name not in tables:
            continue
        expected += 1
        if (name, is_index) not in names:
            bad = True
            ddl = " ".join(str(make.compile(dialect=postgresql.dialect())).split())  # type: ignore[no-untyped-call]
            yield Finding(
                area=AREA,
                check=f"{'index' if is_index else 'constraint'} {name}",
                level=Level.FAIL,
                found="missing",
                why="An invariant is not enforced, or statements read whole tables.",
                mend=(f"{ddl};",),
            )
        elif not names[name, is_index]:
            bad = True
            yield Finding(
                area=AREA,
                check=f"{'index' if is_index else 'constraint'} {name}",
                level=Level.FAIL,
                found="not valid",
                why="It does not cover the rows that were there before it.",
                mend=(
                    f"reindex index concurrently {SCHEMA}.{name};"
                    if is_index
                    else f"alter table {SCHEMA}.{table_name} validate constraint {name};",
                ),
            )
    for name, table_name, valid, is_index in rows:
        of_constraint = (name, False) in names
        if is_index and not valid and of_constraint:
            bad = True
            yield Finding(
                area=AREA,
                check=f"index {name}",
                level=Level.FAIL,
                found="not valid",
                why="It is not kept up or not used, so what its constraint says may not hold.",
                mend=(f"reindex index concurrently {SCHEMA}.{quote_identifier(name)};",),
            )
        if is_index and table_name in _FEW_INDEXES and not of_constraint and (name, True) not in statements:
            bad = True
            yield Finding(
                area=AREA,
                check=f"index {name}",
                level=Level.WARN,
                found=f"an index too many on {table_name}",
                why="Each further one costs 15 to 40 per cent of throughput, and may lure the planner off the key.",
                mend=(f"drop index concurrently {SCHEMA}.{quote_identifier(name)};",),
            )
    if not bad:
        yield Finding(area=AREA, check="constraints and indexes", level=Level.OK, found=f"all {expected}, valid")


def check_functions(conn: psycopg.Connection[Any]) -> Iterator[Finding]:
    """Whether every function is there, and who may execute it."""
    rows = run(conn, "doctor_functions").fetchall()
    there = {row[0] for row in rows}
    bad = False
    for name in sorted(file.stem for file in routine_files() if file.stem not in {"views", "grants"}):
        if name not in there:
            bad = True
            yield _missing("function", name)
    user = quote_identifier(conn.info.user)
    for name, signature, mine, public, _ in rows:
        if not mine:
            bad = True
            yield Finding(
                area=AREA,
                check=f"function {name}",
                level=Level.FAIL,
                found=f"{conn.info.user} may not execute it",
                why="Workers and commands of this role fail.",
                mend=(f"grant execute on all functions in schema {SCHEMA} to {user};",),
            )
        if public:
            bad = True
            yield Finding(
                area=AREA,
                check=f"function {name}",
                level=Level.WARN,
                found="every role may execute it",
                why="Only members of tidemark_producer should commit.",
                mend=(f"revoke execute on function {signature} from public;",),
            )
    if not bad:
        yield Finding(area=AREA, check="functions", level=Level.OK, found=f"all {len(there)}, executable")


def check_privileges(conn: psycopg.Connection[Any], *, monitor: bool) -> Iterator[Finding]:
    """What this role and the producer role may do."""
    role = conn.info.user
    user = quote_identifier(role)
    rows = run(conn, "doctor_privileges").fetchall()
    lacking = {name: rights for name, rights, _ in rows if rights}
    if lacking:
        name, rights = next(iter(lacking.items()))
        yield Finding(
            area="privileges",
            check="tables",
            level=Level.FAIL,
            found=f"{role} may not {', '.join(rights)} in {name}"
            + f" and {len(lacking) - 1} more" * (len(lacking) > 1),
            why="Workers and commands of this role fail.",
            mend=(
                f"grant usage on schema {SCHEMA} to {user};",
                f"grant select, insert, update, delete on all tables in schema {SCHEMA} to {user};",
            ),
        )
    else:
        yield Finding(area="privileges", check="tables", level=Level.OK, found=f"{role} may read and write them")
    if monitor:
        yield Finding(area="privileges", check="pg_monitor", level=Level.OK, found=f"{role} sees all sessions")
    else:
        yield Finding(
            area="privileges",
            check="pg_monitor",
            level=Level.WARN,
            found=f"{role} sees only its own sessions",
            why="status and top cannot show what a partition waits for.",
            mend=(f"grant pg_monitor to {user};",),
        )
    yield from _check_producer(conn, {name: rights for name, _, rights in rows})


def _check_producer(conn: psycopg.Connection[Any], tables: dict[str, list[str] | None]) -> Iterator[Finding]:
    check = "tidemark_producer"
    if tables and all(rights is None for rights in tables.values()):
        yield Finding(
            area="privileges",
            check=check,
            level=Level.WARN,
            found="the role does not exist",
            why="Brokers have no role that may commit and nothing else.",
            mend=("create role tidemark_producer nologin;", MIGRATE),
        )
        return
    bad = False
    excess = sorted(name for name, rights in tables.items() if rights)
    if excess:
        bad = True
        yield Finding(
            area="privileges",
            check=check,
            level=Level.WARN,
            found=f"it has rights to tables: {', '.join(excess)}",
            why="A producer should commit and nothing else.",
            mend=(f"revoke all on all tables in schema {SCHEMA} from tidemark_producer;",),
        )
    may = {row[0] for row in run(conn, "doctor_functions").fetchall() if row[4]}
    if not may >= _PRODUCER_FUNCTIONS:
        bad = True
        yield Finding(
            area="privileges",
            check=check,
            level=Level.FAIL,
            found=f"it may not execute {', '.join(sorted(_PRODUCER_FUNCTIONS - may))}",
            why="Brokers cannot commit.",
            mend=(MIGRATE,),
        )
    if not bad:
        yield Finding(area="privileges", check=check, level=Level.OK, found="may commit, and nothing else")


def _missing(kind: str, name: str) -> Finding:
    return Finding(
        area=AREA,
        check=f"{kind} {name}",
        level=Level.FAIL,
        found="missing",
        why="Every statement that uses it fails." if kind == "function" else "Part of the schema was dropped.",
        mend=(MIGRATE,) if kind == "function" else ("restore a backup, then: celery -A tasks rebase",),
    )
