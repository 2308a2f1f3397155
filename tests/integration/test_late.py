"""Late transactions of every size, under limits of every kind, in the middle of everything else."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import cycle, groupby
from typing import Any

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.rows import TupleRow

from config.settings import STRATEGIES, Strategy
from db.commit import commit_object
from db.fetch import fetch_batches
from db.materialize import materialize
from tests.integration.conftest import make_topic
from tests.servers import PostgresServer
from tests.support import Connect

RUN = 64
SIZES = [1, 63, 64, 65, 128, 200, 1000]
LIMITS = [1, 2, 63, 64, 65, 100, 1000]

Event = tuple[str, int]


@pytest.fixture(scope="module")
def database_url(postgres_server: PostgresServer, template_database: str) -> Iterator[str]:
    """One for all of this module's tests, each of which has a topic of its own."""
    name = sql.Identifier("test_late")
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {} template {}").format(name, sql.Identifier(template_database)))
        yield postgres_server.url("test_late")
        admin.execute(sql.SQL("drop database {} with (force)").format(name))


@pytest.fixture
def ids(conn: Connection[TupleRow], request: pytest.FixtureRequest) -> list[int]:
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return make_topic(conn, name, partitions=2)


class Log:
    """A partition, what is committed to it, and each pass held against what may be in it."""

    def __init__(self, conn: Connection[Any], ids: Sequence[int]) -> None:
        self.conn = conn
        self.ids = ids
        self.strategies: cycle[Strategy] = cycle(STRATEGIES)
        self.placed: list[Event] = []
        # What is visible and has no offset yet.
        self.late: dict[str, int] = {}
        self.main: dict[str, int] = {}

    def send(self, conn: Connection[Any], name: str, count: int) -> None:
        """A second partition gets every other batch: a transaction's events do not stand alone in its range of ids."""
        partitions = [i for _ in range(count) for i in self.ids]
        key = f"{self.ids[0]}/{name}"
        total = len(partitions)
        commit_object(conn, key, partitions, [3] * total, [n // 2 for n in range(total)], [1] * total, [0] * total)

    def commit(self, name: str, count: int) -> None:
        self.send(self.conn, name, count)
        self.main[name] = count

    def end_late(self, conn: Connection[Any], name: str, count: int) -> None:
        conn.commit()
        self.late[name] = count

    def place(self, limit: int) -> int:
        before = 3 * len(self.placed)
        waiting, late = sum(self.late.values()) + sum(self.main.values()), sum(self.late.values())
        done = materialize(self.conn, self.ids[:1], events_per_partition=limit, strategy=next(self.strategies))
        rows: list[tuple[str, int, int]] = self.conn.execute(
            "select split_part(object_key, '/', 2), byte_offset, start_offset from tidemark.record_batches "
            "where partition_id = %s and run_start_offset >= %s order by start_offset",
            (self.ids[0], before),
        ).fetchall()
        assert done.events_processed == len(rows) == min(limit, waiting)
        assert (self.ids[0] in done.backlog_partition_ids) == (waiting > limit)
        assert [row[2] for row in rows] == list(range(before, before + 3 * len(rows), 3))
        # Nothing of the main range while a late one is left.
        taken = min(late, limit)
        assert {row[0] for row in rows[:taken]} <= self.late.keys()
        assert {row[0] for row in rows[taken:]} <= self.main.keys()
        for name, _, _ in rows:
            left = self.late if name in self.late else self.main
            left[name] -= 1
        self.placed += [row[:2] for row in rows]
        return len(rows)

    def drain(self, limit: int) -> None:
        while self.place(limit):
            pass

    def check(self, expected: dict[str, int]) -> None:
        """Exactly once, each transaction in its order, in runs that are short and say what they hold."""
        assert Counter(name for name, _ in self.placed) == expected
        for name, count in expected.items():
            assert [position for other, position in self.placed if other == name] == list(range(count))
        offset = 0
        runs = self.conn.execute(
            "select r.start_offset, r.end_offset, r.batches, r.end_bytes, count(*), sum(e.n_records), "
            "min(e.start_offset) "
            "from tidemark.runs r cross join lateral tidemark.run_events(r) e "
            "where r.partition_id = %s group by r.partition_id, r.start_offset order by 1",
            self.ids[:1],
        ).fetchall()
        for start, end, batches, end_bytes, events, records, first in runs:
            assert (start, first, events, records) == (offset, offset, batches, end - start)
            assert (end_bytes, batches <= RUN) == (end // 3, True)
            offset = end
        assert offset == 3 * len(self.placed)
        fetched = fetch_batches(self.conn, self.ids[0], 0, max_batches=100_000)
        assert [(b.object_key.split("/")[1], b.byte_offset) for b in fetched] == self.placed


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("size", SIZES)
def test_late_in_the_middle_of_everything(
    size: int, limit: int, conn: Connection[TupleRow], connect: Connect, ids: list[int]
) -> None:
    log = Log(conn, ids)
    first, second, third = (connect(autocommit=False) for _ in range(3))
    other = size // 2 + 1
    for writer, name, count in ((first, "first", size), (second, "second", other), (third, "third", 2)):
        log.send(writer, name, count)
    log.commit("a", 70)
    log.commit("b", 70)
    # Stops inside of a main transaction, where the limit is small.
    log.place(limit)
    log.end_late(second, "second", other)
    log.commit("c", 1)
    log.place(limit)
    # One that lies before the one that is being placed.
    log.end_late(first, "first", size)
    log.place(limit)
    log.commit("d", 65)
    log.drain(limit)
    log.end_late(third, "third", 2)
    log.drain(limit)
    log.check({"first": size, "second": other, "third": 2, "a": 70, "b": 70, "c": 1, "d": 65})
    # The main transaction that was cut goes on where it was.
    order = [name for name, _ in groupby(name for name, _ in log.placed if name in "abcd")]
    assert order == ["a", "b", "c", "d"]


def test_the_late_one_that_was_begun_goes_first(conn: Connection[TupleRow], connect: Connect, ids: list[int]) -> None:
    """Then those that ended meanwhile, lower ones too; the order is that of their transactions otherwise."""
    log = Log(conn, ids)
    writers = [connect(autocommit=False) for _ in range(3)]
    for number, writer in enumerate(writers):
        log.send(writer, f"late {number}", 5)
    log.commit("main", 3)
    log.place(2)
    log.end_late(writers[1], "late 1", 5)
    log.place(2)
    for number in (2, 0):
        log.end_late(writers[number], f"late {number}", 5)
    log.drain(2)
    expected = [("main", 2), ("late 1", 5), ("late 0", 5), ("late 2", 5), ("main", 1)]
    assert [(name, len(list(same))) for name, same in groupby(name for name, _ in log.placed)] == expected
    log.check({"main": 3, "late 0": 5, "late 1": 5, "late 2": 5})


def test_a_late_transaction_of_many_commits_gets_through(
    conn: Connection[TupleRow], connect: Connect, ids: list[int]
) -> None:
    """Its limit holds for it too, so a pass ends in time; first-edition passes took it whole, or nothing of it."""
    worker = connect()
    worker.execute("set statement_timeout = '1s'")
    with connect(autocommit=False) as late:
        for number in range(40):
            commit_object(late, f"{ids[0]}/{number}", ids[:1] * 1000, [1] * 1000, range(1000), [1] * 1000, [0] * 1000)
        commit_object(conn, f"{ids[0]}/main", ids[:1], [1], [0], [1], [0])
        assert materialize(conn, ids).events_processed == 1
        late.commit()
    commit_object(conn, f"{ids[0]}/next", ids[:1], [1], [0], [1], [0])
    for left in range(40_001, 0, -2_000):
        done = materialize(worker, ids, events_per_partition=2_000)
        assert done.events_processed == min(left, 2_000)
        assert done.backlog_partition_ids == ((ids[0],) if left > 2_000 else ())
    assert materialize(worker, ids).events_processed == 0
    count = conn.execute(
        "select count(*), max(r.batches), max(r.end_offset), max(cardinality(r.late)) "
        "from tidemark.runs r where partition_id = %s",
        ids[:1],
    ).fetchone()
    assert count == (1 + 20 * 32 + 1, RUN, 40_002, 1)


def test_a_pass_of_many_late_transactions_writes_no_more_than_its_runs(
    conn: Connection[TupleRow], connect: Connect, ids: list[int]
) -> None:
    """What is left to place stands in the last run of a pass alone: in each, it would grow with their square."""
    log = Log(conn, ids)
    with ExitStack() as stack:
        writers = [stack.enter_context(connect(autocommit=False)) for _ in range(30)]
        for number, writer in enumerate(writers):
            log.send(writer, f"late {number}", 1)
        log.commit("main", 1)
        log.place(10)
        for number, writer in enumerate(writers):
            log.end_late(writer, f"late {number}", 1)
    log.place(10)
    lengths = "select array_agg(cardinality(late) order by start_offset) from tidemark.runs where partition_id = %s"
    assert conn.execute(lengths, ids[:1]).fetchone() == ([*[None] * 10, 21],)
    log.drain(10)
    log.check({"main": 1, **{f"late {number}": 1 for number in range(30)}})
