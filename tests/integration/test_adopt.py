"""Adoption: every batch keeps its offset, whatever interrupts it, and nothing that is there is written over."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from itertools import pairwise
from typing import Any, LiteralString

import pytest
from psycopg import Connection, errors
from psycopg.rows import TupleRow

from config.embedded.host import postgres_bin as wheel_bin
from config.errors import (
    AdoptConflictError,
    AdoptDifferenceError,
    ForeignClusterError,
    SeedChangedError,
    SeedError,
    TidemarkError,
    TransientDatabaseError,
)
from config.settings import Strategy
from db import adopt as module
from db.adopt import Adoption, adopt, discard
from db.audit import audit
from db.discover import find_committed, sweep
from db.fetch import FetchedBatch, fetch_batches
from db.materialize import materialize
from db.rebase import rebase
from db.retention import retain
from db.statements import run, statements
from db.status import describe_partitions
from db.topics import create_topic, partition_ids
from tasks.commands.entry import load
from tests.benchmarks.baseline import system
from tests.integration.conftest import CELERY, commit
from tests.support import Connect, wait_until
from tests.support_commands import Cli

Conn = Connection[TupleRow]

# The tables as the seed's later releases make them.
RELEASE: LiteralString = """
create schema seed;
create table seed.topic_v2 (
    id uuid primary key default gen_random_uuid(), created_at timestamptz, deleted_at timestamptz,
    name varchar(255) not null, n_partitions int not null check (n_partitions >= 0));
create table seed.topic_partitions (
    id uuid primary key default gen_random_uuid(), created_at timestamptz, deleted_at timestamptz,
    topic_id uuid references seed.topic_v2, partition int not null,
    start_offset bigint not null check (start_offset >= 0),
    end_offset bigint not null check (end_offset >= start_offset));
create table seed.record_batch_events (
    id uuid primary key default gen_random_uuid(), created_at timestamptz, deleted_at timestamptz,
    topic_id uuid not null references seed.topic_v2, partition int not null, n_records bigint not null,
    s3_key varchar(255) not null, byte_offset bigint not null default 0, byte_length bigint not null default 0,
    processed boolean default false);
create table seed.record_batch_v2 (
    id uuid primary key default gen_random_uuid(), created_at timestamptz, deleted_at timestamptz,
    topic_id uuid references seed.topic_v2, partition int not null, start_offset bigint not null,
    n_records bigint not null check (n_records >= 0), s3_key varchar(255) not null,
    byte_offset bigint not null default 0, byte_length bigint not null default 0);
"""
# And the least that one can have: numbers for ids, no times.
NUMBERED: LiteralString = """
create schema seed;
create table seed.topics (id int primary key, name text);
create table seed.topic_partitions (topic_id int, partition bigint, start_offset bigint, end_offset bigint);
create table seed.record_batch_events (
    id bigint generated always as identity, topic_id int, partition bigint, n_records bigint, s3_key text,
    processed boolean);
create table seed.record_batches (
    id bigint generated always as identity, topic_id int, partition bigint, start_offset bigint, end_offset bigint,
    s3_key text, max_timestamp bigint);
"""


def seed(conn: Conn, *, topics: int = 2, partitions: int = 3, placed: int = 1000, pending: int = 100) -> None:
    """The seed's system as it is benchmarked, with batches that have their offsets and events that have none."""
    system.create(conn, topics, partitions, indexes="page")
    system.load(conn, partitions, placed, (1, 10))
    system.drain(conn, system.SeedShare(batch=150))
    system.load(conn, partitions, pending, (20, 30))


def numbered(conn: Conn, batches: str, *, start: int = 0, end: int = 0, pending: str = "") -> None:
    """Topic `t` with a partition: batches are `start-end` in their order, pending events numbers of records."""
    conn.execute(NUMBERED)
    conn.execute("insert into seed.topics values (1, 't')")
    conn.execute("insert into seed.topic_partitions values (1, 0, %s, %s)", (start, end))
    for n, (first, last) in enumerate(batch.split("-") for batch in batches.split()):
        conn.execute(
            "insert into seed.record_batches (topic_id, partition, start_offset, end_offset, s3_key, max_timestamp) "
            "values (1, 0, %s, %s, %s, %s)",
            (int(first), int(last), f"o{n}", 1000 * n),
        )
    for n, records in enumerate(pending.split()):
        conn.execute(
            "insert into seed.record_batch_events (topic_id, partition, n_records, s3_key, processed) "
            "values (1, 0, %s, %s, false)",
            (int(records), f"p{n}"),
        )


def seed_log(conn: Conn) -> list[Any]:
    return conn.execute("""
        select t.name, b.partition, b.start_offset, b.end_offset, b.s3_key
        from seed.record_batches b join seed.topics t on t.id = b.topic_id order by 1, 2, 3""").fetchall()


def seed_pending(conn: Conn) -> list[Any]:
    return conn.execute("""
        select t.name, e.partition, e.n_records, e.s3_key
        from seed.record_batch_events e join seed.topics t on t.id = e.topic_id
        where not e.processed order by 1, 2, e.created_at, e.id""").fetchall()


def log(conn: Conn) -> list[Any]:
    return conn.execute("""
        select topic, partition, start_offset, end_offset, object_key from tidemark.record_batches
        order by 1, 2, 3""").fetchall()


