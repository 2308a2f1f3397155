"""The doctor finds what is wrong, says why, and what it says repairs it: each finding is provoked for real."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import Connection, sql
from redis import Redis

from config.settings import Settings
from db.commit import commit_object
from db.doctor import Finding, Level, checks, examine, judge, judge_clock, worst
from db.migrate import upgrade
from db.topics import create_topic, partition_ids
from tasks.commands.doctor import check_broker, check_environment, check_programs, doctor
from tasks.commands.situation import read_hints
from tests.integration.test_status import report
from tests.servers import PostgresServer, RedisServer
from tests.support import Connect, wait_until
from tests.support_commands import Cli, app_for

SETTINGS = Settings(database_url="postgresql://u@h/d", broker_url="redis://h")


EMBEDDED = SETTINGS.model_copy(update={"database_url": None})


def look(conn: Connection[Any], *names: str, settings: Settings = SETTINGS) -> list[Finding]:
    """What some of the checks find."""
    return [finding for name in names for finding in judge(checks(conn, settings)[name]())]


def bad(findings: Iterator[Finding] | list[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.level is not Level.OK]


def run_repairs(conn: Connection[Any], findings: list[Finding]) -> None:
    """Do what the doctor says."""
    for finding in findings:
        for statement in finding.repair:
            conn.execute(statement.encode())


# --- the schema


def test_a_fresh_schema_is_sound(conn: Connection[Any]) -> None:
    names = ("version", "tables", "constraints and indexes", "functions", "privileges")
    assert bad(look(conn, *names)) == []


@pytest.mark.parametrize(
    ("damage", "check", "what", "level"),
    [
        ("drop index tidemark.objects_tx_idx", "constraints and indexes", "index objects_tx_idx", Level.FAIL),
        (
            "alter table tidemark.runs drop constraint runs_pkey",
            "constraints and indexes",
            "constraint runs_pkey",
            Level.FAIL,
        ),
        (
            "alter table tidemark.topics drop constraint topics_name_legal",
            "constraints and indexes",
            "constraint topics_name_legal",
            Level.FAIL,
        ),
        (
            "alter table tidemark.topic_partitions drop constraint topic_partitions_topic_id_fkey",
            "constraints and indexes",
            "constraint topic_partitions_topic_id_fkey",
            Level.FAIL,
        ),
        (
            "update pg_index set indisvalid = false where indexrelid = 'tidemark.objects_tx_idx'::regclass",
            "constraints and indexes",
            "index objects_tx_idx",
            Level.FAIL,
        ),
        (
            "update pg_index set indisvalid = false where indexrelid = 'tidemark.objects_key_key'::regclass",
            "constraints and indexes",
            "index objects_key_key",
            Level.FAIL,
        ),
        (
            """alter table tidemark.topics drop constraint topics_name_legal,
               add constraint topics_name_legal check (name <> '') not valid""",
            "constraints and indexes",
            "constraint topics_name_legal",
            Level.FAIL,
        ),
        (
            "create index extra on tidemark.record_batch_events (tx)",
            "constraints and indexes",
            "index extra",
            Level.WARN,
        ),
        (
            "alter table tidemark.audit_progress reset (fillfactor)",
            "tables",
            "table audit_progress",
            Level.WARN,
        ),
        (
            "alter table tidemark.record_batch_events set (autovacuum_enabled = false)",
            "tables",
            "table record_batch_events",
            Level.FAIL,
        ),
        (
            "alter table tidemark.runs set unlogged",
            "tables",
            "table runs",
            Level.FAIL,
        ),
        (
            "grant execute on function tidemark.tx_base() to public",
            "functions",
            "function tx_base",
            Level.WARN,
        ),
    ],
)
def test_damage_is_found_and_repaired(damage: str, check: str, what: str, level: Level, conn: Connection[Any]) -> None:
    conn.execute(damage.encode())
    found = bad(look(conn, check))
    assert [(finding.check, finding.level) for finding in found] == [(what, level)]
    assert all(finding.why and finding.found for finding in found)
    run_repairs(conn, found)
    assert bad(look(conn, check)) == []


def test_a_lost_function_or_table(conn: Connection[Any]) -> None:
    conn.execute("drop function tidemark.partition_ids(text)")
    conn.execute("drop table tidemark.dead_objects")
    assert [(f.check, f.repair) for f in bad(look(conn, "functions"))] == [
        ("function partition_ids", ("celery -A tasks migrate",))
    ]
    assert [f.check for f in bad(look(conn, "tables"))] == ["table dead_objects"]


def test_another_version(conn: Connection[Any]) -> None:
    conn.execute("update tidemark.alembic_version set version_num = '0000'")
    [finding] = look(conn, "version")
    assert (finding.level, finding.repair) == (Level.FAIL, ("celery -A tasks migrate",))
    assert "0000" in finding.why


def test_a_database_without_the_schema(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.url(), autocommit=True) as conn:
        findings = list(examine(conn, SETTINGS))
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


@pytest.mark.parametrize("group", ["tidemark_worker", "tidemark_monitor", "tidemark_admin"])
def test_a_role_without_rights(group: str, conn: Connection[Any], database_url: str) -> None:
    """What it cannot look at it says, and with the group's rights alone everything can be looked at and is sound."""
    with role(conn) as name, psycopg.connect(database_url.replace("//tidemark@", f"//{name}@"), autocommit=True) as own:
        found = [f for f in examine(own, SETTINGS) if f.found == "could not be looked at"]
        assert {(f.check, f.level) for f in found} == {
            (check, Level.WARN) for check in ("version", "constraints and indexes", "privileges", "activity")
        }
        if group == "tidemark_worker":
            run_repairs(conn, found)
        else:
            conn.execute(sql.SQL("grant {} to {}").format(sql.Identifier(group), sql.Identifier(name)))
        again = {f.check: f for f in examine(own, SETTINGS) if f.area != "settings"}
        assert again["own"].level is Level.OK
        assert [f.level for f in again.values() if f.level is not Level.OK] == [Level.WARN] * (
            group != "tidemark_monitor"
        )
        if group != "tidemark_monitor":
            run_repairs(conn, [again["pg_monitor"]])
        assert bad([f for f in examine(own, SETTINGS) if f.area != "settings"]) == []


