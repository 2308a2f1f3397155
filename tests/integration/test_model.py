"""Property test: the whole public interface against a model small enough to be believed (`model.py`).

The machine drives open transactions, rollbacks, savepoints, replays, several materializers and readers in one thread,
so every interleaving it finds can be replayed. What a step answers, an error among it, is predicted before it is done;
and after each step that may change something, the whole log, batch by batch.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, TypeVar
from uuid import uuid4

import psycopg
import pytest
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from psycopg import Connection
from psycopg.errors import SerializationFailure
from psycopg.rows import TupleRow

from config.errors import (
    CommitConflictError,
    CondemnedObjectError,
    FencedProducerError,
    ForeignClusterError,
    InvalidCommitError,
    InvalidFetchError,
    InvalidTopicError,
    OffsetOutOfRangeError,
    PartitionNotEmptyError,
    TopicExistsError,
    UnknownPartitionError,
    UnknownProducerError,
    UnknownTopicError,
)
from config.settings import STRATEGIES
from db.audit import audit
from db.commit import Batch, Committed, columns, commit_batches, commit_object
from db.discover import find_committed, save_fan_out, sweep
from db.fetch import EARLIEST, LATEST, MAX_TIMESTAMP, FetchRequest, fetch_batches, fetch_partitions, list_offsets
from db.materialize import materialize
from db.objects import condemn, forget_dead_objects, list_dead_objects
from db.producers import Producer, expire_producers, init_producer, producer_states
from db.rebase import RebaseResult, rebase
from db.receipts import receipts
from db.retention import delete_records, purge, retain
from db.topics import add_partitions, create_topic, delete_topic, list_topics, partition_ids, set_retention
from db.translate import domain_errors
from tests.integration.conftest import examples
from tests.integration.model import HOUR_MS, LAST_SEQUENCE, RUN, Claim, Model, Object, Partition, Placed, Run, Topic
from tests.support import wait_until

T = TypeVar("T")
Step = Callable[[], None]

PRODUCERS = 4
MATERIALIZERS = 2
PARTITIONS = 3
# Beyond it no topic is created and none grows.
MOST_PARTITIONS = 7
# No partition has this id, and no transaction a higher one.
UNKNOWN, HIGHEST = 2**31 - 1, 2**62

FUTURE = 4_000_000_000_000
TIMES = (-1, 1000, 2000, 3000, FUTURE)
LENGTHS = (0, 1, 5, 10)


@dataclass
class Session:
    """A transaction that is open, and what it has committed so far."""

    tx: int
    began: int
    objects: list[Object] = field(default_factory=list)

    @property
    def claims(self) -> list[Claim]:
        return [claim for o in self.objects for claim in o.claims]


class Machine(RuleBasedStateMachine):
    """Topics of its own for each example, which deletes them at its end; the connections are shared."""

    connections: list[Connection[Any]]
    # What the examples brought about: a machine that never meets a late commit would prove nothing.
    met: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.producers = self.connections[:PRODUCERS]
        self.materializers = self.connections[PRODUCERS : PRODUCERS + MATERIALIZERS]
        self.observer = self.connections[-1]
        self.random = Random(0)
        self.clock = 0
        self.open: dict[int, Session] = {}
        self.model = Model()
        self.prefix = uuid4().hex
        self.created = self.keys = 0
        self.first_object = self.one("select coalesce(max(id), 0) from tidemark.objects")

    @initialize()
    def create(self) -> None:
        self.add_topic(PARTITIONS, None, None)
        self.add_topic(1, None, None)
        made = init_producer(self.observer)
        self.model.epochs[made.producer_id] = made.producer_epoch

    def teardown(self) -> None:
        for number in list(self.open):
            self.producers[number].execute("rollback")
        self.open.clear()
        for name in list(self.model.topics):
            assert audit(self.observer, topic=name, from_scratch=True).violations == ()
            delete_topic(self.observer, name)
        wait_until(self.nothing_is_left)
        self.observer.execute("truncate tidemark.producers, tidemark.deleted_partitions")

    def nothing_is_left(self) -> bool:
        """After the topics are deleted and the objects collected. Other transactions of the server may hold it up."""
        purge(self.observer)
        dead = list_dead_objects(self.observer, older_than_seconds=0, after_object_id=self.first_object, limit=10_000)
        forget_dead_objects(self.observer, [o.id for o in dead])
        return bool(
            self.one(
                "select not (exists (select from tidemark.record_batch_events) or exists (select from tidemark.runs)"
                " or exists (select from tidemark.producer_batches) or exists (select from tidemark.objects)"
                " or exists (select from tidemark.log_starts) or exists (select from tidemark.refused_batches))"
            )
        )

    # --- Helpers

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def new_key(self) -> str:
        """In their order, so that an example that is repeated draws the same ones."""
        self.keys += 1
        return f"{self.prefix}/{self.keys:04}"

    def flip(self) -> bool:
        return self.random.random() < 0.5

    def some(self, values: list[T], least: int) -> set[T]:
        return set(self.random.sample(values, self.random.randint(least, min(len(values), 8))))

    def one(self, query: str, *parameters: Any) -> Any:
        row = self.observer.execute(query.encode(), parameters).fetchone()
        assert row
        return row[0]

    def expect(self, error: type[Exception] | None, call: Callable[[], T]) -> T | None:
        """Call it; None where it raised the error that was predicted, which is counted."""
        if error is None:
            return call()
        with pytest.raises(error) as raised:
            call()
        assert type(raised.value) is error
        self.met[error.__name__] += 1
        return None

    def any_partition(self) -> int:
        """Most are there; some are deleted or never were."""
        live = [p.id for p in self.model.live]
        live += [p.id for p in self.model.live if p.kept] * 3
        deleted = [p.id for p in self.model.partitions.values() if p.is_deleted]
        return self.random.choice([*live * 3, *deleted, UNKNOWN])

    def any_offset(self, partition_id: int) -> int:
        p = self.model.partitions.get(partition_id)
        if not p:
            return 0
        edges = [p.start - 1, p.start, p.end, p.end + 1]
        return self.random.choice([*edges, p.start, *[self.random.randint(p.start, p.end)] * 3])

    # --- The one rule

    @rule(seed=st.integers(0, 2**32 - 1))
    def step(self, seed: int) -> None:
        """One rule that chooses by itself: of several, hypothesis leaves some out of each example (swarm testing), and
        a late commit takes nearly all of them in the right order. And from a seed: thousands of draws cost more than
        all the rest. And from those before: most examples of hypothesis are others with few numbers changed.
        """
        self.random.seed(f"{self.random.random()}/{seed}")
        flow: list[Step] = [self.commit_alone] * 3 + [self.materialize] * 3 + [self.drain]
        if len(self.open) < PRODUCERS:
            flow += [self.begin, self.begin]
        if self.open:
            flow += [self.commit_in_transaction] * 3 + [self.end] * 2
        reads: list[Step] = [self.receipts, self.fetch, self.fetch_many, self.list_offsets, self.producer_states]
        rare: list[Step] = [self.retain, self.retain, self.delete_records, self.change_topics, self.change_topics]
        rare += [self.begin_at, self.condemn, self.collect, self.init_producer, self.age, self.discover, self.purge]
        if any(self.model.partitions[e.batch.partition_id].is_deleted for e in self.model.visible):
            rare += [self.purge] * 4
        if self.model.objects:
            rare += [self.replay, self.conflict]
        if not self.open:
            rare.append(self.rebase)
        kind = self.random.choice([flow, flow, reads, rare])
        self.met["steps"] += 1
        chosen = self.random.choice(kind)
        note(chosen.__name__)
        chosen()
        if kind is not reads:
            self.check_the_log()

    # --- Commits

    def plain(self) -> list[Batch]:
        """Batches of any partitions, all in order; some objects are longer than a run."""
        if self.random.randint(0, 11):
            count = self.random.choice([1, 2, 3, 4, 6, 8])
            return [self.batch() for _ in range(count)]
        one = self.batch()
        count = self.random.choice([RUN - 1, RUN, RUN + 1, 2 * RUN, 200])
        return [replace(one, byte_offset=n) for n in range(count)]

    def batch(self) -> Batch:
        return Batch(
            partition_id=self.random.choice(self.model.live).id,
            n_records=self.random.randint(1, 9),
            byte_offset=0,
            byte_length=self.random.choice(LENGTHS),
            max_timestamp=self.random.choice(TIMES),
        )

    def mixed(self, number: int | None) -> list[Batch]:
        """Some batches of producers, some malformed, some of partitions that are not there."""
        own = self.open[number].claims if number is not None else []
        busy = {c.owner[1] for n, session in self.open.items() if n != number for c in session.claims}
        producers = sorted(self.model.epochs.keys() - busy)
        content: list[Batch] = []
        for _ in range(self.random.choice([1, 2, 3, 5])):
            kind = self.random.choice(["producer"] * 6 * bool(producers) + ["plain", "malformed", "unknown"])
            batch = self.batch()
            if kind == "malformed":
                wrong: list[dict[str, int]] = [{"n_records": 0}, {"byte_offset": -1}, {"max_timestamp": 10**15}]
                batch = replace(batch, **self.random.choice(wrong))
            elif kind == "unknown":
                batch = replace(batch, partition_id=self.any_partition())
            elif kind == "producer":
                appended = [*own, *self.model.judge(HIGHEST, 0, "", content, own).claims]
                owners = [o for o in self.model.appended if o[1] in producers] + [c.owner for c in appended]
                owner = batch.partition_id, self.random.choice(producers)
                if owners and self.random.randint(0, 3):
                    owner = self.random.choice(owners)
                batch = self.of_producer(replace(batch, partition_id=owner[0], producer_id=owner[1]), appended)
            content.append(batch)
        return content

    def of_producer(self, batch: Batch, own: list[Claim]) -> Batch:
        before = self.model.claims_of(batch, own)
        newest = self.model.epochs[batch.producer_id or 0]
        if not before:
            wraps = self.random.choice([0, 0, 0, 1])
            return replace(batch, producer_epoch=newest, base_sequence=wraps)
        head = before[-1]
        how = self.random.choice(["next", "next", "next", "again", "again", "again", "gap", "epoch", "old", "far"])
        if how == "again":
            claim = self.random.choice(before[-7:])
            return replace(claim.event.batch, byte_offset=99)
        epoch, due = head.epoch, (head.last + 1) & LAST_SEQUENCE
        if how == "far":
            # As many records as bring the next sequence close to the end of its range.
            return replace(batch, n_records=LAST_SEQUENCE - 1, producer_epoch=epoch, base_sequence=due)
        sequence = {"next": due, "gap": due + 1 if due < LAST_SEQUENCE else 5}.get(how, 0)
        epoch = {"epoch": max(newest, epoch + 1), "old": max(epoch - 1, 0)}.get(how, epoch)
        return replace(batch, producer_epoch=epoch, base_sequence=sequence)

    def begin(self) -> None:
        """The transaction gets its id now; its events come at once, or much later."""
        number = min(set(range(PRODUCERS)) - self.open.keys())
        conn = self.producers[number]
        began = self.tick()
        conn.execute("begin")
        row = conn.execute("select tidemark.tx_base() + pg_current_xact_id()::text::bigint").fetchone()
        assert row
        self.open[number] = Session(row[0], began)
        if self.flip():
            self.send(number, self.new_key(), self.plain())

    def commit_in_transaction(self) -> None:
        number = self.random.choice(sorted(self.open))
        how = self.random.choice(["plain", "mixed", "mixed", "savepoint"])
        if how != "savepoint":
            content = self.plain() if how == "plain" else self.mixed(number)
            self.send(number, self.new_key(), content)
            return
        kept = list(self.open[number].objects)
        content = self.plain() if self.flip() else self.mixed(number)
        with self.producers[number].transaction(force_rollback=True):
            self.send(number, self.new_key(), content)
        self.open[number].objects = kept

    def end(self) -> None:
        number = self.random.choice(sorted(self.open))
        session = self.open.pop(number)
        kept = self.random.choice([True, True, True, False])
        self.producers[number].execute("commit" if kept else "rollback")
        if kept:
            returned = self.tick()
            for committed in session.objects:
                self.model.commit(committed, returned)

    def commit_alone(self) -> None:
        content = self.plain() if self.flip() else self.mixed(None)
        self.send(None, self.new_key(), content)

    def replay(self) -> None:
        """Also of what could not be committed any more, and of what is condemned or all deleted."""
        known = self.model.objects[self.random.choice(sorted(self.model.objects))]
        number = self.random.choice([None, *sorted(self.open)])
        self.send(number, known.key, known.content or self.plain())
        self.met["replayed"] += 1

    def conflict(self) -> None:
        known = self.model.objects[self.random.choice(sorted(self.model.objects))]
        number = self.random.choice([None, *sorted(self.open)])
        content = list(known.content) or self.plain()
        place = self.random.randint(0, len(content) - 1)
        changed = content[place]
        name = self.random.choice(["n_records", "byte_offset", "byte_length", "max_timestamp", "partition_id"])
        content[place] = replace(changed, **{name: getattr(changed, name) + (-1 if changed.n_records > 9 else 1)})
        if content[place].partition_id < 0:
            return
        self.send(number, known.key, self.random.choice([content, [*content, changed]]))

    def send(self, number: int | None, key: str, content: list[Batch]) -> None:
        """Commit in an open transaction, or alone; the error or the verdicts are predicted."""
        session = self.open[number] if number is not None else None
        own = session.claims if session else []
        judged = self.model.judge(session.tx if session else HIGHEST, 0, key, content, own)
        whole = all(b.producer_id is None for b in content) and self.flip()
        known = self.model.objects.get(key)
        verdicts = known.verdicts if known else judged.verdicts
        error: type[Exception] | None = None
        if known and (known.is_condemned or known.content != content):
            error = CondemnedObjectError if known.is_condemned else CommitConflictError
        elif not known and judged.is_race:
            error = SerializationFailure
        elif whole and set(verdicts) != {"accepted"}:
            error = InvalidCommitError if "malformed" in verdicts else UnknownPartitionError
        conn = self.producers[number] if number is not None else self.observer

        def call() -> Committed:
            with conn.transaction() if session else nullcontext():
                if whole:
                    return Committed(commit_object(conn, key, *columns(content)), verdicts)
                return commit_batches(conn, key, content)

        began = session.began if session else self.tick()
        done = self.expect(error, call)
        if not done:
            return
        assert done.verdicts == verdicts
        if known:
            assert done.object_id == known.id
            return
        self.met.update(verdicts)
        query = "select tx from tidemark.objects where id = %s"
        tx = session.tx if session else self.one(query, done.object_id)
        made = self.model.judge(tx, done.object_id, key, content, own)
        committed = Object(
            id=done.object_id,
            tx=tx,
            key=key,
            content=content,
            verdicts=made.verdicts,
            events=made.events,
            firsts=made.firsts,
            claims=made.claims,
            began=began,
        )
        if session:
            session.objects.append(committed)
        else:
            self.model.commit(committed, self.tick())

    # --- Offsets

    def drain(self) -> None:
        """Small passes one after the other, each of which goes on in the middle of a transaction."""
        for _ in range(3):
            self.materialize({p.id for p in self.model.live}, self.random.randint(1, 3))
            self.check_the_log()

    def materialize(self, chosen: set[int] | None = None, limit: int | None = None) -> None:
        worker = self.materializers[self.random.randint(0, MATERIALIZERS - 1)]
        # Those of deleted topics are passed over, and one that never was is an error.
        known = sorted(self.model.partitions)
        if not chosen:
            chosen = self.random.choice([set(known), {UNKNOWN}, set(), set(), set(), set()]) | self.some(known, 1)
        limit = limit or self.random.choice([1, 1, 2, 2, 3, 5, RUN - 1, RUN, RUN + 1, 1000, 1000])
        strategy = self.random.choice(STRATEGIES)
        waits = self.flip()
        taken = {}
        backlog = []
        for partition in (p for p in self.model.live if p.id in chosen and UNKNOWN not in chosen):
            late, fresh = partition.pending(self.model.visible)
            if events := (late + fresh)[:limit]:
                taken[partition.id] = events
            if len(late + fresh) > limit:
                backlog.append(partition.id)
            self.met.update(
                late=len(late),
                both=bool(late and fresh),
                cut=len(fresh) > limit,
                open=len(self.open),
                cut_late=len(late) > limit,
                resumed=bool(late and partition.log and late[0].tx == partition.log[-1].event.tx),
            )
        metrics = self.expect(
            UnknownPartitionError if UNKNOWN in chosen else None,
            lambda: materialize(worker, chosen, events_per_partition=limit, strategy=strategy, wait=waits),
        )
        if not metrics:
            return
        events = [e for found in taken.values() for e in found]
        assert metrics.events_processed == len(events)
        assert metrics.records == sum(e.batch.n_records for e in events)
        assert metrics.log_bytes == sum(e.batch.byte_length for e in events)
        assert {m.partition_id: m.events for m in metrics.moved} == {p: len(found) for p, found in taken.items()}
        assert list(metrics.backlog_partition_ids) == backlog
        for partition_id, found in taken.items():
            self.model.partitions[partition_id].place(found)
        self.commits_keep_their_real_time_order()

    def commits_keep_their_real_time_order(self) -> None:
        """The model's own prediction, too, is checked against the clock."""
        for partition in self.model.live:
            latest_begin = 0
            for _, event in partition.log[partition.gone :]:
                committed = self.model.objects[event.key]
                assert committed.returned > latest_begin, f"{event} stands behind a commit begun after it had returned"
                latest_begin = max(latest_begin, committed.began)

    def receipts(self) -> None:
        # Among them ids that are not there, and condemned keys.
        known = sorted(o.id for o in self.model.objects.values())
        again = [o for o in self.model.objects.values() if o.firsts]
        gone = [o.id for o in again if not self.model.visible or {*o.firsts.values()} - {*self.model.visible}]
        ids = [*self.some([*known, 0], 0), *self.some([o.id for o in again], 0), *known[-3:], *gone]
        places = [*self.model.partitions, UNKNOWN]
        moved = self.some(places, 0) if self.flip() else None
        predicted = [
            (o.id, number, *answer)
            for o in sorted(self.model.objects.values(), key=lambda o: o.id)
            if o.id in ids
            for number, answer in self.model.receipts(o, moved)
        ]
        found = [
            (r.object_id, r.batch, r.partition_id, r.verdict, r.base_offset, r.is_pending)
            for r in receipts(self.observer, ids, moved)
        ]
        assert found == predicted
        for _, _, _, verdict, offset, is_pending in predicted:
            state = "pending" if is_pending else "given" if offset is not None else "deleted"
            self.met[f"receipt_{verdict}_{state}" if verdict in {"accepted", "duplicate"} else "receipt_refused"] += 1

    # --- Readers

    def fetch(self) -> None:
        """From any offset, in any portion: what the model says lies there."""
        partition_id = self.any_partition()
        offset = self.any_offset(partition_id)
        most = self.random.choice([1, 9, 10, 25, 100, 10_000, 0])
        limit = self.random.choice([1, 2, 7, RUN, 1000])
        partition = self.model.partition(partition_id)
        error: type[Exception] | None = None
        if not partition:
            error = UnknownPartitionError
        elif not most:
            error = InvalidFetchError
        elif not partition.start <= offset <= partition.end:
            error = OffsetOutOfRangeError
        by_name = partition is not None and self.flip()

        def call() -> list[tuple[Any, ...]]:
            if not by_name or not partition:
                batches = fetch_batches(self.observer, partition_id, offset, max_bytes=most, max_batches=limit)
                return [(b.start_offset, b.n_records, b.object_key, b.byte_offset, b.byte_length) for b in batches]
            with domain_errors():
                return self.observer.execute(
                    "select start_offset, n_records, object_key, byte_offset, byte_length "
                    "from tidemark.fetch_batches(%s, %s, %s, %s::bigint, %s)",
                    (partition.topic, partition.number, offset, most, limit),
                ).fetchall()

        found = self.expect(error, call)
        if found is not None and partition:
            placed = partition.fetch(offset, most, limit)
            assert found == [as_row(p) for p in placed]
            self.met.update(fetched=len(found), spanned=bool(placed) and placed[0].start < offset)

    def fetch_many(self) -> None:
        requests = []
        for _ in range(self.random.choice([0, 1, 3, 4, 5])):
            partition_id = self.any_partition()
            most = self.random.choice([5, 20, 1000, 0])
            requests.append(FetchRequest(partition_id, self.any_offset(partition_id), most))
        most = self.random.choice([1, 10, 30, 1000, 1000, 0])
        limit = self.random.choice([1, 3, 10, 1000])
        found = self.expect(
            None if most else InvalidFetchError,
            lambda: fetch_partitions(self.observer, requests, max_bytes=most, max_batches=limit),
        )
        if found is None:
            return
        predicted = self.model.fetch(requests, most, limit)
        assert [
            (
                (f.partition_id, f.error, f.start_offset, f.end_offset),
                [(b.start_offset, b.n_records, b.object_key, b.byte_offset, b.byte_length) for b in f.batches],
            )
            for f in found
        ] == [
            ((r.partition_id, error, p.start if p else None, p.end if p else None), [as_row(b) for b in batches])
            for r, (error, batches) in zip(requests, predicted, strict=True)
            for p in [self.model.partition(r.partition_id)]
        ]
        self.met.update(f"fetch_{error}" for error, _ in predicted if error)
        self.met["fetched_several"] += len([b for _, b in predicted if b]) > 1

    def list_offsets(self) -> None:
        wanted = [LATEST, EARLIEST, MAX_TIMESTAMP, -4, 0, 999, 1000, 1001, 3000, FUTURE, FUTURE + 1]
        asked = [(self.any_partition(), self.random.choice(wanted)) for _ in range(self.random.randint(1, 5))]
        found = list_offsets(self.observer, [p for p, _ in asked], [time for _, time in asked])
        predicted = [(p, *self.model.list_offset(p, time)) for p, time in asked]
        assert [(f.partition_id, f.error, f.log_offset, f.max_timestamp) for f in found] == predicted
        for (_, time), (_, error, offset, _) in zip(asked, predicted, strict=True):
            self.met[f"list_{error or min(time, 0)}{'' if offset is None else '_found'}"] += 1

    # --- Deletion

    def retain(self) -> None:
        if self.flip():
            self.limit_topic()
        deleted = self.model.retain()
        freed = self.model.delete(deleted)
        size = self.random.choice([1, RUN, 5000])
        first = min(self.model.partitions) - 1
        result = retain(self.observer, delete_batch=size, after_partition_id=first)
        assert (result.deleted, result.log_bytes, result.objects_freed) == (
            len(deleted),
            sum(e.batch.byte_length for e in deleted),
            freed,
        )
        self.met.update(retained=len(deleted), freed=freed)

    def delete_records(self) -> None:
        started = [p.id for p in self.model.live if p.start]
        partition_id = self.random.choice([self.any_partition(), *started])
        partition = self.model.partition(partition_id)
        below = partition.start // 2 if partition else 0
        before = self.random.choice([LATEST, -2, below, below, *(self.any_offset(partition_id) for _ in range(4))])
        error: type[Exception] | None = None
        if not partition or before < LATEST:
            error = OffsetOutOfRangeError if partition else UnknownPartitionError
        start = self.expect(error, lambda: delete_records(self.observer, partition_id, before))
        if start is not None and partition:
            self.met["deleted_back"] += LATEST < before < partition.start
            assert start == self.model.delete_records(partition, before)
            self.met["deleted_inside"] += any(p.start < start for p in partition.kept)

    def purge(self) -> None:
        """What a transaction commits late to a deleted partition may have to wait for others that were open then."""
        gone = [p.id for p in self.model.partitions.values() if p.is_deleted]
        before = [e for e in self.model.visible if e.batch.partition_id in gone]
        result = purge(self.observer)
        rows = self.observer.execute(
            "select partition_id, tx, id from tidemark.record_batch_events where partition_id = any(%s)", (gone,)
        ).fetchall()
        left = {(p, tx, i >> 16, i & 65535) for p, tx, i in rows}
        keys = {(e.batch.partition_id, *e.order): e for e in before}
        assert left <= keys.keys()
        deleted = [e for key, e in keys.items() if key not in left]
        # What is left is late: below what was purged before.
        assert not left or self.open
        assert (result.deleted, result.log_bytes, result.objects_freed) == (
            len(deleted),
            sum(e.batch.byte_length for e in deleted),
            self.model.delete(deleted),
        )
        self.met["purged"] += len(deleted)

    def collect(self) -> None:
        dead = sorted((o for o in self.model.objects.values() if o.is_dead), key=lambda o: o.id)
        limit = self.random.randint(1, 5)
        after = self.random.choice([self.first_object, *(o.id for o in dead)])
        found = list_dead_objects(self.observer, limit=limit, older_than_seconds=0, after_object_id=after)
        assert [(o.id, o.key) for o in found] == [(o.id, o.key) for o in dead if o.id > after][:limit]
        # What lives is passed over.
        ids = [o.id for o in found] + [o.id for o in self.model.objects.values() if not o.is_dead][:1]
        assert forget_dead_objects(self.observer, ids) == len(found)
        for forgotten in found:
            del self.model.objects[forgotten.key]
        self.met["forgotten"] += len(found)

    def condemn(self) -> None:
        known = sorted(self.model.objects)
        keys = sorted(self.some(known, 0)) if known else []
        keys += [self.new_key() for _ in range(self.random.randint(0, 2))]
        if self.random.randint(0, 9) == 0:
            keys.append("k" * 1025)
        error = InvalidCommitError if keys and len(keys[-1]) > 1024 else None
        predicted = {k for k in keys if k not in self.model.objects or self.model.objects[k].is_condemned}
        found = self.expect(error, lambda: condemn(self.observer, keys))
        if found is None:
            return
        assert found == sorted(predicted)
        rows = self.observer.execute(
            "select key, id, tx from tidemark.objects where key = any(%s)", (found,)
        ).fetchall()
        for key, object_id, tx in rows:
            self.model.objects.setdefault(
                key, Object(id=object_id, tx=tx, key=key, content=[], verdicts=[], events={}, firsts={}, claims=[])
            )
        self.met["condemned"] += len(found)

    # --- Topics

    def add_topic(self, partitions: int, ms: int | None, size: int | None) -> None:
        self.created += 1
        name = f"{self.prefix}.{self.created}"
        made = create_topic(self.observer, name, partitions, retention_ms=ms, retention_bytes=size)
        topic = Topic(made, name, partition_ids(self.observer, name), ms, size)
        assert len(topic.ids) == partitions
        self.model.topics[name] = topic
        self.know_partitions(topic)

    def know_partitions(self, topic: Topic) -> None:
        """Ids are never given again, and rise."""
        highest = max(self.model.partitions, default=0)
        fresh = [i for i in topic.ids if i not in self.model.partitions]
        assert sorted(fresh) == fresh
        assert all(i > highest for i in fresh)
        for partition_id in fresh:
            number = topic.ids.index(partition_id)
            self.model.partitions[partition_id] = Partition(partition_id, topic.name, number)

    def change_topics(self) -> None:
        changes: list[Step] = [self.limit_topic, self.create_wrongly, self.list_topics]
        if len(self.model.live) < MOST_PARTITIONS:
            changes += [self.create_topic, self.create_topic, self.grow_topic]
        if len(self.model.topics) > 1:
            changes += [self.delete_topic, self.delete_topic]
        self.random.choice(changes)()

    def create_topic(self) -> None:
        self.add_topic(self.random.randint(1, 2), *self.draw_limits())
        self.met["created"] += 1

    def draw_limits(self) -> tuple[int | None, int | None]:
        return self.random.choice([None, HOUR_MS]), self.random.choice([None, None, 0, 5, 10, 20, 50])

    def any_topic(self) -> str:
        return self.random.choice([*sorted(self.model.topics) * 4, self.prefix])

    def create_wrongly(self) -> None:
        taken = self.model.topics[self.random.choice(sorted(self.model.topics))]
        error, name, partitions, topic_id = self.random.choice(
            [
                (InvalidTopicError, "with space", 1, None),
                (InvalidTopicError, self.prefix, 0, None),
                (InvalidTopicError, taken.name.replace(".", "_"), 1, None),
                (TopicExistsError, taken.name, 1, None),
                (TopicExistsError, self.prefix, 1, taken.id),
            ]
        )
        self.expect(error, lambda: create_topic(self.observer, name, partitions, topic_id=topic_id))

    def grow_topic(self) -> None:
        name = self.any_topic()
        topic = self.model.topics.get(name)
        count = (len(topic.ids) if topic else 0) + self.random.randint(0, 1)
        error: type[Exception] | None = None
        if not topic or count == len(topic.ids):
            error = InvalidTopicError if topic else UnknownTopicError
        ids = self.expect(error, lambda: add_partitions(self.observer, name, count))
        if ids and topic:
            assert (ids[: len(topic.ids)], len(ids)) == (topic.ids, count)
            topic.ids = ids
            self.know_partitions(topic)
            self.met["grown"] += 1

    def limit_topic(self) -> None:
        name = self.any_topic()
        ms, size = self.draw_limits()
        topic = self.model.topics.get(name)
        error = None if topic else UnknownTopicError
        self.expect(error, lambda: set_retention(self.observer, name, retention_ms=ms, retention_bytes=size))
        if topic:
            topic.retention_ms, topic.retention_bytes = ms, size

    def delete_topic(self) -> None:
        name = self.any_topic()
        topic = self.model.topics.get(name)
        found = self.expect(None if topic else UnknownTopicError, lambda: delete_topic(self.observer, name))
        if topic:
            assert found == topic.id
            del self.model.topics[name]
            for partition_id in topic.ids:
                self.model.partitions[partition_id].is_deleted = True
            self.met["deleted"] += 1

    def list_topics(self) -> None:
        mine = sorted(self.model.topics.values(), key=lambda t: t.name)
        after = self.random.choice(["", *(t.name for t in mine)])
        limit = self.random.randint(1, 3)
        by_id = self.flip()
        found = list_topics(
            self.observer,
            None if by_id else [*(t.name for t in mine), self.prefix],
            ids=[t.id for t in mine] if by_id else None,
            after=after,
            limit=limit,
        )
        assert [(t.id, t.name, t.partition_ids, t.retention_ms, t.retention_bytes) for t in found] == [
            (t.id, t.name, t.ids, t.retention_ms, t.retention_bytes) for t in mine if t.name > after
        ][:limit]
        name = self.any_topic()
        topic = self.model.topics.get(name)
        ids = self.expect(None if topic else UnknownTopicError, lambda: partition_ids(self.observer, name))
        assert ids == (topic.ids if topic else None)

    def begin_at(self) -> None:
        partition_id = self.random.choice([*(p.id for p in self.model.live if not p.has_begun), 0]) or (
            self.any_partition()
        )
        offset = self.random.choice([0, 1, 100, -1])
        partition = self.model.partition(partition_id)
        error: type[Exception] | None = None
        if not partition:
            error = UnknownPartitionError
        elif offset < 0:
            error = OffsetOutOfRangeError
        elif partition.has_begun:
            error = PartitionNotEmptyError

        def call() -> None:
            with domain_errors():
                self.observer.execute("select tidemark.begin_at(%s, %s)", (partition_id, offset))

        self.expect(error, call)
        if partition and not error:
            partition.begins = partition.start = partition.deleted_to = offset
            self.met["begun"] += bool(offset)

    # --- Producers

    def init_producer(self) -> None:
        known = sorted(self.model.epochs)
        producer = self.random.choice([None, *known * 3, 10**15])
        epoch = self.model.epochs.get(producer or 0)
        how = self.random.choice(["none", "newest", "ahead", "behind", "behind"])
        passed = {"newest": epoch, "ahead": (epoch or 0) + 2, "behind": (epoch or 0) - 1}.get(how)
        error: type[Exception] | None = None
        if producer is not None and epoch is None:
            error = UnknownProducerError
        elif producer is not None and how == "behind":
            error = FencedProducerError
        found = self.expect(error, lambda: init_producer(self.observer, producer, passed))
        if not found:
            return
        if producer is None or epoch is None:
            assert found.producer_epoch == 0
            assert found.producer_id > max(known, default=0)
        else:
            assert found == Producer(producer, max(epoch + 1, (passed or 0) + 1))
        self.model.epochs[found.producer_id] = found.producer_epoch

    def producer_states(self) -> None:
        known = [p for p in self.model.live if any(i == p.id for i, _ in self.model.appended)]
        partition = self.random.choice(known or self.model.live)
        producers = sorted((p for i, p in self.model.appended if i == partition.id), reverse=True)
        before = self.random.choice([None, *producers])
        limit = self.random.randint(1, 3)
        found = producer_states(self.observer, partition.id, before=before, limit=limit)
        heads = [self.model.appended[partition.id, p][-1] for p in producers if before is None or p < before]
        assert [(s.producer_id, s.producer_epoch, s.last_sequence, s.batches) for s in found] == [
            (c.owner[1], c.epoch, c.last, c.ordinal) for c in heads[:limit]
        ]
        self.met["producer_states"] += len(found)

    def age(self) -> None:
        """A day passes for all that is committed, and perhaps for the producers' ids; who was silent is forgotten."""
        ids = [o.id for o in self.model.objects.values()]
        self.observer.execute(
            "update tidemark.objects set committed_at = committed_at - interval '1 day' where id = any(%s)", (ids,)
        )
        for committed in self.model.objects.values():
            committed.aged = True
        if self.flip():
            return
        silent = self.model.silent()
        # Of a deleted partition a purge may have forgotten them before.
        surely = [owner for owner in silent if self.model.partition(owner[0])]
        assert len(surely) <= expire_producers(self.observer, silent_seconds=3600) <= len(silent)
        for owner in silent:
            del self.model.appended[owner]
        self.met["expired"] += len(surely)
        if self.model.epochs and self.flip():
            self.expire_id(self.random.choice(sorted(self.model.epochs)))

    def expire_id(self, producer_id: int) -> None:
        self.observer.execute(
            "update tidemark.producers set created_at = created_at - interval '1 day' where id = %s", (producer_id,)
        )

        def the_id_is_forgotten() -> bool:
            """A turn looks at some ids, from any one on."""
            expire_producers(self.observer, silent_seconds=3600)
            return bool(self.one("select not exists (select from tidemark.producers where id = %s)", producer_id))

        wait_until(the_id_is_forgotten, interval=0)
        # It is unknown then, so an old epoch may begin again; nothing commits under it here.
        del self.model.epochs[producer_id]
        self.met["expired_id"] += 1

    # --- The rest

    def discover(self) -> None:
        """Whatever is visible is found by fan-out, or was found before; the sweep finds what is pending."""
        save_fan_out(self.observer, find_committed(self.observer))
        assert find_committed(self.observer).commits == 0
        live = {p.id: p for p in self.model.live}
        waiting = {i: sum(len(part) for part in p.pending(self.model.visible)) for i, p in live.items()}
        found = {p.partition_id: p.events for p in sweep(self.observer) if p.partition_id in live}
        assert found == {i: count for i, count in waiting.items() if count}

    def rebase(self) -> None:
        """As after a restore into another cluster: what writes is refused until then, and goes on after it."""
        here = self.one("select system_identifier from tidemark.cluster")
        self.observer.execute("update tidemark.cluster set system_identifier = %s", (here + 1,))
        partition = self.model.live[0]
        calls: list[Callable[[], Any]] = [
            lambda: commit_batches(self.observer, self.new_key(), [self.batch()]),
            lambda: materialize(self.observer, [partition.id]),
            lambda: condemn(self.observer, [self.new_key()]),
        ]
        self.expect(ForeignClusterError, self.random.choice(calls))
        before = self.one("select tx_base from tidemark.cluster")
        assert rebase(self.observer) == RebaseResult(was=here + 1, now=here)
        assert self.one("select tx_base from tidemark.cluster") > before
        assert rebase(self.observer) is None

    def check_the_log(self) -> None:
        """All logs as readers see them, batch by batch, and their ends; runs may be cut anywhere within the rules."""
        live = {p.id: p for p in self.model.live}
        rows = self.observer.execute(
            "select partition_id, start_offset, n_records, object_key, byte_offset, byte_length "
            "from tidemark.record_batches where partition_id = any(%s) order by 1, 2",
            (list(live),),
        ).fetchall()
        assert rows == [(p.id, *as_row(placed)) for p in live.values() for placed in p.kept]
        heads = self.observer.execute(
            "select n.partition_id, n.start_offset, n.end_offset, n.byte_size, c.end_bytes, c.seen_tx "
            "from tidemark.cursors(%s) c join tidemark.named_partitions n using (partition_id) order by 1",
            (list(live),),
        ).fetchall()
        assert heads == [
            (
                p.id,
                p.start,
                p.end,
                sum(placed.event.batch.byte_length for placed in p.kept),
                sum(placed.event.batch.byte_length for placed in p.log),
                p.cursor[0],
            )
            for p in live.values()
        ]
        cuts = self.observer.execute(
            "select partition_id, start_offset, end_offset, batches from tidemark.runs "
            "where partition_id = any(%s) order by 1, 2",
            (list(live),),
        ).fetchall()
        for p in live.values():
            p.cut([Run(*run) for i, *run in cuts if i == p.id and run[1] > p.deleted_to])


