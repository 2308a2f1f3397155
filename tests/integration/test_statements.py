"""Every SQL file runs as it stands in psql, and says first what it is for."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import psycopg.rows
import pytest
from psycopg import sql

import db
from config.embedded.host import postgres_bin as wheel_bin
from db.audit import audit
from db.commit import commit_object
from db.discover import find_committed, save_fan_out, sweep
from db.fetch import fetch_batches
from db.materialize import materialize
from db.migrate import require_current
from db.objects import forget_dead_objects, list_dead_objects
from db.rebase import rebase
from db.retention import retain
from db.statements import routine_files, statements
from db.status import describe_partitions, describe_topics, find_partition, read_offsets, records_to_audit
from db.topics import PartitionIds, create_topic, highest_partition_id, names_of, partition_ids, set_retention
from tests.servers import PostgresServer
from tests.support import Connect
from tests.support_hints import GROWING, HINTED, phrases, scans, split, with_a_hint

SQL = Path(db.__file__).parent / "sql"

# Values for $1, $2, … of each statement; `{p}` is a partition id.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "ages_of_run": ("{p}", "0"),
    "audit_left": ("orders",),
    "commit_object": ("a key", "{{{p}}}", "{{1}}", "{{0}}", "{{10}}", "{{0}}"),
    "describe_partitions": ("{{orders}}", "100", "true"),
    "describe_topics": ("{{orders}}",),
    "doctor_clock": (),
    "doctor_defaults": (),
    "doctor_functions": ("{{commit_object}}",),
    "doctor_has_schema": (),
    "doctor_privileges": (),
    "doctor_rules": ("{{runs_pkey}}", "{{tidemark.runs}}", "{{ddl}}"),
    "doctor_server": ("8", "25"),
    "doctor_settings": ("true",),
    "doctor_tables": ("{{runs}}", "{{null}}"),
    "doctor_vacuum": ("10",),
    "is_migrated": (),
    "lock_cluster": (),
    "lock_migrations": ("42",),
    "schema_version": (),
    "session_settings": ("{{jit}}", "{{off}}"),
    "fetch_batches": ("{p}", "0", "1000", "10"),
    "find_committed": ("3", "{{}}", "100", "1000"),
    "find_holders": ("10",),
    "find_lock_waits": ("10",),
    "find_row_locks": ("{{{p}}}", "10"),
    "find_pending": ("0", "100", "100", "1000"),
    "lock_free_partitions": ("{{{p}}}",),
    "lock_partitions": ("{{{p}}}",),
    "figures_connections": (),
    "figures_indexes": (),
    "figures_tables": (),
    "figures_topics": ("200", "1000", "60"),
    "place_incremental": ("100",),
    "place_window": ("100",),
    "read_fan_out": (),
    "read_dispatch": (),
    "raise_sequences": (),
    "read_head": ("{p}",),
    "rebase": (),
    "save_fan_out": ("10", "{{5}}"),
    "transaction_settings": (),
    "truncate_cluster": (),
}


# Of the seed's tables, which test_adopt has: there all of them run in psql.
OF_THE_SEED = {name for name, text in statements().items() if b"pg_temp." in text or text.endswith(b"discard temp")}

OTHERS = sorted(statements().keys() - PARAMETERS.keys() - OF_THE_SEED)


@pytest.fixture(scope="module")
def database_url(postgres_server: PostgresServer, template_database: str) -> Iterator[str]:
    """One for all of this module's tests, which roll back."""
    name = sql.Identifier("test_statements")
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {} template {}").format(name, sql.Identifier(template_database)))
        yield postgres_server.url("test_statements")
        admin.execute(sql.SQL("drop database {} with (force)").format(name))


@pytest.fixture(scope="module")
def partition_id(database_url: str) -> int:
    with psycopg.connect(database_url, autocommit=True) as conn:
        create_topic(conn, "orders", 1)
        return partition_ids(conn, "orders")[0]


