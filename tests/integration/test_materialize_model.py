"""Property test: materialize against a model small enough to be believed.

The machine drives open transactions, rollbacks, savepoints, replays, several materializers and trim in one thread, so
every interleaving it finds can be replayed. The model knows the order of events and what is committed; from that it
predicts the whole log after each materialization, batch by batch.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import psycopg
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from psycopg import Connection
from psycopg.rows import TupleRow

from db.commit import commit_object
from db.discover import find_committed, save_seen, sweep
from db.materialize import materialize
from db.topics import create_topic, partition_ids
from db.trim import trim

PRODUCERS = 4
MATERIALIZERS = 3
PARTITIONS = 3

# A batch: which of the topic's partitions, and how many records.
batches = st.lists(st.tuples(st.integers(0, PARTITIONS - 1), st.integers(1, 9)), min_size=1, max_size=6)


@dataclass(frozen=True)
class Event:
    """Ordered as offsets are: by transaction, then by position in it."""

    xid: int
    sequence: int
    partition: int
    n_records: int
    key: str
    position: int

    @property
    def order(self) -> tuple[int, int]:
        return self.xid, self.sequence


@dataclass
class Transaction:
    xid: int
    began: int
    events: list[Event] = field(default_factory=list)
    objects: list[tuple[str, list[tuple[int, int]], int]] = field(default_factory=list)


class Materialization(RuleBasedStateMachine):
    """One topic of its own for each example; the connections are shared."""

    url: str
    connections: list[Connection[Any]]
    # What the examples brought about: a machine that never meets a late commit would prove nothing.
    met: Counter[str]

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

    def events_of(self, xid: int, key: str, content: list[tuple[int, int]]) -> list[Event]:
        events = []
        for position, (partition, records) in enumerate(content):
            self.sequence += 1
            events.append(Event(xid, self.sequence, partition, records, key, position))
        return events

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        """One rule that chooses by itself: of several, hypothesis leaves some out of each example (swarm testing),
        and a late commit takes nearly all of them in the right order."""
        steps: list[Callable[[st.DataObject], None]] = [self.commit_alone, self.commit_alone]
        steps += [self.materialize, self.materialize, self.trim, self.fan_out]
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
        row = conn.execute("select pg_current_xact_id()::text::bigint").fetchone()
        assert row
        self.open[number] = Transaction(xid=row[0], began=began)
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
        transaction.events += self.events_of(transaction.xid, key, content)
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
        row = self.observer.execute(
            "select xid::text::bigint from tidemark.objects where id = %s", (object_id,)
        ).fetchone()
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
        limit = data.draw(st.sampled_from([1, 2, 3, 5, 8, 1000]))
        expected = 0
        backlog = []
        for partition in sorted(chosen):
            pending = sorted(
                (e for e in self.visible if e.partition == partition and e not in self.logs[partition]),
                key=lambda e: e.order,
            )
            late = [e for e in pending if e.order < self.cursors[partition]]
            fresh = [e for e in pending if e.order > self.cursors[partition]]
            self.met.update(late=len(late), both=bool(late and fresh), cut=len(fresh) > limit, open=len(self.open))
            taken = late + fresh[:limit]
            self.logs[partition] += taken
            expected += len(taken)
            if fresh:
                self.cursors[partition] = fresh[:limit][-1].order
            if len(fresh) > limit:
                backlog.append(self.ids[partition])
        metrics = materialize(worker, [self.ids[p] for p in chosen], events_per_partition=limit)
        assert metrics.events_processed == expected
        assert list(metrics.backlog_partition_ids) == backlog

    def trim(self, data: st.DataObject) -> None:
        batch = data.draw(st.sampled_from([1, 3, 1000]))
        trim(self.observer, delete_batch=batch, after_partition_id=self.ids[0] - 1)

    def fan_out(self, _: st.DataObject) -> None:
        """Whatever is visible is found or was found before."""
        save_seen(self.observer, find_committed(self.observer).snapshot)
        assert find_committed(self.observer).commits == 0

    @invariant()
    def the_log_is_as_predicted(self) -> None:
        if not hasattr(self, "ids"):
            return
        rows = self.observer.execute(
            "select b.partition_id, b.start_offset, b.n_records, o.key, b.byte_offset from tidemark.record_batches b "
            "join tidemark.objects o on o.id = b.object_id where b.partition_id = any(%s) order by 1, 2",
            (self.ids,),
        ).fetchall()
        predicted = []
        for partition, log in enumerate(self.logs):
            offset = 0
            for event in log:
                predicted.append((self.ids[partition], offset, event.n_records, event.key, event.position))
                offset += event.n_records
        assert rows == predicted
        heads = self.observer.execute(
            "select end_offset, byte_size from tidemark.topic_partitions where id = any(%s) order by id", (self.ids,)
        ).fetchall()
        assert heads == [(sum(e.n_records for e in log), len(log)) for log in self.logs]

    @invariant()
    def commits_keep_their_real_time_order(self) -> None:
        """The model's own prediction, too, is checked against the clock."""
        for log in self.logs:
            latest_begin = 0
            for event in log:
                began, returned = self.times[event.key]
                assert returned > latest_begin, f"{event} stands behind a commit that began after it had returned"
                latest_begin = max(latest_begin, began)

    @invariant()
    def sweep_finds_what_is_pending(self) -> None:
        if not hasattr(self, "ids"):
            return
        waiting = dict.fromkeys(self.ids, 0)
        for event in self.visible:
            waiting[self.ids[event.partition]] += 1
        for partition, log in enumerate(self.logs):
            waiting[self.ids[partition]] -= len(log)
        found = {p.partition_id: p.events for p in sweep(self.observer) if p.partition_id in waiting}
        assert found == {i: count for i, count in waiting.items() if count}


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
                max_examples=50,
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
    assert min(Machine.met[case] for case in ("late", "both", "cut", "open")) >= 10, Machine.met
