"""Property test: materialize against a model small enough to be believed.

The machine drives open transactions, rollbacks, savepoints, replays, several materializers and readers in one thread,
so every interleaving it finds can be replayed. The model knows the order of events and what is committed; from that it
predicts the whole log after each materialization, batch by batch.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any
from uuid import uuid4

import psycopg
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from psycopg import Connection
from psycopg.rows import TupleRow

from config.settings import STRATEGIES
from db.commit import commit_object
from db.discover import find_committed, save_fan_out, sweep
from db.fetch import fetch_batches
from db.materialize import materialize
from db.topics import create_topic, partition_ids

PRODUCERS = 4
MATERIALIZERS = 3
PARTITIONS = 3

# No run has more batches.
RUN = 64

# A batch: which of the topic's partitions, and how many records. Some objects are longer than a run.
batch = st.tuples(st.integers(0, PARTITIONS - 1), st.integers(1, 9))
batches = st.one_of(
    *[st.lists(batch, min_size=1, max_size=size) for size in (2, 4, 6, 8)],
    st.builds(lambda one, count: [one] * count, batch, st.sampled_from([RUN - 1, RUN, RUN + 1, 2 * RUN, 200])),
)


@dataclass(frozen=True)
class Event:
    """Ordered as offsets are: by transaction, then by position in it."""

    tx: int
    sequence: int
    partition: int
    n_records: int
    key: str
    position: int

    @property
    def order(self) -> tuple[int, int]:
        return self.tx, self.sequence


@dataclass
class Transaction:
    tx: int
    began: int
    events: list[Event] = field(default_factory=list)
    objects: list[tuple[str, list[tuple[int, int]], int]] = field(default_factory=list)


class Materialization(RuleBasedStateMachine):
    """One topic of its own for each example; the connections are shared."""

    url: str
    connections: list[Connection[Any]]
    # What the examples brought about: a machine that never meets a late commit would prove nothing.
    met: Counter[str]
    CASES = ("late", "both", "cut", "open", "cut_late", "resumed", "fetched")

    def __init__(self) -> None:
        super().__init__()
        self.producers = self.connections[:PRODUCERS]
        self.materializers = self.connections[PRODUCERS : PRODUCERS + MATERIALIZERS]
        self.observer = self.connections[-1]
        self.clock = 0
        self.sequence = 0
        self.open: dict[int, Transaction] = {}
        # By key: content and the id returned.
        self.committed: dict[str, tuple[list[tuple[int, int]], int]] = {}
        self.visible: list[Event] = []
        self.logs: list[list[Event]] = [[] for _ in range(PARTITIONS)]
        self.cursors: list[tuple[int, int]] = [(0, 0)] * PARTITIONS
        # (began, returned) of each object's transaction.
        self.times: dict[str, tuple[int, int]] = {}

    @initialize()
    def create(self) -> None:
        # What other examples left pending is not this one's concern.
        name = uuid4().hex
        create_topic(self.observer, name, PARTITIONS)
        self.ids = partition_ids(self.observer, name)

    def teardown(self) -> None:
        for number in list(self.open):
            self.producers[number].execute("rollback")
        self.open.clear()

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def send(self, conn: Connection[Any], key: str, content: list[tuple[int, int]]) -> int:
        count = len(content)
        return commit_object(
            conn,
            key,
            [self.ids[partition] for partition, _ in content],
            [records for _, records in content],
            range(count),
            [1] * count,
            [0] * count,
        )

    def events_of(self, tx: int, key: str, content: list[tuple[int, int]]) -> list[Event]:
        events = []
        for position, (partition, records) in enumerate(content):
            self.sequence += 1
            events.append(Event(tx, self.sequence, partition, records, key, position))
        return events

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One rule that chooses by itself: of several, hypothesis leaves some out of each example (swarm testing),
        and a late commit takes nearly all of them in the right order."""
        steps: list[Callable[[st.DataObject], None]] = [self.commit_alone, self.commit_alone]
        steps += [self.materialize, self.materialize, self.fetch, self.discover]
        if len(self.open) < PRODUCERS:
            steps += [self.begin, self.begin]
        if self.open:
            steps += [self.commit_in_transaction, self.end, self.end]
        if self.committed:
            steps.append(self.replay)
        data.draw(st.sampled_from(steps))(data)

    def begin(self, data: st.DataObject) -> None:
        """The transaction gets its id now; its events come at once, or much later."""
        number = min(set(range(PRODUCERS)) - self.open.keys())
        conn = self.producers[number]
        began = self.tick()
        conn.execute("begin")
        row = conn.execute("select tidemark.tx_base() + pg_current_xact_id()::text::bigint").fetchone()
        assert row
        self.open[number] = Transaction(tx=row[0], began=began)
        if data.draw(st.booleans()):
            self.send_in(number, data.draw(batches))

    def commit_in_transaction(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        if data.draw(st.sampled_from([False, False, True])):
            with self.producers[number].transaction(force_rollback=True):
                self.send(self.producers[number], uuid4().hex, data.draw(batches))
        else:
            self.send_in(number, data.draw(batches))

    def send_in(self, number: int, content: list[tuple[int, int]]) -> None:
        transaction = self.open[number]
        key = uuid4().hex
        object_id = self.send(self.producers[number], key, content)
        transaction.events += self.events_of(transaction.tx, key, content)
        transaction.objects.append((key, content, object_id))

    def end(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.open)))
        transaction = self.open.pop(number)
        kept = data.draw(st.sampled_from([True, True, True, False]))
        self.producers[number].execute("commit" if kept else "rollback")
        if kept:
            self.visible += transaction.events
            returned = self.tick()
            for key, content, object_id in transaction.objects:
                self.committed[key] = (content, object_id)
                self.times[key] = (transaction.began, returned)

    def commit_alone(self, data: st.DataObject) -> None:
        content = data.draw(batches)
        key = uuid4().hex
        began = self.tick()
        object_id = self.send(self.observer, key, content)
        row = self.observer.execute("select tx from tidemark.objects where id = %s", (object_id,)).fetchone()
        assert row
        self.visible += self.events_of(row[0], key, content)
        self.committed[key] = (content, object_id)
        self.times[key] = (began, self.tick())

    def replay(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.committed)))
        content, object_id = self.committed[key]
        conn = self.producers[data.draw(st.sampled_from(sorted(self.open)))] if self.open else self.observer
        assert self.send(conn, key, content) == object_id

    def materialize(self, data: st.DataObject) -> None:
        worker = self.materializers[data.draw(st.integers(0, MATERIALIZERS - 1))]
        chosen = data.draw(st.sets(st.integers(0, PARTITIONS - 1), min_size=1))
        limit = data.draw(st.sampled_from([1, 2, 3, 5, 8, RUN - 1, RUN, RUN + 1, 100, 1000]))
        expected = 0
        backlog = []
        for partition in sorted(chosen):
            log = self.logs[partition]
            placed = set(log)
            pending = [e for e in self.visible if e.partition == partition and e not in placed]
            # Late transactions one after the other, and first the one that the last pass did not place to its end.
            resumed = log[-1].tx if log else 0
            late = sorted(
                (e for e in pending if e.order < self.cursors[partition]), key=lambda e: (e.tx != resumed, e.order)
            )
            fresh = sorted((e for e in pending if e.order > self.cursors[partition]), key=lambda e: e.order)
            taken = (late + fresh)[:limit]
            self.met.update(
                late=len(late),
                both=bool(late and fresh),
                cut=len(fresh) > limit,
                open=len(self.open),
                cut_late=len(late) > limit,
                resumed=bool(late and late[0].tx == resumed),
            )
            log += taken
            expected += len(taken)
            if main := [e for e in taken if e.order > self.cursors[partition]]:
                self.cursors[partition] = main[-1].order
            if len(pending) > limit:
                backlog.append(self.ids[partition])
        strategy = data.draw(st.sampled_from(STRATEGIES))
        metrics = materialize(worker, [self.ids[p] for p in chosen], events_per_partition=limit, strategy=strategy)
        assert metrics.events_processed == expected
        assert list(metrics.backlog_partition_ids) == backlog

    def fetch(self, data: st.DataObject) -> None:
        """From any offset, in any portion: what the model says lies there."""
        partition = data.draw(st.integers(0, PARTITIONS - 1))
        ends = list(accumulate(e.n_records for e in self.logs[partition]))
        offset = data.draw(st.integers(0, ends[-1] if ends else 0))
        limit = data.draw(st.sampled_from([1, 2, 7, RUN, 1000]))
        fetched = fetch_batches(self.observer, self.ids[partition], offset, max_batches=limit)
        first = bisect_right(ends, offset)
        assert [(b.start_offset, b.n_records, b.object_key, b.byte_offset) for b in fetched] == [
            (end - e.n_records, e.n_records, e.key, e.position)
            for end, e in list(zip(ends, self.logs[partition], strict=True))[first : first + limit]
        ]
        self.met.update(fetched=len(fetched))

    def discover(self, _: st.DataObject) -> None:
        """Whatever is visible is found by fan-out, or was found before; the sweep finds what is pending."""
        save_fan_out(self.observer, find_committed(self.observer))
        assert find_committed(self.observer).commits == 0
        waiting = dict.fromkeys(self.ids, 0)
        for event in self.visible:
            waiting[self.ids[event.partition]] += 1
        for partition, log in enumerate(self.logs):
            waiting[self.ids[partition]] -= len(log)
        found = {p.partition_id: p.events for p in sweep(self.observer) if p.partition_id in waiting}
        assert found == {i: count for i, count in waiting.items() if count}

    @invariant()
    def the_log_is_as_predicted(self) -> None:
        if not hasattr(self, "ids"):
            return
        rows = self.observer.execute(
            "select partition_id, start_offset, n_records, object_key, byte_offset from tidemark.record_batches "
            "where partition_id = any(%s) order by 1, 2",
            (self.ids,),
        ).fetchall()
        predicted = []
        for partition, log in enumerate(self.logs):
            offset = 0
            for event in log:
                predicted.append((self.ids[partition], offset, event.n_records, event.key, event.position))
                offset += event.n_records
        assert rows == predicted
        ends = self.observer.execute(
            "select end_offset, end_bytes, seen_tx from tidemark.cursors(%s) order by partition_id", (self.ids,)
        ).fetchall()
        assert ends == [
            (sum(e.n_records for e in log), len(log), cursor[0])
            for log, cursor in zip(self.logs, self.cursors, strict=True)
        ]
        runs = self.observer.execute(
            "select max(batches), bool_and(batches = (select count(*) from tidemark.run_events(r))) "
            "from tidemark.runs r where partition_id = any(%s)",
            (self.ids,),
        ).fetchone()
        assert runs == (None, None) or (runs and runs[0] <= RUN and runs[1])

    @invariant()
    def commits_keep_their_real_time_order(self) -> None:
        """The model's own prediction, too, is checked against the clock."""
        for log in self.logs:
            latest_begin = 0
            for event in log:
                began, returned = self.times[event.key]
                assert returned > latest_begin, f"{event} stands behind a commit that began after it had returned"
                latest_begin = max(latest_begin, began)


def test_materialize_does_what_the_model_says(database_url: str, conn: Connection[TupleRow]) -> None:
    connections = [psycopg.connect(database_url, autocommit=True) for _ in range(PRODUCERS + MATERIALIZERS + 1)]

    class Machine(Materialization):
        url = database_url

    Machine.connections = connections
    Machine.met = Counter()
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=100,
                stateful_step_count=40,
                # Add Phase.shrink to make a failing program small; that takes minutes.
                phases=(Phase.generate,),
                derandomize=True,
                database=None,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        for connection in connections:
            connection.close()
    assert min(Machine.met[case] for case in Machine.CASES) >= 3, Machine.met
