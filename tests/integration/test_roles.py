"""The group roles, each as a login that is a member of it alone: what it may do works, and all the rest is refused.

What stands here is told by hand, not read from db/sql/functions/grants.sql. A function, table, statement or function of
`db` that nobody has put into a table here makes a test fail.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection, errors, sql

import db
from config.settings import Settings
from db.adopt import adopt, discard
from db.audit import audit
from db.commit import Batch, commit_batches
from db.discover import find_committed, save_fan_out, sweep
from db.doctor import Level, examine
from db.fetch import LATEST, FetchRequest, fetch_batches, fetch_partitions, list_offsets, wait_for_batches
from db.materialize import ages_of_run, materialize
from db.migrate import require_current
from db.objects import (
    condemn,
    find_live_objects,
    find_objects,
    forget_dead_objects,
    give_back_dead_objects,
    list_dead_objects,
    read_reconciliation,
    save_reconciliation,
    take_dead_objects,
)
from db.producers import expire_producers, init_producer, producer_states
from db.rebase import rebase
from db.receipts import Waiting, receipts, wait
from db.retention import delete_records, purge, retain
from db.statements import run, statements
from db.status import (
    describe_partitions,
    describe_topics,
    find_partition,
    read_figures,
    read_offsets,
    read_status,
    records_to_audit,
)
from db.topics import (
    PartitionIds,
    add_partitions,
    create_topic,
    delete_topic,
    highest_partition_id,
    list_topics,
    names_of,
    partition_ids,
    set_retention,
)
from tasks.commands.upkeep import migrate
from tests.integration.conftest import commit
from tests.integration.test_adopt import numbered
from tests.servers import PostgresServer
from tests.support_commands import Cli, app_for
from tests.support_roles import GROUPS, logins

Conn = Connection[Any]

DATABASE = "test_roles"


@dataclass(frozen=True)
class World:
    """The owner's connection, and one for each group."""

    owner: Conn
    logins: Mapping[str, Conn]
    url: str
    fresh: Iterator[int] = field(default_factory=count)

    @property
    def ids(self) -> list[int]:
        return partition_ids(self.owner, "orders")

    def topic(self) -> str:
        """A new topic, of the owner's."""
        name = f"topic{next(self.fresh)}"
        create_topic(self.owner, name, 1)
        return name

    def committed(self) -> int:
        """Of the owner's, in both partitions; pending."""
        return commit(self.owner, f"key{next(self.fresh)}", self.ids)

    def content(self) -> list[Any]:
        """All that the tables hold, and the state of the sequences."""
        tables = self.owner.execute("""
            select format('select %1$L, md5(string_agg(row(t.*)::text, chr(10) order by row(t.*)::text)) from %1$s t',
                          oid::regclass)
            from pg_class where relnamespace = 'tidemark'::regnamespace and relkind in ('r', 'S')""").fetchall()
        return self.owner.execute(" union all ".join(text for (text,) in tables).encode() + b" order by 1").fetchall()


@pytest.fixture(scope="module")
def world(postgres_server: PostgresServer, template_database: str) -> Iterator[World]:
    database, url = sql.Identifier(DATABASE), postgres_server.url(DATABASE)
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin, ExitStack() as stack:
        admin.execute(sql.SQL("create database {} template {}").format(database, sql.Identifier(template_database)))
        stack.callback(admin.execute, sql.SQL("drop database {} with (force)").format(database))
        connections = {
            letter: stack.enter_context(psycopg.connect(login, autocommit=True))
            for letter, login in stack.enter_context(logins(url)).items()
            if letter in GROUPS
        }
        owner = stack.enter_context(psycopg.connect(url, autocommit=True))
        create_topic(owner, "orders", 2)
        numbered(owner, "0-5 5-9", end=9, pending="2 3")
        # The seed's tables are somebody else's: the login that adopts needs rights to them.
        owner.execute("grant usage on schema seed to login_of_a; grant all on all tables in schema seed to login_of_a")
        made = World(owner, connections, url)
        made.committed()
        materialize(owner, made.ids)
        yield made


# --- Who may do what


