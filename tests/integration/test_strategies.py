"""Every strategy gives the same offsets, whatever arrived late, whatever the limit."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.strategy import STRATEGIES, Strategy
from db.commit import commit_object
from db.materialize import MaterializationMetrics, materialize
from db.topics import create_topic, partition_ids
from tests.support import Connect

PARTITIONS = 3


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
}  # fmt: skip


def random_case(seed: int) -> list[Step]:
    chance = random.Random(seed)
    steps: list[Step] = []
    running: set[int] = set()
    for _ in range(60):
        writer = chance.randrange(4)
        if chance.random() < 0.3:
            some = chance.sample(range(PARTITIONS), chance.randint(1, PARTITIONS))
            steps.append(Place(some, chance.choice([1, 2, 3, 100])))
        elif writer in running:
            running.remove(writer)
            steps.append(End(writer, commit=chance.random() < 0.8))
        else:
            running.add(writer)
            steps.append(Open(writer, chance.choices(range(PARTITIONS), k=chance.randint(1, 6))))
    steps += [End(writer) for writer in running]
    return [*steps, *[Place(range(PARTITIONS), 20)] * 8]


def play(
    conn: Connection[TupleRow], connect: Connect, steps: Sequence[Step], strategy: Strategy
) -> tuple[list[TupleRow], list[TupleRow], list[list[Any]]]:
    """Batches, heads and what each materialization reported; transactions as numbers counted from the first.

    All strategies play in one database, one after the other, on a topic each; so every id is taken relative to the
    strategy's first one.
    """
    create_topic(conn, f"topic-{strategy}", PARTITIONS)
    ids = partition_ids(conn, f"topic-{strategy}")
    writers = [connect(autocommit=False) for _ in range(4)]
    keys = 0
    reports: list[list[Any]] = []
    for step in steps:
        match step:
            case Open(writer, partitions):
                keys += 1
                count = len(partitions)
                commit_object(
                    writers[writer], f"{strategy}-{keys}", [ids[p] for p in partitions], range(1, count + 1),
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
    # The position as the event it stands at, for ids differ.
    heads = conn.execute(
        "select p.id - %s, p.end_offset, p.byte_size, e.byte_offset, "
        "array(select o.key from tidemark.objects o where o.xid = any (p.in_flight)) "
        "from tidemark.topic_partitions p left join tidemark.record_batch_events e "
        "on e.partition_id = p.id and e.xid = p.seen_xid and e.id = p.seen_id where p.id = any(%s) order by 1",
        (ids[0], ids),
    ).fetchall()
    return batches, [(*row[:4], [key.removeprefix(strategy) for key in row[4]]) for row in heads], reports


def report(done: MaterializationMetrics, ids: Sequence[int]) -> list[Any]:
    backlog = sorted(ids.index(i) for i in done.backlog_partition_ids)
    return [done.events_processed, done.partitions_processed, done.records, done.log_bytes, backlog]


@pytest.mark.parametrize("name", CASES)
def test_same_offsets(name: str, conn: Connection[TupleRow], connect: Connect) -> None:
    first, *others = [play(conn, connect, CASES[name], strategy) for strategy in STRATEGIES]
    assert others == [first] * len(others)


@pytest.mark.parametrize("seed", range(12))
def test_same_offsets_at_random(seed: int, conn: Connection[TupleRow], connect: Connect) -> None:
    steps = random_case(seed)
    first, *others = [play(conn, connect, steps, strategy) for strategy in STRATEGIES]
    assert others == [first] * len(others)
    placed = sum(entry[0] for entry in first[2])
    assert placed == len(first[0]) > 0


def test_metrics_name_the_strategy(conn: Connection[TupleRow]) -> None:
    create_topic(conn, "orders", 1)
    ids = partition_ids(conn, "orders")
    assert [materialize(conn, ids, strategy=strategy).strategy for strategy in STRATEGIES] == list(STRATEGIES)