def written(conn: Conn) -> list[list[Any]]:
    """Everything that an adoption writes, without the ids of objects, which are given once, and without times."""
    return [
        conn.execute(statement).fetchall()
        for statement in (
            "select r.* from tidemark.runs r order by partition_id, start_offset",
            """select e.partition_id, e.tx, e.id & 65535, o.key, e.byte_offset, e.byte_length, e.n_records
               from tidemark.record_batch_events e left join tidemark.objects o on o.id = e.id >> 16 order by 1, 2""",
            "select key, tx, batches, content_hash, partition_ids, batch_counts from tidemark.objects order by key",
            "select partition_id, topic, partition, batches, pending from tidemark.adopted_partitions order by 1",
            "select * from tidemark.topic_partitions order by id",
            "select id, name, partitions from tidemark.topics order by name",
            "select * from tidemark.log_starts order by partition_id",
        )
    ]


def sound(conn: Conn) -> bool:
    result = audit(conn, from_scratch=True)
    assert result.violations == ()
    return result.complete


def ids_of(conn: Conn) -> list[int]:
    return [i for (i,) in conn.execute("select id from tidemark.topic_partitions order by id").fetchall()]


def head(conn: Conn, partition_id: int) -> tuple[int, int]:
    row = conn.execute(
        "select start_offset, end_offset from tidemark.named_partitions where partition_id = %s", (partition_id,)
    ).fetchone()
    assert row is not None
    return row[0], row[1]


class Stopped(Exception):  # noqa: N818 - it stands for whatever ends a process
    pass


def stop_after(transactions: int) -> Callable[[int, int], None]:
    left = transactions

    def watch(done: int, total: int) -> None:
        nonlocal left
        assert 0 <= done <= total
        left -= 1
        if left == 0:
            raise Stopped

    return watch


# --- What is adopted


def test_every_batch_keeps_its_offset(conn: Conn) -> None:
    seed(conn)
    done = adopt(conn, schema="seed")
    assert done == Adoption(topics=2, partitions=6, batches=1000, pending=100, copied=1100, checked=1100, complete=True)
    assert log(conn) == seed_log(conn)
    assert sound(conn)
    topics = "select id, name from {}.topics order by name"
    assert (
        conn.execute(topics.format("tidemark").encode()).fetchall()
        == conn.execute(topics.format("seed").encode()).fetchall()
    )


@pytest.mark.parametrize("strategy", ["incremental", "window"])
def test_goes_on_with_what_had_no_offset(conn: Conn, strategy: Strategy) -> None:
    """In the order in which the seed would have taken it, and behind it what is committed from now on."""
    seed(conn)
    adopt(conn, schema="seed")
    ids = ids_of(conn)
    assert sum(pending.events for pending in sweep(conn)) == 100
    assert all(state.backlog and state.lag is not None for state in describe_partitions(conn))
    commit(conn, "new", ids, records=7)
    while materialize(conn, ids, events_per_partition=5, strategy=strategy).events_processed:
        pass
    placed = log(conn)
    for topic, partition in {row[:2] for row in placed}:
        own = [row for row in placed if row[:2] == (topic, partition)]
        old = [row for row in seed_log(conn) if row[:2] == (topic, partition)]
        waiting = [row[2:] for row in seed_pending(conn) if row[:2] == (topic, partition)]
        assert own[: len(old)] == old
        assert [(row[3] - row[2], row[4]) for row in own[len(old) :]] == [*waiting, (7, "new")]
        assert all(a[3] == b[2] for a, b in pairwise(own))
    assert sound(conn)


def test_reads_and_deletes_like_any_log(conn: Conn) -> None:
    seed(conn, topics=1, partitions=1, placed=300, pending=0)
    adopt(conn, schema="seed")
    (p,) = ids_of(conn)
    expected = [(start, key) for _, _, start, _, key in seed_log(conn)]
    fetched: list[FetchedBatch] = []
    while batches := fetch_batches(conn, p, fetched[-1].start_offset + fetched[-1].n_records if fetched else 0):
        fetched += batches
    assert [(b.start_offset, b.object_key) for b in fetched] == expected
    # Batches of the seed without times are as old as their commit, and without lengths they have no size.
    conn.execute("update tidemark.topics set retention_ms = 0")
    commit(conn, "young", [p])
    materialize(conn, [p])
    assert retain(conn).deleted == 301
    assert sound(conn)


