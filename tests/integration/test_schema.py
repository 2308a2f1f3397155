"""Migrations, what the doctor knows of them, and who may do what."""

import subprocess
import sys
import time
from collections.abc import Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import Connection, errors, sql
from psycopg.rows import TupleRow

from config.errors import SchemaVersionError, TransientDatabaseError
from config.settings import Settings
from db.commit import commit_object
from db.doctor import checks
from db.migrate import _LOCK_KEY, require_current, upgrade, wanted_version
from db.topics import create_topic, partition_ids
from db.translate import _BY_CONSTRAINT
from tests.servers import PostgresServer

# Everything a table is made of, as the server itself prints it.
CATALOGS = {
    "columns": """
        select c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity,
               a.attgenerated, l.collname, pg_get_expr(d.adbin, d.adrelid)
        from pg_attribute a
        join pg_class c on c.oid = a.attrelid
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        left join pg_collation l on l.oid = a.attcollation
        where c.relnamespace = 'tidemark'::regnamespace and c.relkind = 'r' and c.relname <> 'alembic_version'
          and a.attnum > 0 and not a.attisdropped
        order by c.relname, a.attnum""",
    "constraints": """
        select c.relname, k.conname, k.contype, pg_get_constraintdef(k.oid), k.convalidated
        from pg_constraint k join pg_class c on c.oid = k.conrelid
        where k.connamespace = 'tidemark'::regnamespace and c.relname <> 'alembic_version'
        order by 1, 2""",
    "indexes": """
        select tablename, indexname, indexdef from pg_indexes
        where schemaname = 'tidemark' and tablename <> 'alembic_version' order by 1, 2""",
    "sequences": """
        select sequencename, data_type::text, start_value, min_value, max_value, increment_by, cycle, cache_size
        from pg_sequences where schemaname = 'tidemark' order by 1""",
    "storage": """
        select relname, relpersistence, (select array_agg(o order by o) from unnest(reloptions) o)
        from pg_class where relnamespace = 'tidemark'::regnamespace and relkind = 'r' and relname <> 'alembic_version'
        order by 1""",
}


@pytest.fixture
def empty_url(postgres_server: PostgresServer) -> Iterator[str]:
    """A database without the schema."""
    name = f"empty_{uuid4().hex[:12]}"
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        yield postgres_server.url(name)
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def catalog(url: str, query: str) -> list[TupleRow]:
    with psycopg.connect(url, autocommit=True) as conn:
        return conn.execute(query).fetchall()


def test_the_doctor_makes_all_of_a_migrated_schema_again(database_url: str, conn: Connection[TupleRow]) -> None:
    """It reads the migrations' files, so no constraint, index or storage parameter may stand where it does not look."""
    before = {name: catalog(database_url, query) for name, query in CATALOGS.items()}
    assert all(before.values())
    for (statement,) in conn.execute("""
        select format('alter table %s drop constraint %I cascade', conrelid::regclass, conname) from pg_constraint
        where connamespace = 'tidemark'::regnamespace and contype <> 'n'
          and conrelid <> 'tidemark.alembic_version'::regclass
        order by contype = 'f' desc""").fetchall():
        conn.execute(statement.encode())
    for (statement,) in conn.execute("""
        select format('drop index tidemark.%I', indexname) from pg_indexes
        where schemaname = 'tidemark' and tablename <> 'alembic_version'""").fetchall():
        conn.execute(statement.encode())
    for (statement,) in conn.execute("""
        select format('alter table %s reset (%s)', oid::regclass, split_part(unnest(reloptions), '=', 1)) from pg_class
        where relnamespace = 'tidemark'::regnamespace""").fetchall():
        conn.execute(statement.encode())
    look = checks(conn, Settings(database_url=database_url))
    repairs = [
        repair for name in ("tables", "constraints and indexes") for row in look[name]() for repair in row.repair
    ]
    # Foreign keys need what they refer to.
    for repair in sorted(repairs, key=lambda repair: "foreign key" in repair):
        conn.execute(repair.encode())
    assert {name: catalog(database_url, query) for name, query in CATALOGS.items()} == before