def test_a_login_with_rights_given_by_hand(conn: Connection[Any], database_url: str) -> None:
    with role(conn) as name, psycopg.connect(database_url.replace("//tidemark@", f"//{name}@"), autocommit=True) as own:
        conn.execute(
            sql.SQL(
                "grant usage on schema tidemark to {0}; grant select on all tables in schema tidemark to {0}; "
                "grant execute on function tidemark.group_rights() to {0}"
            ).format(sql.Identifier(name))
        )
        [lacking] = [f for f in bad(look(own, "privileges")) if f.check == "own"]
        assert lacking.level is Level.FAIL
        assert "may not delete on tidemark.audit_progress and " in lacking.found
        run_repairs(conn, [lacking])
        assert [f.check for f in bad(look(own, "privileges"))] == ["pg_monitor"]


@pytest.mark.parametrize(
    ("damage", "level"),
    [
        ("grant select on tidemark.objects to tidemark_producer", Level.WARN),
        ("grant update (key) on tidemark.objects to tidemark_worker", Level.WARN),
        ("grant usage on sequence tidemark.sweeps_id_seq to tidemark_monitor", Level.WARN),
        ("grant execute on function tidemark.tx_base() to tidemark_consumer", Level.WARN),
        ("revoke execute on function tidemark.partition_ids(text) from tidemark_producer", Level.FAIL),
        ("revoke update (id) on tidemark.topic_partitions from tidemark_worker", Level.FAIL),
        ("revoke truncate on tidemark.cluster from tidemark_admin", Level.FAIL),
        ("revoke select on all tables in schema tidemark from tidemark_monitor", Level.FAIL),
    ],
)
def test_a_group_with_too_many_rights_or_too_few(
    damage: str, level: Level, conn: Connection[Any], database_url: str
) -> None:
    conn.execute(damage.encode())
    found = bad(look(conn, "privileges"))
    assert [(f.check, f.level) for f in found] == [(damage.rsplit(maxsplit=1)[-1], level)]
    if found[0].repair == ("celery -A tasks migrate",):
        upgrade(database_url)
    else:
        run_repairs(conn, found)
    assert bad(look(conn, "privileges")) == []