def test_the_later_releases_tables(conn: Conn) -> None:
    """Batches have byte ranges and numbers of records, and what is marked as deleted is not there."""
    conn.execute(RELEASE)
    conn.execute("""
        insert into seed.topic_v2 (name, n_partitions, deleted_at) values ('a', 2, null), ('gone', 1, now());
        insert into seed.topic_partitions (topic_id, partition, start_offset, end_offset)
        select id, p, 0, case when name = 'a' and p = 0 then 30 else 0 end
        from seed.topic_v2 t, generate_series(0, n_partitions - 1) p;
        insert into seed.record_batch_v2
            (topic_id, partition, start_offset, n_records, s3_key, byte_offset, byte_length)
        select id, 0, v.* from seed.topic_v2, (values
            (0, 10, 'x', 5, 100), (10, 0, 'none', 0, 0), (10, 20, 'x', 105, 50)) v;
        insert into seed.record_batch_events
            (topic_id, partition, n_records, s3_key, byte_offset, byte_length, processed, created_at)
        select id, 0, v.* from seed.topic_v2, (values
            (10, 'x', 5, 100, true, '2026-01-01'::timestamptz), (20, 'x', 105, 50, true, '2026-01-02'),
            (3, 'y', 0, 9, false, '2026-01-04'), (4, 'z', 0, 8, null, '2026-01-03')) v""")
    done = adopt(conn, schema="seed")
    assert (done.topics, done.partitions, done.batches, done.pending) == (1, 2, 2, 2)
    ids = ids_of(conn)
    materialize(conn, ids)
    assert [
        (b.start_offset, b.n_records, b.object_key, b.byte_offset, b.byte_length)
        for b in fetch_batches(conn, ids[0], 0)
    ] == [
        (0, 10, "x", 5, 100),
        (10, 20, "x", 105, 50),
        (30, 4, "z", 0, 8),
        (34, 3, "y", 0, 9),
    ]
    committed: dict[str, str] = dict(
        conn.execute("select key, committed_at::date::text from tidemark.objects").fetchall()
    )
    assert committed == {"x": "2026-01-02", "y": "2026-01-04", "z": "2026-01-03"}
    assert sound(conn)


def test_numbers_for_ids(conn: Conn) -> None:
    """10 comes after 9; and where nothing tells when an object was committed, it was now."""
    numbered(conn, "0-10 10-15", end=15, pending=" ".join(map(str, range(1, 13))))
    adopt(conn, schema="seed")
    (p,) = ids_of(conn)
    materialize(conn, [p])
    batches = fetch_batches(conn, p, 0)
    assert [b.object_key for b in batches] == ["o0", "o1", *(f"p{n}" for n in range(12))]
    assert [b.max_timestamp for b in batches[:3]] == [0, 1000, -1]
    assert conn.execute(
        "select bool_and(committed_at > now() - interval '1 min') from tidemark.objects"
    ).fetchone() == (True,)
    assert sound(conn)


def test_a_log_that_is_longer_than_the_cluster_is_old(conn: Conn, connect: Connect) -> None:
    """Then a rebase makes room below the transactions to come; those that are open keep their place behind."""
    late = connect(autocommit=False)
    late.execute("select pg_current_xact_id()")
    conn.execute(NUMBERED)
    conn.execute("""
        insert into seed.topics values (1, 't');
        insert into seed.topic_partitions values (1, 0, 0, 100000);
        insert into seed.record_batches (topic_id, partition, start_offset, end_offset, s3_key)
        select 1, 0, g, g + 1, 'o' || g / 1000 from generate_series(0, 99999) g""")
    adopt(conn, schema="seed")
    (p,) = ids_of(conn)
    assert conn.execute("select tx_base > 100000 from tidemark.cluster").fetchone() == (True,)
    commit(late, "late", [p])
    late.commit()
    materialize(conn, [p])
    assert [b.object_key for b in fetch_batches(conn, p, 99_999)] == ["o99", "late"]
    assert sound(conn)


# --- Where logs begin


@pytest.mark.parametrize(
    ("batches", "start", "end", "log_start", "first"),
    [
        ("", 0, 0, 0, None),
        ("", 0, 40, 40, None),
        ("", 40, 40, 40, None),
        ("0-10 10-20", 20, 20, 20, None),
        ("10-20 20-40", 0, 40, 10, 10),
        ("10-20 20-40", 10, 40, 10, 10),
        ("0-10 10-20 20-40", 10, 40, 10, 10),
        ("0-10 10-20 20-40", 15, 40, 15, 10),
    ],
)
@pytest.mark.parametrize("pending", ["", "5 6"])
def test_where_a_log_begins(
    conn: Conn, batches: str, start: int, end: int, log_start: int, first: int | None, pending: str
) -> None:
    """Empty, trimmed by whole batches or within one, or trimmed to its end: offsets go on where they were."""
    numbered(conn, batches, start=start, end=end, pending=pending)
    adopt(conn, schema="seed")
    (p,) = ids_of(conn)
    assert head(conn, p) == (log_start, end)
    assert sound(conn) == bool(end)
    assert [b.start_offset for b in fetch_batches(conn, p, log_start)][:1] == ([] if first is None else [first])
    commit(conn, "new", [p], records=3, timestamp=10**12)
    materialize(conn, [p])
    assert head(conn, p) == (log_start, end + 3 + (11 if pending else 0))
    assert sound(conn)
    conn.execute("update tidemark.topics set retention_bytes = 0")
    retain(conn)
    ended = head(conn, p)
    assert ended[0] == ended[1]
    assert sound(conn)


# --- Interruptions


def hidden(conn: Conn) -> bool:
    """Nobody sees anything, and what works on logs finds nothing to do."""
    assert log(conn) == []
    assert ids_of(conn) == []
    assert conn.execute("select count(*) from tidemark.topics").fetchone() == (0,)
    assert find_committed(conn).partitions == ()
    assert list(sweep(conn)) == []
    assert retain(conn).deleted == 0
    assert audit(conn).violations == ()
    for (reserved,) in conn.execute("select partition_id from tidemark.adopted_partitions").fetchall():
        with pytest.raises(TidemarkError, match="does not exist"):
            commit(conn, "too early", [reserved])
    return True


