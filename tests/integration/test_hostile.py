"""A producer that does its worst: what the others do is done, and the log is right; and what it can do to them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection, errors

from config.errors import CondemnedObjectError
from db.audit import audit
from db.commit import Batch, commit_batches
from db.fetch import LATEST, fetch_batches, list_offsets
from db.migrate import _LOCK_KEY, upgrade
from db.objects import condemn
from db.producers import init_producer
from db.receipts import receipts
from db.topics import create_topic
from tests.benchmarks.hostile import OWN, TRICKS, Others
from tests.integration.conftest import commit
from tests.servers import PostgresServer
from tests.support import wait_until
from tests.support_roles import logins

Conn = Connection[Any]


@pytest.fixture(scope="module")
def urls(server_directory: Path, postgres_bin: Path | None) -> Iterator[Mapping[str, str]]:
    """A server of its own, whose lock table is soon full; the owner's address is `o`."""
    # 20 sessions, and two prepared transactions, of which each may have 64 locks: Postgres' default.
    small = {"max_connections": "20", "max_prepared_transactions": "2"}
    settings = {"fsync": "off", "full_page_writes": "off", **small}
    with PostgresServer(server_directory / "hostile", bin_dir=postgres_bin, settings=settings).start() as server:
        upgrade(server.url())
        with psycopg.connect(server.url(), autocommit=True) as owner:
            create_topic(owner, "orders", 16)
        with logins(server.url()) as made:
            yield {"o": server.url(), **made}


class World(Others):
    """The others, who wait for no lock longer than two seconds; the hostile producer, and the owner."""

    def __init__(self, stack: ExitStack, urls: Mapping[str, str]) -> None:
        bound = "-c lock_timeout=2s -c statement_timeout=60s"
        producer, worker, consumer, self.hostile, self.owner = (
            stack.enter_context(closing(psycopg.connect(urls[of], autocommit=True, options=bound * (of in "pwc"))))
            for of in "pwcho"
        )
        self.urls = urls
        super().__init__(producer, worker, consumer)
        self.objects: list[int] = []
        self.starts = [o.log_offset or 0 for o in list_offsets(self.consumer, self.ids, [LATEST] * len(self.ids))]

    def work(self) -> None:
        """What the others do, all of it."""
        self.objects.append(self.commit())
        self.materialize()
        self.fetch()

    def leave(self) -> None:
        """The hostile producer goes, and with it what its session held."""
        pid = self.hostile.info.backend_pid
        self.hostile.close()

        def its_session_is_over() -> bool:
            # It may have left no room for the locks of a question.
            with suppress(errors.OutOfMemory):
                return self.owner.execute("select from pg_stat_activity where pid = %s", (pid,)).rowcount == 0
            return False

        wait_until(its_session_is_over)

    def end(self) -> None:
        """Afterwards all gets its offset, each of the others' batches once and in their order."""
        if not self.hostile.closed:
            self.leave()
        while self.materialize():
            pass
        keys: dict[int, str] = dict(self.owner.execute("select id, key from tidemark.objects").fetchall())
        for partition_id, start in zip(self.ids, self.starts, strict=True):
            found, offset = [], start
            while batches := fetch_batches(self.consumer, partition_id, offset, max_batches=10_000):
                assert batches[0].start_offset == offset
                offset = batches[-1].start_offset + batches[-1].n_records
                found += [b.object_key for b in batches]
            mine = [keys[i] for i in self.objects]
            assert [key for key in found if key in set(mine)] == mine
        result = audit(self.owner)
        assert (result.violations, result.complete) == ((), True)


@pytest.fixture
def world(urls: Mapping[str, str]) -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack, urls)


@pytest.mark.parametrize("name", TRICKS)
def test_the_others_go_on(name: str, world: World) -> None:
    trick = TRICKS[name]
    for statement in trick.once:
        world.hostile.execute(statement.encode())
    if trick.refused:
        with pytest.raises(psycopg.Error, match=r"1000000 batches|no object can have"):
            world.hostile.execute((trick.again or "").encode())
    elif trick.again is not None:
        world.hostile.execute(trick.again.encode())
    world.work()
    world.work()
    world.end()


@pytest.mark.parametrize(
    "statement",
    [
        "lock table tidemark.topic_partitions in access share mode",
        "select from tidemark.topic_partitions for update",
        "set session_replication_role = replica",
        "set role tidemark_worker",
        "set session authorization tidemark",
        "set log_statement = 'none'",
        "grant tidemark_producer to login_of_c",
        "revoke execute on function tidemark.commit_object from login_of_p",
        "alter role tidemark_producer nologin",
        "vacuum tidemark.objects",
        "reindex table tidemark.objects",
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'login_of_w'",
        "select pg_cancel_backend(pid) from pg_stat_activity where usename = 'login_of_p'",
        "copy (select 1) to '/tmp/hostile'",
        "alter system set fsync = off",
    ],
)
def test_what_it_may_not(statement: str, world: World) -> None:
    """Refused, or without effect and with a warning."""
    said: list[str | None] = []
    world.hostile.add_notice_handler(lambda notice: said.append(notice.message_primary))
    world.hostile.execute("begin")
    try:
        if statement.startswith(("vacuum", "alter system")):
            world.hostile.execute("rollback")
        world.hostile.execute(statement.encode())
    except errors.InsufficientPrivilege:
        said.append("refused")
    assert said
    world.work()