def psql(url: str, script: str) -> str:
    """What psql prints; it stops at the first error, which would be on stderr."""
    done = subprocess.run(
        [wheel_bin() / "psql", "-X", "-v", "ON_ERROR_STOP=1", "-d", url],
        input=script,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.rstrip()


def test_the_statements_that_are_run_exist() -> None:
    assert statements().keys() >= PARAMETERS.keys()


@pytest.mark.parametrize("name", OTHERS)
def test_is_understood_by_psql(name: str, database_url: str) -> None:
    """Statements without values here: names and types are resolved, which is where a file goes stale."""
    text = statements()[name].decode()
    assert psql(database_url, f"prepare checked as\n{text};\n") == "PREPARE"


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_runs_in_psql(name: str, database_url: str, partition_id: int) -> None:
    values = [f"'{value.format(p=partition_id)}'" for value in PARAMETERS[name]]
    text = statements()[name].decode()
    # A single statement is sent with its values; scripts end each of theirs themselves.
    run = f"{text}\n\\bind {' '.join(values)} \\g\n" if values else f"{text};\n"
    # As the statement that locks leaves it to the one that places.
    locked = f"set local tidemark.locked = '{{{partition_id}}}';\n"
    assert psql(database_url, f"begin;\n{locked}{run}rollback;\n").endswith("ROLLBACK")


TEXTS = {name: text.decode() for name, text in statements().items()} | {
    f"function {file.stem}": file.read_text("utf-8") for file in (SQL / "functions").glob("*.sql")
}


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_starts_with_its_purpose(name: str) -> None:
    text = TEXTS[name]
    # A hint is only found at the very front.
    first, *rest = re.sub(r"\A/\*\+.*?\*/\n", "", text, flags=re.DOTALL).splitlines()
    assert re.match(r"-- \S+ \S+", first)
    assert any(line and not line.startswith("--") for line in rest)
    assert all(len(line) <= 130 for line in text.splitlines())


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameters_are_numbered_without_gaps(name: str) -> None:
    code = re.sub(r"--.*", "", statements()[name].decode())
    assert {int(number) for number in re.findall(r"\$(\d+)", code)} == set(range(1, len(PARAMETERS[name]) + 1))


@pytest.mark.parametrize("file", sorted(SQL.glob("*.sql")), ids=lambda file: file.stem)
def test_a_file_holds_named_statements_and_nothing_else(file: Path) -> None:
    """Each ends with a semicolon, so that the whole file can be given to psql, and no name is used twice."""
    first, *parts = re.split(r"^-- name: (\w+)$", file.read_text("utf-8"), flags=re.MULTILINE)
    assert first == ""
    assert all(text.strip() == f"{TEXTS[name]};" for name, text in zip(parts[::2], parts[1::2], strict=True))


def test_the_hot_statements_have_hints() -> None:
    assert with_a_hint() == HINTED


@pytest.mark.parametrize("name", HINTED)
def test_pg_hint_plan_will_read_the_hint(name: str) -> None:
    """The whole of it, with each version: some stop at any other character, some refuse a second hint."""
    hint, rest = split(name)
    assert statements()[name].startswith(b"/*+")
    assert re.fullmatch(r"[A-Za-z0-9_,()\s]+", hint)
    assert re.sub(r"[A-Z]\w+\([^A-Z]+\)", "", hint).strip() == ""
    assert hint.count("(") == hint.count(")")
    assert "/*" not in rest


# The code of each function, by its name.
FUNCTIONS = {
    name: code
    for file in (SQL / "functions").glob("*.sql")
    for name, code in re.findall(
        r"^create or replace function tidemark\.(\w+)\((.*?)(?=^create|\Z)",
        re.sub(r"--.*", "", file.read_text("utf-8")),
        re.MULTILINE | re.DOTALL,
    )
}


def functions_in(code: str) -> set[str]:
    """Those that a statement calls, and those that these call."""
    called = set(re.findall(r"tidemark\.(\w+)\(", code)) & FUNCTIONS.keys()
    return called.union(*(functions_in(FUNCTIONS[name]) for name in called))


def aliases_in(code: str) -> dict[str, set[str]]:
    """By alias, the tables it stands for."""
    tables: dict[str, set[str]] = {}
    for table, alias in re.findall(r"tidemark\.(\w+) (\w+)", code):
        tables.setdefault(alias, set()).add(table)
    return tables


@pytest.mark.parametrize("name", HINTED)
def test_a_hint_names_what_is_there(name: str, database_url: str) -> None:
    """Each alias of a table that grows, with an index of that table; and joins of what the statement joins.

    A function that becomes a part of the statement brings its own.
    """
    _, text = split(name)
    code = re.sub(r"--.*", "", text)
    tables = aliases_in(code)
    assert scans(name).keys() >= {alias for alias, of in tables.items() if of & GROWING}
    for function in functions_in(code):
        for alias, of in aliases_in(FUNCTIONS[function]).items():
            tables.setdefault(alias, set()).update(of)
    assert scans(name).keys() <= tables.keys()
    with psycopg.connect(database_url) as conn:
        rows = conn.execute("select indexname, tablename from pg_indexes where schemaname = 'tidemark'").fetchall()
        indexes: dict[str, str] = dict(rows)
    for alias, index in scans(name).items():
        # An alias of two tables could have only one hint.
        assert (tables[alias] & GROWING or tables[alias]) == {indexes[index]} if index else len(tables[alias]) == 1
    # What stands in a list of tables: with a name before it, or a query in parentheses.
    aliases = set(re.findall(r"(?:\b(?:from|join|using|update)\s+|,\s*)[\w.]+ (\w+)|\) (\w+)$", code, re.MULTILINE))
    for keyword, words in phrases(name):
        if keyword in {"Leading", "NestLoop"}:
            assert set(words) <= {alias for pair in aliases for alias in pair}
            assert len(words) == len(set(words)) > 1


@pytest.mark.parametrize("kind", ["dict_row", "scalar_row", "raw_cursor"])
def test_any_connection_will_do(kind: str, connect: Connect, postgres_server: PostgresServer) -> None:
    """The rows and the cursors of the caller's connection are the caller's: no function of ours depends on them."""
    conn: psycopg.Connection[Any] = connect()
    if kind == "raw_cursor":
        conn.cursor_factory = psycopg.RawCursor
    else:
        conn.row_factory = getattr(psycopg.rows, kind)
    require_current(conn)
    create_topic(conn, kind, 2)
    ids = partition_ids(conn, kind)
    assert PartitionIds().get(conn, kind) == tuple(ids)
    assert (highest_partition_id(conn), names_of(conn, ids)[ids[1]]) == (ids[1], (kind, 1))
    object_id = commit_object(conn, kind, ids, [1, 1], [0, 1], [1, 1], [-1, 0])
    save_fan_out(conn, committed := find_committed(conn))
    assert {p.partition_id for p in committed.partitions} >= set(ids)
    assert {p.partition_id for p in sweep(conn)} >= set(ids)
    assert materialize(conn, ids).events_processed == 2
    assert [batch.object_key for batch in fetch_batches(conn, ids[0], 0)] == [kind]
    assert audit(conn, topic=kind).batches == 2
    set_retention(conn, kind, retention_ms=None, retention_bytes=1)
    commit_object(conn, f"{kind} more", ids, [1, 1], [0, 1], [1, 1], [-1, 0])
    materialize(conn, ids)
    assert retain(conn).deleted == 2
    assert [dead.id for dead in list_dead_objects(conn, older_than_seconds=0)] == [object_id]
    assert forget_dead_objects(conn, [object_id]) == 1
    assert rebase(conn, force=True) is not None
    assert find_partition(conn, kind, 1) == ids[1]
    assert read_offsets(conn, ids[1]) == (1, 2)
    assert [(topic.name, topic.records) for topic in describe_topics(conn, [kind])] == [(kind, 2)]
    assert [partition.backlog for partition in describe_partitions(conn, [kind])] == [0, 0]
    assert records_to_audit(conn, kind) == 2


def test_routines_come_before_views_and_grants() -> None:
    stems = [file.stem for file in routine_files()]
    assert stems[-2:] == ["views", "grants"]
    assert sorted(stems) == sorted(file.stem for file in (SQL / "functions").glob("*.sql"))