@pytest.mark.parametrize("transactions", [1, 2, 3, 7, 11, 14, 15])
def test_goes_on_where_it_was(conn: Conn, transactions: int) -> None:
    """Interrupted once, in the copying or the comparing, it ends with the same result as one that is not."""
    seed(conn)
    with pytest.raises(Stopped):
        adopt(conn, schema="seed", batch_limit=150, watch=stop_after(transactions))
    assert hidden(conn)
    before = conn.execute("select count(*) from tidemark.record_batch_events").fetchone()
    again = adopt(conn, schema="seed", batch_limit=150)
    assert before == (1100 - again.copied,)
    assert again.complete
    interrupted = written(conn)
    assert log(conn) == seed_log(conn)
    assert sound(conn)
    # The same from nothing: partition ids and topics are reserved anew, so they are compared by their order.
    for table in ("runs", "record_batch_events", "objects", "adopted_partitions", "log_starts"):
        conn.execute(f"truncate tidemark.{table} cascade".encode())
    conn.execute("delete from tidemark.topic_partitions")
    conn.execute("delete from tidemark.topics")
    first = interrupted[3][0][0]
    conn.execute("select setval('tidemark.topic_partitions_id_seq', %s, false)", (first,))
    adopt(conn, schema="seed")
    assert written(conn) == interrupted


def test_interrupted_after_every_transaction(conn: Conn) -> None:
    seed(conn)
    runs = 0
    while True:
        try:
            # Past the transactions it could do last time.
            adopt(conn, schema="seed", batch_limit=200, watch=stop_after(1 if runs < 6 else 100))
            break
        except Stopped:
            runs += 1
            assert hidden(conn)
    assert runs == 6
    assert log(conn) == seed_log(conn)
    assert sound(conn)


def test_restored_in_the_middle(conn: Conn) -> None:
    """As data alone, whose sequences were left behind: nobody else gets the ids that are reserved."""
    seed(conn)
    with pytest.raises(Stopped):
        adopt(conn, schema="seed", batch_limit=200, watch=stop_after(3))
    conn.execute(
        "alter sequence tidemark.topic_partitions_id_seq restart; alter sequence tidemark.objects_id_seq restart"
    )
    rebase(conn, force=True)
    create_topic(conn, "more", 10)
    adopt(conn, schema="seed")
    assert log(conn) == seed_log(conn)
    assert sound(conn)


@pytest.mark.parametrize("statement", ["copy_events", "check_adopted", "publish_partitions", "complete_adoption"])
def test_a_failure_within_a_transaction(conn: Conn, statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed(conn)

    def fail(conn: Any, name: str, *arguments: Any, **others: Any) -> Any:
        found = run(conn, name, *arguments, **others)
        if name == statement:
            raise Stopped
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "run", fail)
        patch.setattr(module, "values", lambda *arguments: fail(*arguments).fetchall()[0])
        with pytest.raises(Stopped):
            adopt(conn, schema="seed", batch_limit=300)
    assert hidden(conn)
    adopt(conn, schema="seed")
    assert log(conn) == seed_log(conn)
    assert sound(conn)