FUNCTIONS = {
    "add_partitions/2": "a",
    "begin_at/2": "a",
    "check_request/2": "",
    "check_topic/4": "a",
    "claim_sequences/7": "",
    "commit_batches/9": "pa",
    "commit_object/6": "pa",
    "condemn/1": "pwa",
    "create_topic/5": "a",
    "cursors/1": "wma",
    "delete_records/2": "a",
    "delete_topic/1": "a",
    "explain_invalid_commit/9": "",
    "fetch_batches/5": "cma",
    "fetch_batches/5, by name": "cma",
    "fetch_partitions/5": "cma",
    "find_run/4": "",
    "group_rights/0": "wma",
    "init_producer/2": "pa",
    "judge_batches/10": "",
    "list_offsets/2": "cma",
    "list_topics/4": "pcwma",
    "lock_partition/1": "a",
    "lock_topic/1": "a",
    "log_start/1": "wma",
    "newest_run/1": "wma",
    "partition_ids/1": "pcwma",
    "pending/3": "wma",
    "pending_events/7": "wma",
    "producer_states/3": "ma",
    "raise_sequence_race/0": "",
    "receipts/2": "pcma",
    "run_at/2": "wma",
    "run_events/1": "wma",
    "run_of/3": "",
    "running_transactions/0": "wma",
    "runs_to_delete/2": "wma",
    "set_retention/3": "a",
    "tx_base/0": "wma",
}

# What workers, monitors and administrators may do with each table, view and sequence: r select, a insert, w update,
# d delete, D truncate, k lock rows. Producers and consumers: nothing.
RELATIONS = {
    "adopted_partitions": ("", "r", "adrw"),
    "alembic_version": ("r", "r", "r"),
    "audit_progress": ("adrw", "r", "adrw"),
    "cluster": ("r", "r", "Dar"),
    "collections": ("adkr", "r", "adkr"),
    "dead_objects": ("ar", "r", "ar"),
    "deleted_batches": ("adr", "r", "adr"),
    "deleted_partitions": ("drw", "r", "adrw"),
    "fan_outs": ("adr", "r", "adr"),
    "log_starts": ("adr", "r", "adr"),
    "named_partitions": ("r", "r", "r"),
    "named_record_batch_events": ("", "r", "r"),
    "objects": ("dkr", "r", "adkr"),
    "passes": ("adr", "r", "adr"),
    "producer_batches": ("dr", "r", "dr"),
    "producers": ("dr", "r", "dr"),
    "reconciliations": ("adr", "r", "adr"),
    "record_batch_events": ("dr", "r", "adr"),
    "record_batches": ("", "r", "r"),
    "refused_batches": ("dr", "r", "dr"),
    "runs": ("adr", "r", "adr"),
    "sweeps": ("adr", "r", "adr"),
    "topic_partitions": ("kr", "r", "adkr"),
    "topics": ("r", "r", "adrw"),
    "collections_id_seq": ("", "", "rw"),
    "fan_outs_id_seq": ("", "", "rw"),
    "objects_id_seq": ("", "", "rw"),
    "producers_id_seq": ("", "", "rw"),
    "sweeps_id_seq": ("", "", "rw"),
    "topic_partitions_id_seq": ("", "", "rw"),
}
RIGHTS = {"r": "select", "a": "insert", "w": "update", "d": "delete", "D": "truncate", "x": "references"}


@pytest.mark.parametrize("letter", GROUPS)
def test_every_function_is_told(letter: str, world: World) -> None:
    found = (
        world.logins[letter]
        .execute("""
        select proname || '/' || pronargs || case when proargtypes[0] = 'text'::regtype and proname = 'fetch_batches'
               then ', by name' else '' end, has_function_privilege(oid, 'execute')
        from pg_proc where pronamespace = 'tidemark'::regnamespace""")
        .fetchall()
    )
    assert dict(found) == {name: letter in letters for name, letters in FUNCTIONS.items()}
    assert len(found) == len(FUNCTIONS)


