"""Every strategy writes the same runs, whatever arrived late, whatever the limit."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.settings import STRATEGIES, Strategy
from db.commit import commit_object
from db.materialize import MaterializationMetrics, materialize
from db.migrate import upgrade
from tests.integration.conftest import make_topic
from tests.servers import PostgresServer
from tests.support import Connect

PARTITIONS = 3


@pytest.fixture(scope="module")
def database_url(server_directory: Path, postgres_bin: Path | None) -> Iterator[str]:
    """A server on which nothing else takes a transaction id, as autovacuum would."""
    settings = {"fsync": "off", "autovacuum": "off"}
    with PostgresServer(server_directory / "strategies", bin_dir=postgres_bin, settings=settings).start() as server:
        upgrade(server.url())
        yield server.url()


@dataclass(frozen=True)
class Open:
    """A transaction that commits an object and stays open; `End` ends it."""

    writer: int
    partitions: Sequence[int]


@dataclass(frozen=True)
class End:
    writer: int
    commit: bool = True


@dataclass(frozen=True)
class Place:
    partitions: Sequence[int]
    limit: int


Step = Open | End | Place

CASES: dict[str, list[Step]] = {
    "nothing pending": [Place([0, 1, 2], 5)],
    "one event": [Open(0, [1]), End(0), Place([0, 1, 2], 5)],
    "fewer than the limit": [Open(0, [0, 0, 1]), End(0), Place([0, 1, 2], 5), Place([0, 1, 2], 5)],
    "exactly the limit": [Open(0, [0, 0, 0]), End(0), Place([0], 3), Place([0], 3)],
    "one more than the limit": [Open(0, [0, 0, 0, 0]), End(0), Place([0], 3), Place([0], 3)],
    "a limit of one": [Open(0, [0, 1, 0, 1, 0]), End(0), *[Place([0, 1], 1)] * 4],
    "a late transaction": [
        Open(0, [0, 0]), Open(1, [0, 1]), End(1), Place([0, 1], 5), End(0), Place([0, 1], 5), Place([0, 1], 5),
    ],
    "nothing but late events": [Open(0, [2]), Open(1, [2]), End(1), Place([2], 5), End(0), Place([2], 5)],
    "late events above the limit": [
        Open(0, [0] * 4), Open(1, [0]), End(1), Place([0], 2), End(0), Open(1, [0] * 3), End(1),
        Place([0], 2), Place([0], 2),
    ],
    "a late transaction that rolls back": [
        Open(0, [0]), Open(1, [0]), End(1), Place([0], 5), End(0, commit=False), Place([0], 5),
    ],
    "two late ones, the second first": [
        Open(0, [0]), Open(1, [0]), Open(2, [0]), End(2), Place([0], 5), End(1), Place([0], 5), End(0), Place([0], 5),
    ],
    "still open across a cut": [
        Open(0, [0, 0]), Open(1, [0] * 4), End(1), Place([0], 2), End(0), Place([0], 1), Place([0], 9),
    ],
    "as long as a run, and one more": [Open(0, [0] * 64 + [1] * 65), End(0), Place([0, 1], 200), Place([0, 1], 200)],
    "cut at a run, then inside": [Open(0, [0] * 300), End(0), Place([0], 128), Place([0], 100), Place([0], 200)],
    "runs of several transactions": [
        *[step for _ in range(5) for step in (Open(0, [0] * 30), End(0))], Place([0], 100), Place([0], 100),
    ],
    "a late one longer than the limit, a lower one ends meanwhile": [
        Open(0, [0] * 70), Open(1, [0] * 200), Open(2, [0] * 3), End(2), Place([0], 2), End(1), Place([0], 65),
        End(0), Place([0], 65), Place([0], 64), Open(2, [0] * 65), End(2), *[Place([0], 63)] * 5,
    ],
    "all of the limit taken by late ones": [
        Open(0, [0] * 5), Open(1, [0] * 5), Open(2, [0]), End(2), Place([0], 9), End(0), End(1), Open(2, [0]), End(2),
        Place([0], 10), Place([0], 10),
    ],
    "running beside the run, in it and before it": [
        Open(0, [1]), Open(1, [0]), End(1), Open(1, [1]), Open(2, [0]), End(2), Open(3, [1]), Place([0], 9),
        Open(2, [0]), End(2), Place([0], 9), End(1), End(3), End(0), Open(2, [0]), End(2), Place([0, 1], 9),
    ],
}  # fmt: skip


def random_case(seed: int) -> list[Step]:
    chance = random.Random(seed)
    steps: list[Step] = []
    running: set[int] = set()
    for _ in range(60):
        writer = chance.randrange(4)
        if chance.random() < 0.3:
            some = chance.sample(range(PARTITIONS), chance.randint(1, PARTITIONS))
            steps.append(Place(some, chance.choice([1, 2, 3, 63, 64, 65, 100])))
        elif writer in running:
            running.remove(writer)
            steps.append(End(writer, commit=chance.random() < 0.8))
        else:
            running.add(writer)
            some = list(range(PARTITIONS)) if chance.random() < 0.8 else [chance.randrange(PARTITIONS)]
            steps.append(Open(writer, chance.choices(some, k=chance.choice([1, 2, 6, 6, 6, 64, 150]))))
    steps += [End(writer) for writer in running]
    return [*steps, *[Place(range(PARTITIONS), 200)] * 10]


def play(
    conn: Connection[TupleRow], connect: Connect, steps: Sequence[Step], strategy: Strategy
) -> tuple[list[TupleRow], ...]:
    """Batches, runs, passes, and what each materialization reported.

    All strategies play in one database, one after the other, on a topic each; so every id is taken relative to the
    strategy's first one.
    """
    name = uuid4().hex
    ids = make_topic(conn, name, partitions=PARTITIONS)
    writers = [connect(autocommit=False) for _ in range(4)]
    with writers[0].transaction():
        first = (
            writers[0]
            .execute(
                "select tidemark.tx_base() + pg_current_xact_id()::text::bigint as tx, "
                "nextval('tidemark.objects_id_seq') << 16 as id"
            )
            .fetchone()
        )
    assert first
    keys = 0
    reports: list[TupleRow] = []
    for step in steps:
        match step:
            case Open(writer, partitions):
                keys += 1
                count = len(partitions)
                commit_object(
                    writers[writer], f"{name}-{keys}", [ids[p] for p in partitions], range(1, count + 1),
                    [keys * 1000 + n for n in range(count)], [10] * count, [0] * count,
                )  # fmt: skip
            case End(writer, commit):
                if commit:
                    writers[writer].commit()
                else:
                    writers[writer].rollback()
            case Place(partitions, limit):
                done = materialize(conn, [ids[p] for p in partitions], events_per_partition=limit, strategy=strategy)
                reports.append(report(done, ids))
    batches = conn.execute(
        "select partition_id - %s, start_offset, n_records, byte_offset, byte_length from tidemark.record_batches "
        "where partition_id = any(%s) order by 1, 2",
        (ids[0], ids),
    ).fetchall()
    parameters = {"id": first[1], "tx": first[0], "partition": ids[0], "ids": ids}
    runs = conn.execute(
        "select partition_id - %(partition)s, start_offset, end_offset, end_bytes, max_timestamp, first_tx - %(tx)s, "
        "last_tx - %(tx)s, first_id - %(id)s, last_id - %(id)s, seen_tx - %(tx)s, "
        "case when seen_id < 9223372036854775807 then seen_id - %(id)s end, pass_tx - %(tx)s, batches, "
        "case when skipped is not null then array(select x - %(tx)s from unnest(skipped) x) end, "
        "case when late is not null then array(select x - %(tx)s from unnest(late) x) end "
        "from tidemark.runs where partition_id = any(%(ids)s) order by 1, 2",
        parameters,
    ).fetchall()
    passes = conn.execute(
        "select tx - %(tx)s, array(select x - %(tx)s from unnest(in_flight) x) from tidemark.passes "
        "where tx >= %(tx)s order by 1",
        parameters,
    ).fetchall()
    return batches, runs, passes, reports


def report(done: MaterializationMetrics, ids: Sequence[int]) -> TupleRow:
    backlog = sorted(ids.index(i) for i in done.backlog_partition_ids)
    moved = sorted((ids.index(m.partition_id), m.events, m.records, m.log_bytes, m.runs) for m in done.moved)
    return (done.events_processed, done.partitions_processed, done.records, done.log_bytes, backlog, moved)


@pytest.mark.parametrize("name", CASES)
def test_same_offsets(name: str, conn: Connection[TupleRow], connect: Connect) -> None:
    first, *others = [play(conn, connect, CASES[name], strategy) for strategy in STRATEGIES]
    assert others == [first] * len(others)


@pytest.mark.parametrize("seed", range(12))
def test_same_offsets_at_random(seed: int, conn: Connection[TupleRow], connect: Connect) -> None:
    steps = random_case(seed)
    first, *others = [play(conn, connect, steps, strategy) for strategy in STRATEGIES]
    assert others == [first] * len(others)
    placed = sum(entry[0] for entry in first[3])
    assert placed == len(first[0]) > 0
    assert sum(run[12] for run in first[1]) == placed


def test_metrics_name_the_strategy(conn: Connection[TupleRow]) -> None:
    ids = make_topic(conn, partitions=1)
    assert [materialize(conn, ids, strategy=strategy).strategy for strategy in STRATEGIES] == list(STRATEGIES)