@pytest.fixture
def command(installed: str, database_url: str) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command, in a process of its own."""

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [CELERY, "-A", "tasks", "adopt", "--schema", "seed", *arguments],
            env={**os.environ, "PYTHONPATH": installed, "TIDEMARK_DATABASE_URL": database_url},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_is_killed(
    conn: Conn, command: Callable[..., subprocess.Popen[str]], how: signal.Signals
) -> None:
    """By the system and by Ctrl-C: the next one goes on."""
    conn.execute(NUMBERED)
    conn.execute("""
        insert into seed.topics values (1, 't');
        insert into seed.topic_partitions select 1, p, 0, 10000 from generate_series(0, 9) p;
        insert into seed.record_batches (topic_id, partition, start_offset, end_offset, s3_key)
        select 1, g % 10, g / 10, g / 10 + 1, 'o' || g / 1000 from generate_series(0, 99999) g""")

    def copied() -> int:
        row = conn.execute("select count(*) from tidemark.record_batch_events").fetchone()
        assert row is not None
        return int(row[0])

    # It copies no second part before it is killed, however slow we are.
    conn.execute("""
        create function public.wait_behind_the_first_part() returns trigger language plpgsql as $$
        begin
            if exists (select from tidemark.record_batch_events where xmin <> pg_current_xact_id()::xid) then
                perform pg_advisory_xact_lock(1);
            end if;
            return null;
        end $$;
        create trigger wait before insert on tidemark.record_batch_events
            for each statement execute function public.wait_behind_the_first_part();
        select pg_advisory_lock(1)""")
    with command() as process:
        wait_until(lambda: copied() or process.poll() is not None, timeout=60)
        process.send_signal(how)
        process.communicate(timeout=60)
    # In this order: what a killed command has begun in its session still waits for the lock, and holds the table.
    conn.execute("select pg_advisory_unlock(1)")
    conn.execute("drop function public.wait_behind_the_first_part cascade")
    assert 0 < copied() < 100_000
    assert hidden(conn)
    with command("--json") as process:
        out, err = process.communicate(timeout=80)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["copied"] < 100_000
    assert log(conn) == seed_log(conn)
    assert sound(conn)


# --- Nothing is written over


def unchanged(conn: Conn, error: type[TidemarkError], said: str, **arguments: Any) -> bool:
    before = written(conn)
    with pytest.raises(error, match=said):
        adopt(conn, schema="seed", **arguments)
    return written(conn) == before


@pytest.mark.parametrize("name", ["topic-1", "topic.1", "topic_1"])
def test_a_topic_that_was_not_adopted(conn: Conn, name: str) -> None:
    seed(conn)
    conn.execute("update seed.topics set name = 'topic_1' where name = 'topic-1'")
    name = name.replace("-", "_")
    create_topic(conn, name, 3)
    commit(conn, "mine", partition_ids(conn, name))
    materialize(conn, partition_ids(conn, name))
    assert unchanged(conn, AdoptConflictError, f"topic 'topic_1' is there already, as '{name}'")
    assert sound(conn)


def test_an_object_that_was_not_adopted(conn: Conn) -> None:
    seed(conn)
    create_topic(conn, "mine", 1)
    commit(conn, "bucket/object-0", partition_ids(conn, "mine"))
    assert unchanged(conn, AdoptConflictError, "object 'bucket/object-0' is committed already")


def test_an_object_that_is_committed_while_it_copies(conn: Conn, connect: Connect) -> None:
    """The step that meets it fails, and the next run says which it is, before it writes."""
    seed(conn)
    other = connect()
    create_topic(other, "mine", 1)
    conn.execute("""
        update seed.record_batches set s3_key = 'last' where id = (
            select b.id from seed.record_batches b join seed.topics t on t.id = b.topic_id
            order by t.name desc, partition desc, start_offset desc limit 1)""")

    def take_key(done: int, total: int) -> None:
        commit(other, "last", partition_ids(other, "mine"))

    with pytest.raises(AdoptConflictError, match=r"committed, condemned or forgotten .* run it again"):
        adopt(conn, schema="seed", batch_limit=100, watch=take_key)
    assert unchanged(conn, AdoptConflictError, "object 'last' is committed already")
    assert log(conn) == []


def test_a_topic_that_is_created_while_it_compares(conn: Conn, connect: Connect) -> None:
    seed(conn)
    other = connect()

    def take_name(done: int, total: int) -> None:
        if done == total:
            create_topic(other, "topic-2", 1)

    with pytest.raises(AdoptConflictError, match=r"somebody has created a topic .* run it again"):
        adopt(conn, schema="seed", watch=take_name)
    assert log(conn) == []
    assert unchanged(conn, AdoptConflictError, "topic 'topic-2' is there already")
    conn.execute("select tidemark.delete_topic('topic-2')")
    adopt(conn, schema="seed")
    assert log(conn) == seed_log(conn)
    assert sound(conn)


def test_adopting_twice(conn: Conn) -> None:
    """The second time nothing is done, also when the log has gone on, and when a topic is deleted."""
    seed(conn)
    adopt(conn, schema="seed")
    ids = ids_of(conn)
    commit(conn, "new", ids)
    materialize(conn, ids)
    before = written(conn)
    assert adopt(conn, schema="seed") == Adoption(topics=2, partitions=6, batches=1000, pending=100, complete=True)
    assert discard(conn) == 0
    assert written(conn) == before
    conn.execute("select tidemark.delete_topic('topic-1')")
    assert adopt(conn, schema="seed").copied == 0
    system.load(conn, 3, 1, (1, 1))
    assert unchanged(conn, SeedChangedError, "have changed since their adoption was complete")


def test_beside_other_topics(conn: Conn) -> None:
    """They are left alone, and ids go on."""
    create_topic(conn, "mine", 2)
    mine = partition_ids(conn, "mine")
    commit(conn, "a", mine)
    materialize(conn, mine)
    seed(conn)
    adopt(conn, schema="seed")
    commit(conn, "b", mine)
    materialize(conn, mine)
    assert [b.object_key for b in fetch_batches(conn, mine[0], 0)] == ["a", "b"]
    create_topic(conn, "more", 1)
    assert min(partition_ids(conn, "more")) > max(partition_ids(conn, "topic-2"))
    assert sound(conn)


# --- A seed that still runs


def test_a_seed_that_is_being_written_to(conn: Conn, connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    seed(conn)
    writer = connect(autocommit=False)
    writer.execute("delete from seed.record_batches")
    settings = statements()["adopt_settings"].replace(b"10s", b"200ms")
    changed = {**statements(), "adopt_settings": settings}
    monkeypatch.setattr("db.statements.statements", lambda: changed)
    assert unchanged(conn, TransientDatabaseError, "programs of the seed's system write to its tables")


@pytest.mark.parametrize("step", ["between", "while it copies", "while it compares"])
def test_a_seed_that_was_written_to(conn: Conn, connect: Connect, step: str) -> None:
    """Nothing becomes visible; what was copied is taken back, and adopted anew."""
    seed(conn)
    other = connect()
    pending: list[int] = []

    def write(done: int, total: int) -> None:
        if step == "between":
            raise Stopped
        if not pending and (step == "while it copies" or done > 1100):
            system.load(other, 3, 5, (1, 1))
            pending.append(5)

    with pytest.raises(Stopped if step == "between" else SeedChangedError):
        adopt(conn, schema="seed", batch_limit=150, watch=write)
    if step == "between":
        system.load(other, 3, 5, (1, 1))
    assert unchanged(conn, SeedChangedError, r"changed since their adoption began: topic-\d/\d held .* --discard")
    assert hidden(conn)
    assert discard(conn) > 0
    assert [rows for rows in written(conn) if rows] == []
    assert adopt(conn, schema="seed").pending == 105
    assert log(conn) == seed_log(conn)
    assert sound(conn)


@pytest.mark.parametrize("then", [adopt, discard])
def test_taking_back_is_interrupted(conn: Conn, then: Callable[..., object], monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leaves can be gone on with, and taken back."""
    seed(conn)
    with pytest.raises(Stopped):
        adopt(conn, schema="seed", batch_limit=200, watch=stop_after(9))
    calls = 0

    def fail(conn: Any, name: str, *arguments: Any, **others: Any) -> Any:
        nonlocal calls
        calls += name == "discard_events"
        if calls > 4:
            raise Stopped
        return run(conn, name, *arguments, **others)

    with monkeypatch.context() as patch:
        patch.setattr(module, "run", fail)
        with pytest.raises(Stopped):
            discard(conn, batch_limit=100)
    assert hidden(conn)
    before = conn.execute("select count(*) from tidemark.record_batch_events").fetchone()
    if then is discard:
        assert (discard(conn),) == before
        assert [rows for rows in written(conn) if rows] == []
    assert adopt(conn, schema="seed").complete
    assert log(conn) == seed_log(conn)
    assert sound(conn)