def test_what_everybody_may_is_too_much_for_every_group(conn: Connection[Any]) -> None:
    conn.execute("grant insert on tidemark.objects to public")
    found = bad(look(conn, "privileges"))
    groups = [f"tidemark_{name}" for name in ("admin", "consumer", "monitor", "producer", "worker")]
    # The administrators may insert.
    assert [(f.check, f.level) for f in found] == [(group, Level.WARN) for group in groups[1:]]
    run_repairs(conn, found)
    assert bad(look(conn, "privileges")) == []


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
    with PostgresServer(server_directory / "doctor", bin_dir=postgres_bin, settings=settings).start() as server:
        yield server


def test_every_server_setting(own_server: PostgresServer) -> None:
    def all_settings() -> dict[str, Finding]:
        with psycopg.connect(own_server.url(), autocommit=True) as conn:
            return {finding.check: finding for finding in look(conn, "settings")}

    def server(statement: str) -> None:
        with psycopg.connect(own_server.url(), autocommit=True) as conn:
            conn.execute("set default_transaction_read_only = off")
            conn.execute(statement.encode())

    before = all_settings()
    small = {"shared_buffers", "max_wal_size"}
    assert {name for name, finding in before.items() if finding.level is not Level.OK} == small
    with psycopg.connect(own_server.url(), autocommit=True) as conn:
        assert bad(look(conn, "settings", settings=EMBEDDED)) == []
    for name, value, _ in SERVER_SETTINGS:
        server(f"alter system set {name} = '{value}'")
    server("select pg_reload_conf()")
    server("select pg_sleep(0.2)")
    worse = all_settings()
    assert [(name, worse[name].level) for name, _, _ in SERVER_SETTINGS] == [(n, lv) for n, _, lv in SERVER_SETTINGS]
    for name, _, _ in SERVER_SETTINGS:
        assert worse[name].repair[1] == "select pg_reload_conf();"
        server(worse[name].repair[0])
    server("select pg_reload_conf()")
    server("select pg_sleep(0.2)")
    assert {name for name, finding in all_settings().items() if finding.level is not Level.OK} == {"shared_buffers"}
    assert before["shared_buffers"].repair == ("alter system set shared_buffers = '1GB';", "restart Postgres")
    server("alter system set shared_buffers = '1GB'")
    server("select pg_reload_conf()")
    server("select pg_sleep(0.2)")
    assert all_settings()["shared_buffers"].repair[-1] == "restart Postgres"


def test_defaults_of_roles_and_databases(conn: Connection[Any], connect: Connect, database_url: str) -> None:
    database = sql.Identifier(conn.info.dbname)
    with role(conn) as name:
        for statement in (
            "alter database {0} set default_transaction_read_only = on",
            "alter role {1} in database {0} set default_transaction_isolation = 'repeatable read'",
        ):
            conn.execute(sql.SQL(statement).format(database, sql.Identifier(name)))
        found = bad(look(connect(), "role and database defaults"))
        assert [f.level for f in found] == [Level.WARN, Level.WARN]
        [own] = [
            f for f in look(connect(), "settings", settings=EMBEDDED) if f.check == "default_transaction_read_only"
        ]
        assert (own.level, own.found) == (Level.FAIL, "on, the database's default")
        assert own.repair == (f"alter database {conn.info.dbname} reset default_transaction_read_only;",)
        run_repairs(conn, found)
        assert bad(look(connect(), "role and database defaults")) == []
    with psycopg.connect(database_url, options="-c jit=on") as own_options:
        [own] = [f for f in look(own_options, "settings", settings=EMBEDDED) if f.check == "jit"]
        assert own.repair == ("take jit out of TIDEMARK_DATABASE_URL and PGOPTIONS",)
    # Commits and materializations see to it themselves.
    with psycopg.connect(database_url, options="-c synchronous_commit=off") as own_options:
        assert bad(look(own_options, "settings", settings=EMBEDDED)) == bad(look(conn, "settings", settings=EMBEDDED))