@pytest.mark.parametrize("letter", GROUPS)
def test_every_table_is_told(letter: str, world: World) -> None:
    conn = world.logins[letter]
    relations = conn.execute(
        "select relname from pg_class where relnamespace = 'tidemark'::regnamespace and relkind not in ('i', 't', 'c')"
    ).fetchall()
    found = {}
    for (name,) in relations:
        may = [
            right
            for right, word in RIGHTS.items()
            if conn.execute("select has_table_privilege('tidemark.' || %s, %s)", (name, word)).fetchone() == (True,)
        ]
        columns = conn.execute(
            """select a.attname, x."right" from pg_attribute a
               cross join unnest(array['select', 'insert', 'update', 'references']) x("right")
               where a.attrelid = ('tidemark.' || %s)::regclass and a.attacl is not null
                 and has_column_privilege(a.attrelid, a.attnum, x."right")
                 and not has_table_privilege(a.attrelid, x."right")""",
            (name,),
        ).fetchall()
        assert columns in ([], [("id", "update")])
        found[name] = "".join(sorted([*may, *["k"] * len(columns)]))
    told = {name: dict(zip("wma", rights, strict=True)).get(letter, "") for name, rights in RELATIONS.items()}
    assert found == told


def test_an_id_takes_no_number(world: World) -> None:
    """What the right to lock rows leaves: nobody gives a partition another one's id."""
    for table in ("topic_partitions", "objects", "collections"):
        with pytest.raises(errors.GeneratedAlways):
            world.logins["w"].execute(f"update tidemark.{table} set id = 5".encode())


VIEWS = {"named_partitions", "named_record_batch_events", "record_batches"}


