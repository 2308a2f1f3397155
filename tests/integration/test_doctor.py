"""The doctor finds what is wrong, says why, and what it says mends it: each finding is provoked for real."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import Connection, sql
from redis import Redis

from config.embedded.postgres import PostgresServer
from config.embedded.redis import RedisServer
from config.settings import Settings
from db.commit import commit_object
from db.doctor import check_connections, check_dispatch, check_server, examine, judge_clock, read_server
from db.doctor_schema import check_functions, check_privileges, check_rules, check_tables, check_version
from db.doctor_settings import check_defaults, check_settings
from db.findings import Finding, Level, worst
from db.migrate import upgrade
from db.topics import create_topic, partition_ids
from tasks.commands.doctor import doctor
from tasks.doctoring import check_broker, check_environment
from tests.support import Connect
from tests.support_commands import Cli, app_for

SETTINGS = Settings(database_url="postgresql://u@h/d", broker_url="redis://h")


def bad(findings: Iterator[Finding] | list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level is not Level.OK]


def run_mends(conn: Connection[Any], findings: list[Finding]) -> None:
    """Do what the doctor says."""
    for finding in findings:
        for statement in finding.mend:
            conn.execute(statement.encode())


# --- the schema


def test_a_fresh_schema_is_sound(conn: Connection[Any]) -> None:
    for check in (check_version, check_tables, check_rules, check_functions):
        assert bad(check(conn)) == []
    assert bad(check_privileges(conn, monitor=True)) == []


@pytest.mark.parametrize(
    ("damage", "check", "what", "level"),
    [
        ("drop index tidemark.objects_tx_idx", check_rules, "index objects_tx_idx", Level.FAIL),
        (
            "alter table tidemark.runs drop constraint runs_pkey",
            check_rules,
            "constraint runs_pkey",
            Level.FAIL,
        ),
        (
            "alter table tidemark.topics drop constraint topics_name_legal",
            check_rules,
            "constraint topics_name_legal",
            Level.FAIL,
        ),
        (
            "alter table tidemark.topic_partitions drop constraint topic_partitions_topic_id_fkey",
            check_rules,
            "constraint topic_partitions_topic_id_fkey",
            Level.FAIL,
        ),
        (
            "update pg_index set indisvalid = false where indexrelid = 'tidemark.objects_tx_idx'::regclass",
            check_rules,
            "index objects_tx_idx",
            Level.FAIL,
        ),
        (
            "update pg_index set indisvalid = false where indexrelid = 'tidemark.objects_key_key'::regclass",
            check_rules,
            "index objects_key_key",
            Level.FAIL,
        ),
        (
            """alter table tidemark.topics drop constraint topics_name_legal,
               add constraint topics_name_legal check (name <> '') not valid""",
            check_rules,
            "constraint topics_name_legal",
            Level.FAIL,
        ),
        (
            "create index extra on tidemark.record_batch_events (tx)",
            check_rules,
            "index extra",
            Level.WARN,
        ),
        (
            "alter table tidemark.audit_progress reset (fillfactor)",
            check_tables,
            "table audit_progress",
            Level.WARN,
        ),
        (
            "alter table tidemark.record_batch_events set (autovacuum_enabled = false)",
            check_tables,
            "table record_batch_events",
            Level.FAIL,
        ),
        (
            "alter table tidemark.runs set unlogged",
            check_tables,
            "table runs",
            Level.FAIL,
        ),
        (
            "grant execute on function tidemark.tx_base() to public",
            check_functions,
            "function tx_base",
            Level.WARN,
        ),
    ],
)
def test_damage_is_found_and_mended(
    damage: str, check: Callable[[Connection[Any]], Iterator[Finding]], what: str, level: Level, conn: Connection[Any]
) -> None:
    conn.execute(damage.encode())
    found = bad(check(conn))
    assert [(finding.check, finding.level) for finding in found] == [(what, level)]
    assert all(finding.why and finding.found for finding in found)
    run_mends(conn, found)
    assert bad(check(conn)) == []


def test_a_lost_function_or_table(conn: Connection[Any]) -> None:
    conn.execute("drop function tidemark.partition_ids(text)")
    conn.execute("drop table tidemark.dead_objects")
    assert [(f.check, f.mend) for f in bad(check_functions(conn))] == [
        ("function partition_ids", ("celery -A tasks migrate",))
    ]
    assert [f.check for f in bad(check_tables(conn))] == ["table dead_objects"]


def test_another_version(conn: Connection[Any]) -> None:
    conn.execute("update tidemark.alembic_version set version_num = '0000'")
    [finding] = check_version(conn)
    assert (finding.level, finding.mend) == (Level.FAIL, ("celery -A tasks migrate",))
    assert "0000" in finding.why


def test_a_database_without_the_schema(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.url(), autocommit=True) as conn:
        findings = [f for _, found in examine(conn, SETTINGS) for f in found]
    assert [f.check for f in findings if f.area == "schema"] == ["version"]


# --- privileges


@contextmanager
def role(conn: Connection[Any], options: str = "login") -> Iterator[str]:
    name = f"role_{uuid4().hex[:8]}"
    conn.execute(sql.SQL("create role {} " + options).format(sql.Identifier(name)))
    try:
        yield name
    finally:
        conn.execute(sql.SQL("drop owned by {0}; drop role {0}").format(sql.Identifier(name)))


def test_a_role_without_rights(conn: Connection[Any], database_url: str) -> None:
    with role(conn) as name, psycopg.connect(database_url.replace("//tidemark@", f"//{name}@"), autocommit=True) as own:
        found = bad([f for _, findings in examine(own, SETTINGS) for f in findings if f.area != "settings"])
        lacking = [f for f in found if "may not" in f.found]
        assert {f.check for f in lacking} >= {"tables", "function commit_object"}
        monitor = [f for f in found if f.check == "pg_monitor"]
        assert [f.level for f in monitor] == [Level.WARN]
        run_mends(conn, [*lacking, *monitor])
        again = bad([f for _, findings in examine(own, SETTINGS) for f in findings])
        assert [f for f in again if "may not" in f.found or f.check in {"pg_monitor", "version"}] == []


def test_a_producer_with_too_many_rights_or_too_few(conn: Connection[Any]) -> None:
    conn.execute("grant select on tidemark.objects to tidemark_producer")
    found = bad(check_privileges(conn, monitor=True))
    assert [(f.check, f.level) for f in found] == [("tidemark_producer", Level.WARN)]
    run_mends(conn, found)
    assert bad(check_privileges(conn, monitor=True)) == []
    conn.execute("revoke execute on function tidemark.partition_ids(text) from tidemark_producer")
    assert [f.level for f in bad(check_privileges(conn, monitor=True))] == [Level.FAIL]


# --- settings


SERVER_SETTINGS = [
    ("jit", "on", Level.WARN),
    ("random_page_cost", "4", Level.WARN),
    ("work_mem", "1MB", Level.WARN),
    ("max_wal_size", "1GB", Level.WARN),
    ("checkpoint_completion_target", "0.5", Level.WARN),
    ("checkpoint_timeout", "60s", Level.WARN),
    ("effective_cache_size", "1MB", Level.WARN),
    ("wal_compression", "pglz", Level.WARN),
    ("autovacuum", "off", Level.FAIL),
    ("full_page_writes", "off", Level.FAIL),
    ("fsync", "off", Level.FAIL),
    ("idle_in_transaction_session_timeout", "0", Level.WARN),
    ("idle_session_timeout", "60s", Level.WARN),
    ("default_transaction_isolation", "serializable", Level.WARN),
    ("default_transaction_read_only", "on", Level.FAIL),
    ("client_connection_check_interval", "0", Level.WARN),
    ("track_activities", "off", Level.WARN),
]


@pytest.fixture(scope="module")
def own_server(server_directory: Path, postgres_bin: Path | None) -> Iterator[PostgresServer]:
    settings = {"max_prepared_transactions": "5"}
    with PostgresServer.start(server_directory / "doctor", bin_dir=postgres_bin, settings=settings) as server:
        yield server


def test_every_server_setting(own_server: PostgresServer) -> None:
    def look() -> dict[str, Finding]:
        with psycopg.connect(own_server.url(), autocommit=True) as conn:
            return {finding.check: finding for finding in check_settings(conn, embedded=False)}

    def server(statement: str) -> None:
        with psycopg.connect(own_server.url(), autocommit=True) as conn:
            conn.execute("set default_transaction_read_only = off")
            conn.execute(statement.encode())

    before = look()
    small = {"shared_buffers", "max_wal_size"}
    assert {name for name, finding in before.items() if finding.level is not Level.OK} == small
    with psycopg.connect(own_server.url(), autocommit=True) as conn:
        assert bad(check_settings(conn, embedded=True)) == []
    for name, value, _ in SERVER_SETTINGS:
        server(f"alter system set {name} = '{value}'")
    server("select pg_reload_conf()")
    server("select pg_sleep(0.2)")
    worse = look()
    assert [(name, worse[name].level) for name, _, _ in SERVER_SETTINGS] == [(n, lv) for n, _, lv in SERVER_SETTINGS]
    for name, _, _ in SERVER_SETTINGS:
        assert worse[name].mend[1] == "select pg_reload_conf();"
        server(worse[name].mend[0])
    server("select pg_reload_conf()")
    server("select pg_sleep(0.2)")
    assert {name for name, finding in look().items() if finding.level is not Level.OK} == {"shared_buffers"}
    assert before["shared_buffers"].mend == ("alter system set shared_buffers = '1GB';", "restart Postgres")
    server("alter system set shared_buffers = '1GB'")
    server("select pg_reload_conf()")
    server("select pg_sleep(0.2)")
    assert look()["shared_buffers"].mend[-1] == "restart Postgres"


def test_defaults_of_roles_and_databases(conn: Connection[Any], connect: Connect, database_url: str) -> None:
    database = sql.Identifier(conn.info.dbname)
    with role(conn) as name:
        for statement in (
            "alter database {0} set default_transaction_read_only = on",
            "alter role {1} in database {0} set default_transaction_isolation = 'repeatable read'",
        ):
            conn.execute(sql.SQL(statement).format(database, sql.Identifier(name)))
        found = bad(check_defaults(connect()))
        assert [f.level for f in found] == [Level.WARN, Level.WARN]
        [own] = [f for f in check_settings(connect(), embedded=True) if f.check == "default_transaction_read_only"]
        assert (own.level, own.found) == (Level.FAIL, "on, the database's default")
        assert own.mend == (f'alter database "{conn.info.dbname}" reset default_transaction_read_only;',)
        run_mends(conn, found)
        assert bad(check_defaults(connect())) == []
    with psycopg.connect(database_url, options="-c jit=on") as own_options:
        [own] = [f for f in check_settings(own_options, embedded=True) if f.check == "jit"]
        assert own.mend == ("take jit out of TIDEMARK_DATABASE_URL and PGOPTIONS",)
    # Commits and materializations see to it themselves.
    with psycopg.connect(database_url, options="-c synchronous_commit=off") as own_options:
        assert bad(check_settings(own_options, embedded=True)) == bad(check_settings(conn, embedded=True))


# --- the server and what goes on in it


def test_a_server_without_pg_hint_plan(conn: Connection[Any]) -> None:
    # Anybody may set what a library that is not loaded would read. With the library: test_hints.
    conn.execute("set pg_hint_plan.enable_hint = on")
    findings = {finding.check: finding for finding in check_server(read_server(conn))}
    assert findings["pg_hint_plan"].found == "not loaded, nor needed: settings pin the plans"


def test_server_facts(conn: Connection[Any]) -> None:
    server = read_server(conn)
    assert bad(check_server(server)) == []
    assert bad(check_connections(server, SETTINGS)) == []
    many = SETTINGS.model_copy(update={"pool_open": 1000})
    assert [f.level for f in check_connections(server, many)] == [Level.WARN]


@pytest.mark.parametrize(("off", "level"), [(0.5, Level.OK), (-3.0, Level.WARN), (40.0, Level.FAIL)])
def test_clocks(off: float, level: Level) -> None:
    assert judge_clock("Postgres", 1000 + off, 999.9, 1000.1).level is level


def test_a_slow_answer_is_no_skew() -> None:
    assert judge_clock("Postgres", 1004, 1000, 1008).found == "agrees"
    assert judge_clock("Postgres", 1007, 1000, 1008).level is Level.OK


def test_fan_out_that_does_not_run(conn: Connection[Any]) -> None:
    create_topic(conn, "orders", 1)
    assert bad(check_dispatch(conn, SETTINGS)) == []
    commit_object(conn, "k", partition_ids(conn, "orders"), [1], [0], [1], [0])
    assert bad(check_dispatch(conn, SETTINGS)) == []
    for age, level in (("100 s", Level.WARN), ("1 h", Level.FAIL)):
        conn.execute("update tidemark.objects set committed_at = clock_timestamp() - %s::interval", (age,))
        assert [(f.check, f.level) for f in bad(check_dispatch(conn, SETTINGS))] == [("fan-out", level)]


def test_a_restored_database(conn: Connection[Any]) -> None:
    conn.execute("update tidemark.cluster set system_identifier = 1")
    [finding] = bad(check_dispatch(conn, SETTINGS))
    assert (finding.level, finding.mend[-1]) == (Level.FAIL, "celery -A tasks rebase")


def test_old_transactions_and_dead_rows(
    conn: Connection[Any], connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("db.doctor._LONG_SECONDS", 0.0)
    monkeypatch.setattr("db.doctor._MANY_DEAD", 10)
    idle = connect(autocommit=False)
    idle.execute("select pg_current_xact_id()")
    create_topic(conn, "orders", 20)
    conn.execute("update tidemark.topic_partitions set partition = partition")
    conn.execute("select pg_stat_force_next_flush()")
    found = bad([f for _, findings in examine(conn, SETTINGS) for f in findings if f.area == "activity"])
    [own] = [f for f in found if f"pid {idle.info.backend_pid} " in f.found]
    assert (own.check, own.level) == ("long transaction", Level.WARN)
    assert own.mend == (f"select pg_terminate_backend({idle.info.backend_pid});",)
    assert "dead rows in topic_partitions" in {f.check for f in found}


def test_prepared_transactions_and_slots(own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.doctor._LONG_SECONDS", 0.0)
    upgrade(own_server.url())
    with psycopg.connect(own_server.url(), autocommit=True) as conn:
        conn.execute("select pg_create_physical_replication_slot('gone')")
        found = [f for _, findings in examine(conn, SETTINGS) for f in findings]
        [slot] = [f for f in found if f.check == "replication slot"]
        assert slot.level is Level.WARN
        run_mends(conn, [slot])
        conn.execute("begin; create table t (); prepare transaction 'it''s'")
        found = [f for _, findings in examine(conn, SETTINGS) for f in findings]
        [prepared] = [f for f in found if f.check == "prepared transaction"]
        assert prepared.mend == ("commit prepared 'it''s';", "or: rollback prepared 'it''s';")
        conn.execute("rollback prepared 'it''s'")
        again = [f for _, findings in examine(conn, SETTINGS) for f in findings]
        assert {"replication slot", "prepared transaction"}.isdisjoint(f.check for f in again)


# --- Redis


@pytest.fixture
def own_redis(server_directory: Path, redis_binary: Path | None) -> Iterator[RedisServer]:
    with RedisServer.start(server_directory / f"doctor-{uuid4().hex[:6]}", binary=redis_binary) as server:
        yield server


def test_redis(own_redis: RedisServer) -> None:
    assert bad(check_broker(own_redis.url, own_redis.url)) == []
    with Redis.from_url(own_redis.url) as client:
        for limit, level in ((0, Level.WARN), (100_000_000, Level.FAIL)):
            client.config_set("maxmemory", limit)
            client.config_set("maxmemory-policy", "allkeys-lru")
            found = bad(check_broker(own_redis.url, None))
            assert [(f.check, f.level) for f in found] == [("Redis: eviction", level)]
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "no")
        found = bad(check_broker(own_redis.url, None))
        assert [(f.check, f.level) for f in found] == [("Redis: append-only file", Level.WARN)]


def test_redis_is_away_or_another_broker() -> None:
    [finding] = check_broker("redis://127.0.0.1:1/0", None)
    assert (finding.level, finding.found) == (Level.FAIL, "does not answer")
    [finding] = check_broker("amqp://guest@h//", None)
    assert (finding.level, finding.found) == (Level.OK, "amqp, not a Redis")


# --- the environment and the command


def test_unknown_variables() -> None:
    environment = {"TIDEMARK_SHARD": "3", "TIDEMARK_SHARDS": "3", "TIDEMARK_TEST_REDIS_BIN": "x", "PATH": "y"}
    [finding] = check_environment(environment)
    assert (finding.check, finding.level) == ("TIDEMARK_SHARD", Level.WARN)
    assert "Did you mean TIDEMARK_SHARDS?" in finding.why
    [finding] = check_environment({"TIDEMARK_SHARDS": "3"})
    assert finding.level is Level.OK


def test_the_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    # The tests' server takes risks, and the doctor says so.
    found = cli(doctor, "--json", code=1).json
    assert found["level"] == "fail"
    assert {f["check"] for f in found["findings"] if f["level"] == "fail"} == {"fsync", "full_page_writes"}
    monkeypatch.setenv("TIDEMARK_SHARD", "x" * 300)
    done = cli(doctor, code=1)
    assert "fail fsync: off" in done.words
    assert "alter system set fsync = 'on';" in done.words
    assert "warn TIDEMARK_SHARD" in done.words
    assert "ok fsync" not in cli(doctor, "--bad", code=1).words
    assert "Usage" in cli(doctor, "--help").out
    assert "No such option" in cli(doctor, "--fix", code=2).err


def test_servers_that_are_away() -> None:
    with app_for("postgresql://u:secret@127.0.0.1:1/d", "redis://127.0.0.1:1") as app:
        found = Cli(app)(doctor, "--json", code=1).json["findings"]
        assert [f["check"] for f in found if f["level"] == "fail"] == ["Redis", "Postgres"]
        assert "secret" not in Cli(app)(doctor, code=1).out


def test_worst() -> None:
    findings = [Finding(area="a", check="b", level=level, found="c") for level in (Level.WARN, Level.OK, Level.FAIL)]
    assert worst(findings) is Level.FAIL
    assert worst([]) is Level.OK