def test_migrating_twice_changes_nothing(database_url: str) -> None:
    everything = [*CATALOGS.values(), "select oid::regprocedure::text, prosrc, proacl::text from pg_proc order by 1"]
    before = [catalog(database_url, query) for query in everything]
    assert upgrade(database_url) == (wanted_version(), wanted_version())
    assert [catalog(database_url, query) for query in everything] == before


def test_two_processes_migrate_an_empty_database_at_once(empty_url: str) -> None:
    program = "import sys; from db.migrate import upgrade; print(*upgrade(sys.argv[1]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, empty_url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    head = wanted_version()
    assert sorted(outputs) == sorted([f"None {head}", f"{head} {head}"])
    with psycopg.connect(empty_url, autocommit=True) as conn:
        require_current(conn)
        assert conn.execute("select count(*) from tidemark.cluster").fetchone() == (1,)
        assert conn.execute("select count(*) from tidemark.fan_outs").fetchone() == (1,)
        assert conn.execute("select count(*) from tidemark.sweeps").fetchone() == (1,)


def test_migrating_gives_up_where_others_have_the_lock(
    conn: Connection[TupleRow], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may take an advisory lock: a migration that waited without limit would stop a deployment for good."""
    monkeypatch.setattr("db.migrate.LOCK_TIMEOUT", "200ms")
    conn.execute("select pg_advisory_lock(%s)", (_LOCK_KEY,))
    began = time.monotonic()
    with pytest.raises(TransientDatabaseError, match="for longer than 200ms"):
        upgrade(database_url)
    assert 0.2 <= time.monotonic() - began < 5
    conn.execute("select pg_advisory_unlock_all()")
    assert upgrade(database_url) == (wanted_version(), wanted_version())


def test_functions_are_replaced_by_every_migration(database_url: str, conn: Connection[TupleRow]) -> None:
    """And their percent signs survive the way through SQLAlchemy."""
    conn.execute(
        "create or replace function tidemark.partition_ids(topic text) returns int[] "
        "language sql as 'select null::int[]'"
    )
    upgrade(database_url)
    with pytest.raises(psycopg.Error, match="topic 'gone' does not exist"):
        conn.execute("select tidemark.partition_ids('gone')")


def test_a_newer_schema_is_refused(database_url: str, conn: Connection[TupleRow]) -> None:
    conn.execute("update tidemark.alembic_version set version_num = '9999'")
    before = catalog(database_url, "select oid, xmin::text from pg_proc order by 1")
    with pytest.raises(SchemaVersionError, match="9999"):
        upgrade(database_url)
    with pytest.raises(SchemaVersionError, match="9999"):
        require_current(conn)
    assert catalog(database_url, "select oid, xmin::text from pg_proc order by 1") == before


def test_an_empty_database_is_not_current(empty_url: str) -> None:
    with (
        psycopg.connect(empty_url, autocommit=True) as conn,
        pytest.raises(SchemaVersionError, match="celery -A tasks migrate"),
    ):
        require_current(conn)


def test_a_failed_migration_leaves_the_old_schema(empty_url: str) -> None:
    with psycopg.connect(empty_url, autocommit=True) as conn:
        # In the way of the last file that is applied, the views.
        conn.execute("create schema tidemark")
        conn.execute("create table tidemark.named_partitions (x int)")
        with pytest.raises(Exception, match="named_partitions"):
            upgrade(empty_url)
        tables = conn.execute("select relname from pg_class where relnamespace = 'tidemark'::regnamespace").fetchall()
        assert tables == [("named_partitions",)]


@pytest.mark.parametrize("name", sorted(_BY_CONSTRAINT))
def test_constraints_that_translate_exist(name: str, conn: Connection[TupleRow]) -> None:
    assert conn.execute(
        "select count(*) from pg_constraint where conname = %s and connamespace = 'tidemark'::regnamespace", (name,)
    ).fetchone() == (1,)


def test_every_index_belongs_to_a_constraint_or_is_known(conn: Connection[TupleRow]) -> None:
    """A further index on events or runs costs a quarter of a path's throughput: nobody adds one in passing."""
    rows = conn.execute(
        "select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid "
        "where c.relnamespace = 'tidemark'::regnamespace "
        "and not exists (select from pg_constraint k where k.conindid = i.indexrelid) order by 1"
    ).fetchall()
    of_objects = "dead_objects_dead_at_idx", "deleted_partitions_left_idx", "objects_tx_idx"
    assert [name for (name,) in rows] == [*of_objects, "runs_apart_idx", "runs_late_idx", "topics_name_collision"]


@pytest.fixture
def producer(conn: Connection[TupleRow]) -> Connection[TupleRow]:
    create_topic(conn, "orders", 2)
    conn.execute("set role tidemark_producer")
    return conn


def test_a_producer_commits(producer: Connection[TupleRow]) -> None:
    ids = partition_ids(producer, "orders")
    first = commit_object(producer, "a", ids, [1, 2], [0, 10], [10, 10], [0, 0])
    assert commit_object(producer, "a", ids, [1, 2], [0, 10], [10, 10], [0, 0]) == first


@pytest.mark.parametrize(
    "statement",
    [
        "select tidemark.create_topic('x', 1)",
        "select * from tidemark.fetch_batches(1, 0, 1, 1)",
        "select * from tidemark.fetch_batches('orders', 0, 0, 1, 1)",
        "select tidemark.tx_base()",
        "select * from tidemark.cursors(array[1])",
        "select * from tidemark.pending(array[1], 1, 1)",
        "select tidemark.explain_invalid_commit('k', '{}', '{}', '{}', '{}', '{}')",
        "create table tidemark.mine (x int)",
        "create function tidemark.mine() returns int return 1",
        "update tidemark.topic_partitions set partition = 5",
        "insert into tidemark.topics (name, partitions) values ('x', 1)",
        "truncate tidemark.objects",
        "drop view tidemark.record_batches",
    ],
)
def test_a_producer_may_do_nothing_else(statement: str, producer: Connection[TupleRow]) -> None:
    with pytest.raises(errors.InsufficientPrivilege):
        producer.execute(statement.encode())


def test_a_producer_reads_no_table_or_view_and_executes_only_what_brokers_need(producer: Connection[TupleRow]) -> None:
    readable = producer.execute(
        "select c.oid::regclass::text from pg_class c where c.relnamespace = 'tidemark'::regnamespace "
        "and c.relkind in ('r', 'v', 'm', 'p') "
        "and has_table_privilege(c.oid, 'select, insert, update, delete, truncate, references, trigger')"
    ).fetchall()
    sequences = producer.execute(
        "select c.relname from pg_class c where c.relnamespace = 'tidemark'::regnamespace "
        "and case when c.relkind = 'S' then has_sequence_privilege(c.oid, 'usage, select, update') else false end"
    ).fetchall()
    functions = producer.execute(
        "select proname from pg_proc where pronamespace = 'tidemark'::regnamespace "
        "and has_function_privilege(oid, 'execute') order by 1"
    ).fetchall()
    assert (readable, sequences) == ([], [])
    needed = ("commit_batches", "commit_object", "condemn", "init_producer", "list_topics", "partition_ids", "receipts")
    assert [name for (name,) in functions] == list(needed)


def test_definer_functions_have_a_fixed_search_path(conn: Connection[TupleRow]) -> None:
    """Or the caller's own `=` operator would run with the owner's rights."""
    rows = conn.execute(
        # Names in a parsed body were bound when the function was made.
        "select proname, proconfig from pg_proc where pronamespace = 'tidemark'::regnamespace and prosqlbody is null"
    ).fetchall()
    assert {name for name, config in rows if "search_path=pg_catalog, pg_temp" not in (config or [])} == set()
    assert "commit_object" in dict(rows)