def require_refused(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except errors.InsufficientPrivilege:
        return
    raise AssertionError(f"not refused: {what}")


@pytest.mark.parametrize("letter", GROUPS)
def test_what_is_not_granted_is_refused(letter: str, world: World) -> None:
    """Each right to each table that a group does not have, and the nearest things that only an owner may."""
    before = world.content()
    tried = [
        "create table tidemark.mine (x int)",
        "create function tidemark.mine() returns int return 1",
        "create view tidemark.mine as select 1",
        "create schema mine",
        "create or replace function tidemark.tx_base() returns bigint language sql return 0",
        "alter function tidemark.commit_object security invoker",
        "alter table tidemark.objects add x int",
        "alter table tidemark.objects disable trigger all",
        "create index on tidemark.objects (batches)",
        "create trigger mine before truncate on tidemark.objects execute function pg_catalog.lo_manage()",
        "drop view tidemark.record_batches",
        "drop table tidemark.sweeps",
        "drop schema tidemark cascade",
        "set session_replication_role = replica",
        "set role tidemark",
        f"alter database {DATABASE} set default_transaction_read_only = on",
        "copy (select 1) to program 'true'",
    ] + [f"set role {group}" for other, group in GROUPS.items() if other != letter]
    told = {name: dict(zip("wma", rights, strict=True)).get(letter, "") for name, rights in RELATIONS.items()}
    for name, rights in told.items():
        if name.endswith("_seq"):
            tried += [f"select * from tidemark.{name}"] * ("r" not in rights)
            if "w" not in rights:
                tried += [f"select setval('tidemark.{name}', 1)", f"select nextval('tidemark.{name}')"]
            continue
        tried += [f"select from tidemark.{name}"] * ("r" not in rights)
        if name in VIEWS:
            # What they show cannot be written through them.
            continue
        tried += [f"insert into tidemark.{name} default values"] * ("a" not in rights)
        tried += [f"delete from tidemark.{name}"] * ("d" not in rights)
        tried += [f"truncate tidemark.{name} cascade"] * ("D" not in rights)
        tried += [f"select 1; lock table tidemark.{name} in access exclusive mode"] * (not set("wdD") & set(rights))
        tried += [f"select from tidemark.{name} for update"] * (not set("wk") & set(rights))
        columns = "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 and attname <> 'id'"
        (column,) = world.owner.execute(columns.encode(), (f"tidemark.{name}",)).fetchall()[0]
        tried += [f"update tidemark.{name} set {column} = {column}"] * ("w" not in rights)
    for statement in tried:
        require_refused(statement, partial(world.logins[letter].execute, statement.encode()))
    assert world.content() == before


# --- Statements


STATEMENTS = {
    name: letters
    for letters, names in {
        # Nothing of Tidemark's is in them.
        "pcwma": """adopt_reading adopt_settings discard_temporary doctor_clock doctor_defaults doctor_functions
            doctor_has_schema doctor_rules doctor_server doctor_settings doctor_tables doctor_vacuum figures_connections
            figures_indexes figures_tables find_seed is_migrated list_topics lock_adoption lock_migrations partition_ids
            session_settings transaction_settings unlock_adoption""",
        "pcma": "receipts",
        "pwa": "condemn",
        "pa": "commit_batches commit_object init_producer",
        "cma": "fetch_batches fetch_partitions list_offsets read_head",
        "ma": "producer_states",
        "wma": """adoption_room ages_of_run audit_heads audit_last_partition audit_left audit_partitions audit_runs
            begin_sweep describe_partitions describe_topics doctor_privileges figures_topics find_committed
            find_dead_objects find_expired find_holders find_live_objects find_lock_waits find_objects find_pending
            find_row_locks highest_partition_id known_partitions name_partitions read_dispatch read_fan_out
            read_leftovers read_reconciliation rebase schema_version""",
        "wa": """collect_passes delete_dead_objects delete_expired expire_producer_ids expire_producers
            forget_audit_progress forget_purged free_spent_objects give_back_dead_objects lock_collections
            lock_deleted_partitions lock_free_partitions lock_partitions lock_spent_objects place_incremental
            place_window purge save_audit_progress save_fan_out save_reconciliation save_sweep take_dead_objects""",
        "a": """add_partitions complete_adoption create_topic delete_records delete_topic discard_events
            discard_partitions insert_cluster lock_cluster publish_empty publish_partitions publish_starts
            raise_sequences set_retention truncate_cluster""",
    }.items()
    for name in names.split()
}
# Of views and tables that an adoption makes in its session: it is tried as a whole, below.
OF_AN_ADOPTION = {name for name, text in statements().items() if b"pg_temp." in text}
# No plan, or none that says what it needs.
RUN = {"discard_temporary", "lock_cluster", "raise_sequences", "truncate_cluster"}


def is_allowed(conn: Conn, name: str) -> bool:
    """By its plan: a server looks at all rights to tables and functions before it runs the first step."""
    text = statements()[name].decode()
    if name == "discard_temporary":
        conn.execute(text.encode())
        return True
    try:
        with conn.transaction(force_rollback=True):
            if name in RUN:
                conn.execute(text.encode())
                return True
            conn.execute("set local plan_cache_mode = force_generic_plan")
            conn.execute("set local tidemark.locked = '{}'")
            conn.execute("set local tidemark.spent = '{}'")
            conn.execute(f"prepare tried as {text}".encode())
            nulls = ", ".join(["null"] * max(map(int, re.findall(r"\$(\d+)", text)), default=0))
            conn.execute(f"explain execute tried{f'({nulls})' * bool(nulls)}".encode())
    except errors.InsufficientPrivilege:
        return False
    finally:
        conn.execute("deallocate all")
    return True


@pytest.mark.parametrize("letter", GROUPS)
def test_every_statement_is_told(letter: str, world: World) -> None:
    assert STATEMENTS.keys() == statements().keys() - OF_AN_ADOPTION
    conn = world.logins[letter]
    conn.prepare_threshold = None
    found = {name: is_allowed(conn, name) for name in STATEMENTS}
    assert found == {name: letter in letters for name, letters in STATEMENTS.items()}


# --- The functions of `db`


def batch(world: World, partition: int = 0) -> Batch:
    return Batch(partition_id=world.ids[partition], n_records=1, byte_offset=0, byte_length=10, max_timestamp=0)


def idempotent(conn: Conn, world: World) -> None:
    producer = init_producer(conn)
    init_producer(conn, producer.producer_id, producer.producer_epoch)
    made = Batch(
        **{**vars_of(batch(world)), "producer_id": producer.producer_id, "producer_epoch": 1, "base_sequence": 0}
    )
    key = f"key{next(world.fresh)}"
    assert commit_batches(conn, key, [made]).verdicts == ["accepted"]
    assert commit_batches(conn, key + "again", [made]).verdicts == ["duplicate"]


def vars_of(of: Batch) -> dict[str, Any]:
    return {name: getattr(of, name) for name in Batch.__slots__}


def fan_out(conn: Conn, world: World) -> None:
    world.committed()
    save_fan_out(conn, find_committed(conn))


def swept(conn: Conn, world: World) -> None:
    """Also what settles transactions: a pass beside an open one, which is over in the next round."""
    open_one = psycopg.connect(world.url)
    commit(open_one, f"key{next(world.fresh)}", world.ids)
    world.committed()
    materialize(conn, world.ids)
    open_one.commit()
    open_one.close()
    list(sweep(conn))
    materialize(conn, world.ids)
    list(sweep(conn))


def placed(conn: Conn, world: World) -> None:
    for strategy in ("incremental", "window"):
        world.committed()
        done = materialize(conn, world.ids, strategy=strategy, wait=strategy == "window")
        assert done.events_processed >= 2


def retained(conn: Conn, world: World) -> None:
    topic = world.topic()
    (partition,) = partition_ids(world.owner, topic)
    commit(world.owner, f"key{next(world.fresh)}", [partition])
    materialize(world.owner, [partition])
    set_retention(world.owner, topic, retention_ms=None, retention_bytes=0)
    assert retain(conn).objects_freed == 1


def purged(conn: Conn, world: World) -> None:
    topic = world.topic()
    commit(world.owner, f"key{next(world.fresh)}", partition_ids(world.owner, topic))
    delete_topic(world.owner, topic)
    assert purge(conn).deleted == 1
    purge(conn)
    world.owner.execute("update tidemark.deleted_partitions set purged_at = '-infinity'")
    purge(conn)
    assert world.owner.execute("select from tidemark.deleted_partitions").rowcount == 0


def expired(conn: Conn, world: World) -> None:
    idempotent(world.owner, world)
    # Ids from a random one on, half of all at most.
    while world.owner.execute("select from tidemark.producers").rowcount:
        expire_producers(conn, silent_seconds=0)
    assert world.owner.execute("select from tidemark.producer_batches").rowcount == 0


def collected(conn: Conn, world: World) -> None:
    condemn(world.owner, [f"key{next(world.fresh)}"])
    assert list_dead_objects(conn, older_than_seconds=0)
    taken = take_dead_objects(conn, limit=100, older_than_seconds=0, new_round=True)
    give_back_dead_objects(conn, taken)
    assert taken == take_dead_objects(conn, limit=100, older_than_seconds=0)
    assert forget_dead_objects(conn, [d.id for d in taken]) == len(taken)


def reconciled(conn: Conn, world: World) -> None:
    found = find_objects(conn, after_key="", limit=2)
    find_live_objects(conn, [o.key for o in found])
    save_reconciliation(conn, read_reconciliation(conn), found[-1].key, None)


def audited(conn: Conn, _world: World) -> None:
    for from_scratch in (True, False):
        assert audit(conn, from_scratch=from_scratch).violations == ()


def topics(conn: Conn, world: World) -> None:
    name = f"topic{next(world.fresh)}"
    create_topic(conn, name, 1, retention_ms=1)
    first, second = add_partitions(conn, name, 2)
    commit(world.owner, f"key{next(world.fresh)}", [first])
    materialize(world.owner, [first])
    assert delete_records(conn, first, -1) == 1
    conn.execute("select tidemark.begin_at(%s, 5)", (second,))
    set_retention(conn, name, retention_ms=None, retention_bytes=5)
    delete_topic(conn, name)


def adopted(conn: Conn, world: World) -> None:
    assert adopt(conn, schema="seed", batch_limit=1).complete
    conn.execute("select tidemark.delete_topic('t')")
    # Now as one that was interrupted.
    world.owner.execute("update tidemark.adopted_partitions set completed_at = null")
    assert discard(conn) == 4


def looked_at(conn: Conn, world: World) -> None:
    settings = Settings(database_url=world.url, broker_url="redis://h")
    found = list(examine(conn, settings))
    assert [f for f in found if f.found == "could not be looked at"] == []
    assert [f for f in found if f.area in {"schema", "privileges"} and f.level is Level.FAIL] == []


Call = Callable[[Conn, World], object]
# Each function of `db` that takes a connection, by where it stands, beside what calls it; and the groups that may.
CALLS: dict[str, tuple[str, Call]] = {
    "adopt.adopt adopt.discard": ("a", adopted),
    "audit.audit": ("wa", audited),
    "commit.commit_object": ("pa", lambda conn, world: commit(conn, f"key{next(world.fresh)}", world.ids)),
    "commit.commit_batches producers.init_producer": ("pa", idempotent),
    "discover.find_committed discover.save_fan_out": ("wa", fan_out),
    "discover.sweep": ("wa", swept),
    "doctor.checks doctor.examine": ("wma", looked_at),
    "fetch.fetch_batches": ("cma", lambda conn, world: fetch_batches(conn, world.ids[0], 0)),
    "fetch.fetch_partitions": ("cma", lambda conn, world: fetch_partitions(conn, [FetchRequest(world.ids[0], 0)])),
    "fetch.wait_for_batches": (
        "cma",
        lambda conn, world: wait_for_batches(conn, [FetchRequest(world.ids[0], 0)], max_wait=0),
    ),
    "fetch_batches by name": (
        "cma",
        lambda conn, _: conn.execute("select tidemark.fetch_batches('orders', 0, 0, 9, 9)"),
    ),
    "fetch.list_offsets": ("cma", lambda conn, world: list_offsets(conn, world.ids, [LATEST, 1])),
    "materialize.materialize": ("wa", placed),
    "materialize.ages_of_run": ("wma", lambda conn, world: ages_of_run(conn, world.ids[0], 0)),
    "migrate.require_current": ("wma", lambda conn, _: require_current(conn)),
    "objects.condemn": ("pwa", lambda conn, world: condemn(conn, [f"key{next(world.fresh)}"])),
    "objects.list_dead_objects objects.take_dead_objects objects.give_back_dead_objects objects.forget_dead_objects": (
        "wa",
        collected,
    ),
    "objects.find_objects objects.find_live_objects objects.read_reconciliation objects.save_reconciliation": (
        "wa",
        reconciled,
    ),
    "producers.producer_states": ("ma", lambda conn, world: producer_states(conn, world.ids[0])),
    "producers.expire_producers": ("wa", expired),
    "rebase.rebase": ("a", lambda conn, _: rebase(conn, force=True)),
    "receipts.receipts": ("pcma", lambda conn, _: receipts(conn, [1])),
    "receipts.wait": ("pcma", lambda conn, _: wait(conn, [1], timeout=0)),
    "receipts.Waiting.add receipts.Waiting.look": ("pcma", lambda conn, _: Waiting().add(conn, [1])),
    "retention.retain": ("wa", retained),
    "retention.purge": ("wa", purged),
    "status.read_status": ("wma", lambda conn, _: read_status(conn)),
    "status.read_figures": ("wma", lambda conn, _: read_figures(conn, topics=9, overdue_seconds=9)),
    "status.describe_topics": ("wma", lambda conn, _: describe_topics(conn)),
    "status.describe_partitions": ("wma", lambda conn, _: describe_partitions(conn)),
    "status.find_partition": ("pcwma", lambda conn, _: find_partition(conn, "orders", 1)),
    "status.read_offsets": ("cma", lambda conn, world: read_offsets(conn, world.ids[0])),
    "status.records_to_audit": ("wma", lambda conn, _: records_to_audit(conn)),
    "topics.create_topic topics.add_partitions topics.set_retention topics.delete_topic retention.delete_records": (
        "a",
        topics,
    ),
    "topics.list_topics": ("pcwma", lambda conn, _: list_topics(conn)),
    "topics.partition_ids": ("pcwma", lambda conn, _: partition_ids(conn, "orders")),
    "topics.PartitionIds.get": ("pcwma", lambda conn, _: PartitionIds().get(conn, "orders")),
    "topics.highest_partition_id": ("wma", lambda conn, _: highest_partition_id(conn)),
    "topics.names_of": ("wma", lambda conn, world: names_of(conn, world.ids)),
}


def test_every_function_of_db_is_told() -> None:
    found = set()
    for info in pkgutil.iter_modules(db.__path__):
        module = importlib.import_module(f"db.{info.name}")
        owners = [("", module), *((f"{n}.", k) for n, k in vars(module).items() if inspect.isclass(k))]
        found |= {
            f"{info.name}.{prefix}{name}"
            for prefix, owner in owners
            for name, what in vars(owner).items()
            if inspect.isfunction(what)
            and what.__module__ == module.__name__
            and not name.startswith("_")
            and "conn" in inspect.signature(what).parameters
        }
    # These run a statement of the caller's choice.
    told = {"statements.run", "statements.all_", "statements.rows", "statements.values", "statements.pipelined"}
    assert found == told | {name for names in CALLS for name in names.split() if "." in name}


@pytest.mark.parametrize("letter", GROUPS)
def test_each_function_works_for_whom_it_should(letter: str, world: World) -> None:
    for letters, call in CALLS.values():
        if letter in letters:
            call(world.logins[letter], world)
    audited(world.owner, world)


@pytest.mark.parametrize("letter", GROUPS)
def test_each_other_function_is_refused(letter: str, world: World) -> None:
    """And nothing is changed."""
    conn = world.logins[letter]
    # What those prepare as the owner is not theirs: here is the first call of theirs.
    first: dict[Call, Callable[[], object]] = {
        fan_out: lambda: save_fan_out(conn, find_committed(world.owner)),
        swept: lambda: list(sweep(conn)),
        placed: lambda: materialize(conn, world.ids),
        # Where nothing has expired it only reads.
        retained: lambda: run(conn, "lock_free_partitions", (world.ids,)),
        purged: lambda: purge(conn),
        expired: lambda: expire_producers(conn, silent_seconds=0),
        reconciled: lambda: save_reconciliation(conn, read_reconciliation(world.owner), "k", None),
        collected: lambda: take_dead_objects(conn, limit=1, older_than_seconds=0),
    }
    before = world.content()
    for names, (letters, call) in CALLS.items():
        if letter not in letters and call is not looked_at:
            require_refused(names, first.get(call, partial(call, conn, world)))
    assert world.content() == before


@pytest.mark.parametrize("letter", ["p", "c"])
def test_a_doctor_without_rights_says_what_it_could_not_look_at(letter: str, world: World) -> None:
    found = examine(world.logins[letter], Settings(database_url=world.url, broker_url="redis://h"))
    blind = {f.check for f in found if f.found == "could not be looked at"}
    assert blind == {"version", "privileges", "activity"}


def test_a_monitor_reads_what_an_audit_reads(world: World) -> None:
    """Its progress it cannot write, so the command is a worker's."""
    for name in ("audit_runs", "audit_heads"):
        assert "m" in STATEMENTS[name]
    with pytest.raises(errors.InsufficientPrivilege, match="audit_progress"):
        audit(world.logins["m"], from_scratch=True)


# --- Where migrating may not create roles


def test_a_migration_says_what_a_superuser_has_to_run(server_directory: Path, postgres_bin: Path | None) -> None:
    """An owner who may not create roles, on a server where nobody has them: what is printed, and a second migration."""
    with (
        PostgresServer(server_directory / "roles", bin_dir=postgres_bin, settings={"fsync": "off"}).start() as server,
        psycopg.connect(server.url(), autocommit=True) as admin,
    ):
        admin.execute("create role owner login")
        admin.execute("create database log owner owner")
        url = server.url("log").replace("//tidemark@", "//owner@")
        with app_for(url, "redis://h") as app:
            said = Cli(app)(migrate).err
            head, *sql_lines = said.splitlines()
            assert head == (
                "warning: owner may not create or grant all of Tidemark's roles. "
                "Let a superuser run this, then migrate again:"
            )
            assert len(sql_lines) == 6
            with psycopg.connect(url, autocommit=True) as conn:
                missing = [f for f in examine(conn, app.settings) if f.found == "the role does not exist"]
                assert [(f.check, f.level) for f in missing] == [(g, Level.WARN) for g in sorted(GROUPS.values())]
                for line in sql_lines:
                    admin.execute(line.encode())
                assert Cli(app)(migrate).err == ""
                found = {f.check: f for f in examine(conn, app.settings) if f.area == "privileges"}
                assert [found[group].level for group in GROUPS.values()] == [Level.OK] * len(GROUPS)
                assert found["own"].found == "owner may do what workers do"
        assert admin.execute("select pg_has_role('tidemark_monitor', 'pg_monitor', 'usage')").fetchone() == (True,)