def as_row(placed: Placed) -> tuple[Any, ...]:
    batch = placed.event.batch
    return placed.start, batch.n_records, placed.event.key, batch.byte_offset, batch.byte_length


# What the examples must have brought about.
CASES = (
    *("late", "both", "cut", "open", "cut_late", "resumed", "fetched", "spanned", "fetched_several", "replayed"),
    *("accepted", "duplicate", "out_of_order_sequence", "fenced_epoch", "unknown_partition", "malformed"),
    *("receipt_accepted_pending", "receipt_accepted_given", "receipt_accepted_deleted", "receipt_refused"),
    *("receipt_duplicate_pending", "receipt_duplicate_given"),
    *("fetch_malformed", "fetch_unknown_partition", "fetch_offset_out_of_range"),
    *("list_malformed", "list_unknown_partition", "list_-1_found", "list_-2_found", "list_-3_found", "list_-3"),
    *("list_0_found", "list_0", "retained", "freed", "deleted_back", "deleted_inside", "purged", "forgotten"),
    *("condemned", "created", "grown", "deleted", "begun", "producer_states", "expired", "expired_id"),
    *("CommitConflictError", "CondemnedObjectError", "FencedProducerError", "ForeignClusterError"),
    *("InvalidCommitError", "InvalidFetchError", "InvalidTopicError", "OffsetOutOfRangeError"),
    *("PartitionNotEmptyError", "SerializationFailure", "TopicExistsError", "UnknownPartitionError"),
    *("UnknownProducerError", "UnknownTopicError"),
)


def test_everything_does_what_the_model_says(database_url: str, conn: Connection[TupleRow]) -> None:
    connections = [psycopg.connect(database_url, autocommit=True) for _ in range(PRODUCERS + MATERIALIZERS + 1)]

    class Shared(Machine):
        pass

    Shared.connections = connections
    Shared.met = Counter()
    try:
        run_state_machine_as_test(Shared, settings=examples(90, stateful_step_count=40))
    finally:
        for connection in connections:
            connection.close()
    never = [case for case in CASES if not Shared.met[case]]
    assert not never, f"no example met {never}: {sorted(Shared.met.items())}"