# --- the server and what goes on in it


def test_a_server_without_pg_hint_plan(conn: Connection[Any]) -> None:
    # Anybody may set what a library that is not loaded would read. With the library: test_hints.
    conn.execute("set pg_hint_plan.enable_hint = on")
    findings = {finding.check: finding for finding in look(conn, "server")}
    assert findings["pg_hint_plan"].found == "not loaded, nor needed: settings pin the plans"


def test_server_facts(conn: Connection[Any]) -> None:
    assert bad(look(conn, "server")) == []
    many = SETTINGS.model_copy(update={"pool_open": 1000})
    assert [(f.check, f.level) for f in bad(look(conn, "server", settings=many))] == [("connections", Level.WARN)]


@pytest.mark.parametrize(("off", "level"), [(0.5, Level.OK), (-3.0, Level.WARN), (40.0, Level.FAIL)])
def test_clocks(off: float, level: Level) -> None:
    [finding] = judge([judge_clock("Postgres", 1000 + off, 999.9, 1000.1)])
    assert finding.level is level


def test_a_slow_answer_is_no_skew() -> None:
    assert judge_clock("Postgres", 1004, 1000, 1008).found == "agrees"
    assert not judge_clock("Postgres", 1007, 1000, 1008).bad


def test_fan_out_that_does_not_run(conn: Connection[Any]) -> None:
    create_topic(conn, "orders", 1)
    assert bad(look(conn, "activity")) == []
    commit_object(conn, "k", partition_ids(conn, "orders"), [1], [0], [1], [0])
    assert bad(look(conn, "activity")) == []
    for age, level in (("100 s", Level.WARN), ("1 h", Level.FAIL)):
        conn.execute("update tidemark.objects set committed_at = clock_timestamp() - %s::interval", (age,))
        assert [(f.check, f.level) for f in bad(look(conn, "activity"))] == [("fan-out", level), ("lag", level)]


def test_a_restored_database(conn: Connection[Any]) -> None:
    conn.execute("update tidemark.cluster set system_identifier = 1")
    [finding] = bad(look(conn, "activity"))
    assert (finding.level, finding.repair[-1]) == (Level.FAIL, "celery -A tasks rebase")


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
    found = bad([f for f in examine(conn, SETTINGS) if f.area == "activity"])
    [own] = [f for f in found if f"pid {idle.info.backend_pid} " in f.found]
    assert (own.check, own.level) == ("long transaction", Level.WARN)
    assert own.repair == (f"select pg_terminate_backend({idle.info.backend_pid});",)
    assert "dead rows in topic_partitions" in {f.check for f in found}