def test_one_at_a_time(conn: Conn, connect: Connect) -> None:
    seed(conn)
    other = connect()

    def another(done: int, total: int) -> None:
        with pytest.raises(TransientDatabaseError, match="another adoption runs"):
            adopt(other, schema="seed")
        with pytest.raises(TransientDatabaseError, match="another adoption runs"):
            discard(other)

    adopt(conn, schema="seed", watch=another)
    assert adopt(other, schema="seed").complete


# --- What cannot be adopted


def test_tables_that_are_not_there(conn: Conn) -> None:
    with pytest.raises(SeedError, match=r"no table topic_v2 or topics; .* Name the one that does"):
        adopt(conn)
    with pytest.raises(SeedError, match="'nowhere' does not hold"):
        adopt(conn, schema="nowhere")
    with pytest.raises(SeedError, match=r"record_batch_events has no column .*, s3_key, processed"):
        adopt(conn, schema="tidemark")
    conn.execute(NUMBERED)
    conn.execute("alter table seed.record_batches drop column partition, drop column end_offset")
    conn.execute("drop table seed.record_batch_events")
    said = "no table record_batch_events; seed.record_batches has no column partition, n_records"
    assert unchanged(conn, SeedError, said)


ODD: dict[str, tuple[LiteralString, str]] = {
    "gap": (
        "delete from seed.record_batches where s3_key = 'o1'",
        "t/0: offsets are missing: .* 10, and the next one .* 20",
    ),
    "overlap": (
        "insert into seed.record_batches values (default, 1, 0, 20, 40, 'o9', 0)",
        "t/0: offsets were given twice: the batch before ends at (30|40), and the next one begins at 20",
    ),
    "end": ("update seed.topic_partitions set end_offset = 50", "t/0: the log ends at 50, and its last batch at 40"),
    "no batch": (
        "update seed.topic_partitions set end_offset = 10",
        "t/0: the log ends at 10, and its last batch at 40",
    ),
    "null key": (
        "update seed.record_batches set s3_key = null where s3_key = 'o1'",
        "at offset 10 has .* object key NULL",
    ),
    "empty key": (
        "update seed.record_batch_events set s3_key = ''",
        "t/0: an unprocessed event has n_records 5, object key ''",
    ),
    "null offset": ("update seed.record_batches set start_offset = null where s3_key = 'o2'", "at offset NULL"),
    "null records": ("update seed.record_batch_events set n_records = null", "n_records NULL"),
    "negative": ("update seed.record_batch_events set n_records = -1", "n_records -1"),
    "too many": ("update seed.record_batch_events set n_records = 2147483648", "n_records 2147483648"),
    "null end": ("update seed.topic_partitions set end_offset = null", "t/0: the log cannot hold 0 to NULL"),
    "ends early": ("update seed.topic_partitions set start_offset = 60", "t/0: the log cannot hold 60 to 40"),
    "microseconds": (
        "update seed.record_batches set max_timestamp = 1700000000000000",
        "max_timestamp 1700000000000000",
    ),
    "partition": (
        "insert into seed.topic_partitions values (1, 2, 0, 0)",
        "'t' has 2 partitions, numbered 0 to 2: .* 0 to 1",
    ),
    "doubled": ("insert into seed.topic_partitions values (1, 0, 0, 0)", "'t' has 2 partitions, numbered 0 to 0"),
    "null partition": ("update seed.topic_partitions set partition = null", "topic 't' has no partition"),
    "no partition": ("insert into seed.topics values (2, 'u')", "topic 'u' has no partition"),
    "no topic": ("delete from seed.topics", "3 batches of topic id 1, partition 0, which do not exist together"),
    "null topic": ("update seed.record_batches set topic_id = null", "3 batches of topic id NULL, partition 0"),
    "lost events": (
        "update seed.record_batch_events set partition = 7",
        "1 unprocessed events of topic id 1, partition 7",
    ),
    "lost partition": ("insert into seed.topic_partitions values (7, 0, 0, 0)", "1 partitions of topic id 7"),
    "name": ("update seed.topics set name = 'a b'", "topic 'a b' has no legal name"),
    "null name": ("update seed.topics set name = null", "has no legal name"),
    "same name": ("insert into seed.topics values (2, 't')", "topics 't', 't' have names that differ in nothing"),
    "huge object": (
        "insert into seed.record_batch_events (topic_id, partition, n_records, s3_key) select 1, 0, 1, 'o1' from n",
        "object 'o1' has 65537 batches, more than 65536",
    ),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("dry_run", [True, False])
def test_odd_data(conn: Conn, name: str, dry_run: bool) -> None:  # noqa: FBT001
    """A named error says where; nothing is written."""
    damage, said = ODD[name]
    conn.execute("create view n as select generate_series(1, 65536)")
    numbered(conn, "0-10 10-20 20-40", end=40, pending="5")
    conn.execute(damage)
    assert unchanged(conn, SeedError, said, dry_run=dry_run)


def test_the_largest_object(conn: Conn) -> None:
    """65,536 batches, in two partitions and of both kinds."""
    numbered(conn, "0-10 10-20 20-40", end=40)
    conn.execute("""
        update seed.record_batches set s3_key = 'large';
        insert into seed.topic_partitions values (1, 1, 0, 40000);
        insert into seed.record_batches (topic_id, partition, start_offset, end_offset, s3_key)
        select 1, 1, g, g + 1, 'large' from generate_series(0, 39999) g;
        insert into seed.record_batch_events (topic_id, partition, n_records, s3_key)
        select 1, 1, 1, 'large' from generate_series(1, 25533)""")
    adopt(conn, schema="seed")
    ids = ids_of(conn)
    while materialize(conn, ids).backlog_partition_ids:
        pass
    assert [head(conn, p) for p in ids] == [(0, 40), (0, 65533)]
    assert conn.execute("select batches, batch_counts from tidemark.objects").fetchall() == [(65536, [3, 65533])]
    assert sound(conn)


def test_a_database_in_another_cluster(conn: Conn) -> None:
    seed(conn)
    conn.execute("update tidemark.cluster set system_identifier = 4711")
    assert unchanged(conn, ForeignClusterError, "celery -A tasks rebase")


DAMAGE: dict[str, LiteralString] = {
    "offset": "update tidemark.runs set start_offset = start_offset + 1 where start_offset = 0",
    "records": "update tidemark.record_batch_events set n_records = n_records + 1 where tx = 3",
    "key": "update tidemark.objects set key = key || 'x'",
    "range": "update tidemark.record_batch_events set byte_offset = 7 where tx = 3",
    "timestamp": "update tidemark.record_batch_events set max_timestamp = 7 where tx = 3",
    "lost": "delete from tidemark.record_batch_events where tx = 3",
    "pending": "update tidemark.record_batch_events set n_records = 77 where tx > 170",
    "pending order": "update tidemark.record_batch_events set tx = -tx where tx > 170",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_copy_that_differs(conn: Conn, connect: Connect, name: str) -> None:
    seed(conn)
    other = connect()

    def damage(done: int, total: int) -> None:
        if done == 1100:
            other.execute(DAMAGE[name])

    with pytest.raises(AdoptDifferenceError, match=r"topic-\d/\d: the (seed|log) has (a batch at offset|event) \d+"):
        adopt(conn, schema="seed", watch=damage)
    assert ids_of(conn) == []


# --- The statements, and the command


def test_by_hand_in_psql(conn: Conn, database_url: str) -> None:
    """Every statement runs as it stands, in the order of the module."""
    seed(conn)
    text = {name: sql.decode() for name, sql in statements().items()}
    found = text["find_seed"].replace("$1::text", "'seed'")
    whole = r"\bind 0 2000 \g"
    script = [
        text["find_seed"] + r" \bind seed \g",
        f"select f.lock from ({found}) f" + r" \gexec",
        f"select f.view from ({found}) f" + r" \gexec",
        *(
            text[name] + ";"
            for name in (
                *("adopt_settings", "adopt_reading", "create_seed_rows", "create_seed_figures", "find_seed_problems"),
                *(
                    "reserve_partitions",
                    "adoption_state",
                    "compare_seed",
                    "load_batches",
                    "load_objects",
                    "index_batches",
                ),
                *("index_objects", "analyze_batches", "find_row_problems", "adopted_upto"),
            )
        ),
        text["adoption_room"] + r" \bind 100 \g",
        text["copy_objects"] + whole,
        text["copy_events"] + whole,
        text["check_adopted"] + whole,
        *(
            text[name] + ";"
            for name in (
                *("publish_topics", "publish_partitions", "publish_starts", "publish_empty", "complete_adoption"),
                *("discard_partitions", "discard_temporary"),
            )
        ),
        text["discard_events"] + r" \bind 1 1 1 \g",
        text["lock_adoption"] + r" \bind 1 \g",
        text["unlock_adoption"] + r" \bind 1 \g",
    ]
    done = subprocess.run(
        [wheel_bin() / "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", database_url],
        input="begin;\n" + "\n".join(script) + "\ncommit;\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert log(conn) == seed_log(conn)
    assert sound(conn)


def test_the_command(cli: Cli, conn: Conn) -> None:
    program = load("adopt")
    assert cli(program, "--discard").out == "taken back: 0 batches\n"
    seed(conn)
    what = "2 topics, 6 partitions, 1,000 batches, 100 events without an offset"
    assert cli(program, "--schema", "seed", "--dry-run").out == f"can be adopted: {what}\nnothing was written\n"
    assert [rows for rows in written(conn) if rows] == []
    said = f"adopted: {what}\n1,100 batches copied now, all compared with the seed's\n"
    assert cli(program, "--schema", "seed").out == said
    assert cli(program, "--schema", "seed", "--json").json == {
        **asdict(Adoption(topics=2, partitions=6, batches=1000, pending=100, complete=True)),
        "dry_run": False,
    }
    done = f"nothing to do, all that schema seed holds is adopted: {what}\n"
    assert cli(program, "--schema", "seed").out == done
    assert cli(program, "--schema", "seed", "--dry-run").out == done
    assert "Error: schema 'public' does not hold the seed's tables" in cli(program, code=1).err
    assert json.loads(cli(program, "--json", code=1).err)["code"] == "SeedError"
    assert "exclude each other" in cli(program, "--discard", "--dry-run", code=2).err


# --- An offset given by hand


def begin_at(conn: Conn, partition_id: int | None, offset: int | None) -> None:
    conn.execute("select tidemark.begin_at(%s::int, %s::bigint)", (partition_id, offset))


def listed(conn: Conn, p: int) -> list[Any]:
    """The start, the end, what has the greatest timestamp, what is at or after 500."""
    return [
        offset
        for (offset,) in conn.execute(
            "select log_offset from tidemark.list_offsets(array_fill(%s::int, '{4}'), '{-2,-1,-3,500}')", (p,)
        ).fetchall()
    ]


@pytest.mark.parametrize("strategy", ["incremental", "window"])
@pytest.mark.parametrize("waiting", [False, True])
def test_begins_at_an_offset(conn: Conn, connect: Connect, strategy: Strategy, waiting: bool) -> None:  # noqa: FBT001
    """Also where a commit waits already, and where one is under way."""
    create_topic(conn, "t", 2)
    p, q = partition_ids(conn, "t")
    late = connect(autocommit=False)
    commit(late, "late", [p], records=2)
    if waiting:
        commit(conn, "waiting", [p, q], records=3, timestamp=1000)
    begin_at(conn, p, 1_000_000)
    assert head(conn, p) == (1_000_000, 1_000_000)
    assert listed(conn, p) == [1_000_000, 1_000_000, None, None]
    assert fetch_batches(conn, p, 1_000_000) == []
    for wrong in (0, 999_999, 1_000_001):
        with pytest.raises(TidemarkError, match="holds 1000000 to 1000000"):
            fetch_batches(conn, p, wrong)
    assert sound(conn)
    assert conn.execute("select tidemark.delete_records(%s, -1)", (p,)).fetchone() == (1_000_000,)
    assert retain(conn).deleted == 0
    state = describe_partitions(conn)[0]
    assert (state.start_offset, state.end_offset, state.byte_size, state.backlog) == (
        1_000_000,
        1_000_000,
        0,
        int(waiting),
    )
    commit(conn, "first", [p, q], records=5, timestamp=1000)
    materialize(conn, [p, q], strategy=strategy)
    late.commit()
    while materialize(conn, [p, q], strategy=strategy).events_processed:
        pass
    assert [(b.start_offset, b.object_key) for b in fetch_batches(conn, p, 1_000_000)] == (
        [(1_000_000, "waiting"), (1_000_003, "first"), (1_000_008, "late")]
        if waiting
        else [(1_000_000, "first"), (1_000_005, "late")]
    )
    assert head(conn, q) == (0, 8 if waiting else 5)
    assert listed(conn, p)[2:] == [1_000_000, 1_000_000]
    assert sound(conn)
    conn.execute("update tidemark.topics set retention_bytes = 0")
    retain(conn)
    assert head(conn, p) == (1_000_010, 1_000_010) if waiting else (1_000_007, 1_000_007)
    assert sound(conn)
    # The run that stood for what lies before it is gone with the first ones.
    assert conn.execute("select min(start_offset) from tidemark.runs where partition_id = %s", (p,)).fetchone() != (0,)


def test_begins_at_zero(conn: Conn) -> None:
    create_topic(conn, "t", 1)
    (p,) = partition_ids(conn, "t")
    begin_at(conn, p, 0)
    assert conn.execute("select count(*) from tidemark.runs").fetchone() == (0,)
    begin_at(conn, p, 5)
    assert head(conn, p) == (5, 5)


def test_cannot_begin_at(conn: Conn, connect: Connect) -> None:
    create_topic(conn, "t", 3)
    p, q, r = partition_ids(conn, "t")
    commit(conn, "a", [p])
    materialize(conn, [p])
    begin_at(conn, q, 10)
    for partition_id, offset, state, said in (
        (p, 10, "TM015", "has had offsets up to 1 already"),
        (q, 20, "TM015", "has had offsets up to 10 already"),
        (r, -1, "TM007", "cannot begin at offset -1"),
        (r, None, "TM007", "cannot begin at offset NULL"),
        # Beyond it no room is left for a log.
        (r, 2**62 + 1, "TM007", "cannot begin at offset 4611686018427387905"),
        (0, 10, "TM003", "partition id 0 does not exist"),
        (None, 10, "TM003", "partition id NULL does not exist"),
    ):
        with pytest.raises(errors.DatabaseError, match=said) as raised:
            begin_at(conn, partition_id, offset)
        assert raised.value.sqlstate == state
    strict = connect(autocommit=False)
    strict.execute("set transaction isolation level repeatable read")
    with pytest.raises(errors.ActiveSqlTransaction, match="wait for the lock"):
        begin_at(strict, r, 10)