def test_what_it_owns_in_the_name_of_its_group(world: World) -> None:
    """It may call itself by the group's name; then, too, it takes nothing from the group."""
    for statement in (
        "drop owned by tidemark_producer",
        "set role tidemark_producer",
        "drop owned by tidemark_producer cascade",
        "alter role tidemark_producer set default_transaction_read_only = on",
        "reassign owned by tidemark_producer to tidemark_producer",
    ):
        world.hostile.execute(statement.encode())
    # A group's settings are nobody's: only those of the login that connects count.
    with psycopg.connect(world.urls["p"]) as fresh:
        commit(fresh, "others/after", world.ids)
    world.work()
    world.owner.execute("alter role tidemark_producer reset all")
    world.end()


# --- What it can do to the others


def test_a_prepared_transaction_holds_nobody_up(world: World) -> None:
    """It outlives its session, and is the owner's to end."""
    for name in ("one", "two"):
        world.hostile.execute(f"begin; {OWN}; prepare transaction '{name}'".encode())
    world.leave()
    world.work()
    world.owner.execute("rollback prepared 'one'")
    world.owner.execute("commit prepared 'two'")
    world.work()
    world.end()


def test_transactions_are_not_prepared_by_default(conn: Conn) -> None:
    with pytest.raises(errors.ObjectNotInPrerequisiteState):
        conn.execute("begin; select pg_current_xact_id(); prepare transaction 'one'")


def test_the_lock_table_is_everybodys(world: World) -> None:
    """What is bounded by the server's settings alone: who fills it stops all who write, until its transaction ends."""
    with pytest.raises(errors.OutOfMemory):
        world.hostile.execute("begin; select pg_advisory_xact_lock(n) from generate_series(1, 100000) n")
    # What failed has given its locks back. What asks for one less keeps them.
    world.hostile.execute("rollback")
    world.work()
    with pytest.raises(errors.OutOfMemory):
        world.hostile.execute(
            """do $$ begin
                for n in 1..100000 loop
                    begin perform pg_advisory_lock(n); exception when division_by_zero then null; end;
                end loop;
            end $$"""
        )
    with pytest.raises(errors.OutOfMemory):
        list(iter(world.commit, None))
    world.leave()
    world.work()
    world.end()


def test_a_key_that_it_knows(world: World) -> None:
    """Whoever commits under it has to wait for it, or finds it condemned. What is committed it cannot touch."""
    kept = world.commit()
    key = "others/known"
    world.hostile.execute("begin")
    commit(world.hostile, key, world.ids)
    with pytest.raises(errors.LockNotAvailable):
        commit(world.producer, key, world.ids)
    world.work()
    world.hostile.execute("rollback")
    world.objects.insert(0, kept)
    world.objects.append(commit(world.producer, key, world.ids))
    assert condemn(world.hostile, [key, "others/next"]) == ["others/next"]
    with pytest.raises(CondemnedObjectError):
        commit(world.producer, "others/next", world.ids)
    # A commit of the same content is the same commit: it learns the id, and with it what became of it.
    assert commit(world.hostile, key, world.ids) == world.objects[-1]
    assert len(receipts(world.hostile, [world.objects[-1]])) == len(world.ids)
    world.work()
    world.end()


def test_a_producer_whose_id_it_knows(world: World) -> None:
    """It can be fenced, and can wait for an open transaction; then it goes on under a new id, as with Kafka."""
    world.work()
    who = world.identity
    place = Batch(partition_id=world.ids[0], n_records=1, byte_offset=0, byte_length=1, max_timestamp=0)
    world.hostile.execute("begin")
    forged = replace(place, producer_id=who.producer_id, producer_epoch=who.producer_epoch, base_sequence=world.sent)
    assert commit_batches(world.hostile, "hostile/forged", [forged]).verdicts == ["accepted"]
    with pytest.raises(errors.LockNotAvailable):
        world.commit()
    world.hostile.execute("rollback")
    world.work()
    init_producer(world.hostile, who.producer_id)
    with pytest.raises(AssertionError, match="fenced_epoch"):
        world.commit()
    world.identity, world.sent = init_producer(world.producer), 0
    world.work()
    world.end()


def test_its_connections_are_limited_by_its_login(world: World) -> None:
    world.owner.execute("alter role login_of_h connection limit 2")
    with ExitStack() as stack:
        stack.enter_context(psycopg.connect(world.urls["h"]))
        with pytest.raises(psycopg.OperationalError, match="too many connections for role"):
            psycopg.connect(world.urls["h"])
        stack.enter_context(psycopg.connect(world.urls["p"]))
        world.work()
    world.owner.execute("alter role login_of_h connection limit -1")


def test_the_migrations_lock_holds_up_migrations_alone(world: World) -> None:
    """For a bounded time: see test_schema. Workers and others have no part in it."""
    for statement in TRICKS["a thousand advisory locks, ours among them"].once[:2]:
        world.hostile.execute(statement.encode())
    world.owner.execute("set lock_timeout = '100ms'")
    with pytest.raises(errors.LockNotAvailable):
        world.owner.execute("select pg_advisory_xact_lock(%s)", (_LOCK_KEY,))
    world.work()
    world.end()