def test_prepared_transactions_and_slots(own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.doctor._LONG_SECONDS", 0.0)
    upgrade(own_server.url())
    with psycopg.connect(own_server.url(), autocommit=True) as conn:
        conn.execute("select pg_create_physical_replication_slot('gone')")
        found = list(examine(conn, SETTINGS))
        [slot] = [f for f in found if f.check == "replication slot"]
        assert slot.level is Level.WARN
        run_repairs(conn, [slot])
        conn.execute("begin; create table t (); prepare transaction 'it''s'")
        found = list(examine(conn, SETTINGS))
        [prepared] = [f for f in found if f.check == "prepared transaction"]
        assert prepared.repair == ("commit prepared 'it''s'; or rollback prepared 'it''s';",)
        conn.execute("rollback prepared 'it''s'")
        again = list(examine(conn, SETTINGS))
        assert {"replication slot", "prepared transaction"}.isdisjoint(f.check for f in again)


def test_lag_and_locks(conn: Connection[Any], connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits too long, and who has a partition locked though nobody waits for it; what the doctor says ends it."""
    monkeypatch.setattr("db.doctor._LOCKED_SECONDS", 0.0)
    create_topic(conn, "orders", 3)
    commit_object(conn, "k", partition_ids(conn, "orders"), [1] * 3, [0] * 3, [1] * 3, [0] * 3)
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '100 s'")
    blocker = connect(autocommit=False)
    blocker.execute("select from tidemark.topic_partitions where partition > 0 for update")
    found = {f.check: f for f in bad(look(conn, "activity"))}
    assert (found["lag"].level, found["lag"].found) == (Level.WARN, "100 s, 3 partitions have a backlog")
    assert found["locks"].found == f"pid {blocker.info.backend_pid} holds orders/1 and 1 more, for 0 s"
    run_repairs(conn, [found["locks"]])
    wait_until(lambda: "locks" not in {f.check for f in bad(look(conn, "activity"))})


# --- programs


def test_programs(cli: Cli, redis_url: str) -> None:
    """Workers and beat that report; one that fell silent; and who has another number of shards."""

    def programs() -> dict[str, tuple[Level, str]]:
        return {f.check: (f.level, f.found) for f in judge(check_programs(cli.app, read_hints(cli.app)))}

    assert programs() == {
        "workers": (Level.WARN, "none is up"),
        "beat": (Level.WARN, "none is up"),
        "shards": (Level.OK, "8, here and in all programs"),
    }
    report(redis_url, "worker@one")
    report(redis_url, "worker@two", shards=16)
    report(redis_url, "beat@one", seen=40)
    found = programs()
    assert found["workers"] == (Level.OK, "2 up: worker@one, worker@two")
    assert found["beat"][0] is Level.WARN
    assert found["beat"][1].startswith("last tick 4")
    assert found["shards"] == (Level.FAIL, "8: this command, beat@one, worker@one; 16: worker@two")
    report(redis_url, "beat@one")
    assert programs()["beat"][0] is Level.OK


# --- Redis


@pytest.fixture
def own_redis(server_directory: Path, redis_binary: Path | None) -> Iterator[RedisServer]:
    with RedisServer(server_directory / f"doctor-{uuid4().hex[:6]}", binary=redis_binary).start() as server:
        yield server


def test_redis(own_redis: RedisServer) -> None:
    assert bad(judge(check_broker(own_redis.url, own_redis.url))) == []
    with Redis.from_url(own_redis.url) as client:
        for limit, level in ((0, Level.WARN), (100_000_000, Level.FAIL)):
            client.config_set("maxmemory", limit)
            client.config_set("maxmemory-policy", "allkeys-lru")
            found = bad(judge(check_broker(own_redis.url, None)))
            assert [(f.check, f.level) for f in found] == [("Redis: eviction", level)]
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("appendonly", "no")
        found = bad(judge(check_broker(own_redis.url, None)))
        assert [(f.check, f.level) for f in found] == [("Redis: append-only file", Level.WARN)]


def test_redis_is_away_or_another_broker() -> None:
    [finding] = judge(check_broker("redis://127.0.0.1:1/0", None))
    assert (finding.level, finding.found) == (Level.FAIL, "does not answer")
    [finding] = judge(check_broker("amqp://guest@h//", None))
    assert (finding.level, finding.found) == (Level.OK, "amqp, not a Redis")


# --- the environment and the command


def test_unknown_variables() -> None:
    environment = {"TIDEMARK_SHARD": "3", "TIDEMARK_SHARDS": "3", "TIDEMARK_TEST_REDIS_BIN": "x", "PATH": "y"}
    [finding] = judge(check_environment(environment))
    assert (finding.check, finding.level) == ("TIDEMARK_SHARD", Level.WARN)
    assert "Did you mean TIDEMARK_SHARDS?" in finding.why
    [finding] = judge(check_environment({"TIDEMARK_SHARDS": "3"}))
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
