"""The history check fails for every kind of violation, and names the first row that offends.

Each test breaks a right history, or its database, in one place.
"""

import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import psycopg
import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from config.errors import CommitConflictError
from config.settings import Settings
from db.commit import Batch, columns, commit_batches, commit_object
from db.fetch import fetch_batches
from db.materialize import materialize
from db.pool import Database
from db.producers import init_producer
from db.retention import delete_records, retain
from db.topics import create_topic, partition_ids
from tests.demo.check import Evidence, Finding, check
from tests.demo.evidence import collect, find_objects, read_partitions
from tests.demo.ledger import (
    Answer,
    Attempt,
    Ledger,
    LedgerTail,
    LedgerWriter,
    Outcome,
    Reading,
    Sighting,
    ask_noted,
    note,
    note_begin,
)
from tests.demo.observers import Reader, Watcher
from tests.demo.programs import DemoError
from tests.demo.storage import upload

PREFIX = "demo-test/"
BYTES = 80


@dataclass(kw_only=True)
class Story:
    """A small run, told by its ledger and its database; the tests bend either."""

    conn: Connection[TupleRow]
    ids: list[int]
    storage: Path
    ledger: Ledger = field(default_factory=Ledger)
    producer_id: int = 0

    @property
    def attempts(self) -> list[Attempt]:
        return self.ledger.attempts

    @property
    def sightings(self) -> list[Sighting]:
        return self.ledger.sightings

    @property
    def answers(self) -> list[Answer]:
        return self.ledger.answers

    @property
    def readings(self) -> list[Reading]:
        return self.ledger.readings

    def commit(self, key: str, *, n_records: int = 10, outcome: Outcome = Outcome.COMMITTED) -> Attempt:
        """Upload and attempt to commit an object of two batches for each partition."""
        key = PREFIX + key
        batches = tuple(
            Batch(
                partition_id=partition_id,
                n_records=n_records,
                byte_offset=position * BYTES,
                byte_length=BYTES,
                max_timestamp=position,
            )
            for position, partition_id in enumerate(self.ids * 2)
        )
        upload(self.storage, key, [BYTES] * len(batches))
        began = time.monotonic()
        object_id = None
        if outcome is Outcome.ROLLED_BACK:
            with self.conn.transaction(force_rollback=True):
                commit_object(self.conn, key, *columns(batches))
        else:
            with suppress(CommitConflictError):
                object_id = commit_object(self.conn, key, *columns(batches))
        if outcome is Outcome.COMMITTED and object_id is None:
            outcome = Outcome.REFUSED
        return note(self.ledger, key, batches, began, outcome, object_id)

    def produce(self, key: str, sequence: int, *, epoch: int = 0) -> Attempt:
        """Commit a batch of the idempotent producer for each partition."""
        batches = tuple(
            Batch(
                partition_id=partition_id,
                n_records=10,
                byte_offset=position * BYTES,
                byte_length=BYTES,
                max_timestamp=position,
                producer_id=self.producer_id,
                producer_epoch=epoch,
                base_sequence=sequence,
            )
            for position, partition_id in enumerate(self.ids)
        )
        upload(self.storage, PREFIX + key, [BYTES] * len(batches))
        began = time.monotonic()
        done = commit_batches(self.conn, PREFIX + key, batches)
        outcome = Outcome.COMMITTED
        return note(self.ledger, PREFIX + key, batches, began, outcome, done.object_id, done.verdicts)

    def ask(self) -> None:
        """Ask for the receipts of everything."""
        objects = {a.object_id: a.key for a in self.attempts if a.object_id is not None}
        ask_noted(self.conn, self.ledger, objects)

    def place(self) -> None:
        """Give what is pending its offsets, one batch in a run: then the tests can bend single batches."""
        while materialize(self.conn, self.ids, events_per_partition=1).events_processed:
            pass

    def see(self) -> None:
        """Look at both partitions as the watcher and the reader do."""
        known = {s.partition_id: s.end_offset for s in self.sightings}
        for partition_id, log in read_partitions(self.conn, self.ids).items():
            now = time.monotonic()
            self.sightings.append(
                Sighting(
                    partition_id=partition_id,
                    start_offset=log.start_offset,
                    end_offset=log.end_offset,
                    began=now,
                    returned=now,
                    new_records=log.end_offset - known.get(partition_id, 0),
                )
            )
            batches = tuple(fetch_batches(self.conn, partition_id, log.start_offset))
            self.readings.append(
                Reading(
                    partition_id=partition_id,
                    from_offset=log.start_offset,
                    batches=batches,
                    began=now,
                    returned=time.monotonic(),
                )
            )

    def evidence(self) -> Evidence:
        return collect(self.conn, self.ids, self.ledger, key_prefix=PREFIX, objects=self.storage)

    def violations(self) -> dict[int, str]:
        return {f.number: f.violation for f in check(self.evidence()) if f.violation is not None}

    def sql(self, statement: str) -> None:
        done = self.conn.execute(statement.encode())
        assert done.rowcount > 0


@pytest.fixture
def story(conn: Connection[TupleRow], tmp_path: Path) -> Story:
    """Three objects with offsets, one rolled back, one repeated, one repeated wrongly; seen in the middle and after."""
    create_topic(conn, "orders", 2)
    story = Story(conn=conn, ids=partition_ids(conn, "orders"), storage=tmp_path)
    story.commit("a")
    story.commit("never", outcome=Outcome.ROLLED_BACK)
    story.place()
    story.see()
    story.commit("b")
    story.commit("b")
    story.commit("c")
    story.commit("c", n_records=11)
    story.place()
    story.see()
    return story


@pytest.fixture
def answered(story: Story) -> Story:
    """And an idempotent producer, in two epochs, with a duplicate and a gap; receipts, before and after the offsets."""
    story.producer_id = init_producer(story.conn).producer_id
    story.produce("p", 0)
    story.ask()
    story.place()
    story.see()
    story.ask()
    assert story.produce("again", 0).verdicts == ("duplicate",) * 2
    assert story.produce("gap", 30).verdicts == ("out_of_order_sequence",) * 2
    story.produce("q", 10)
    assert init_producer(story.conn, story.producer_id).producer_epoch == 1
    story.produce("r", 0, epoch=1)
    story.place()
    story.see()
    story.ask()
    assert story.violations() == {}
    return story


def test_passes_what_is_right(story: Story) -> None:
    findings = check(replace(story.evidence(), looks=4, fetched=8))
    assert findings == [
        Finding(number=1, name="contiguous", counted="12 batches in 2 partitions", violation=None),
        Finding(number=2, name="exactly once", counted="12 events, 1 rollbacks", violation=None),
        Finding(number=3, name="real-time order", counted="3 commits in 2 partitions", violation=None),
        Finding(number=4, name="immutable", counted="8 batches read meanwhile", violation=None),
        Finding(number=5, name="never back", counted="4 looks at the offsets", violation=None),
        Finding(number=6, name="replay-safe", counted="1 repeated, 1 conflicts refused", violation=None),
        Finding(number=7, name="idempotent", counted="0 batches of idempotent producers", violation=None),
        Finding(number=8, name="receipts agree", counted="0 answers", violation=None),
    ]


def test_gap(story: Story) -> None:
    story.sql(f"delete from tidemark.runs where partition_id = {story.ids[1]} and start_offset in (20, 40)")
    assert story.violations() == {
        1: f"orders/1: offset 20 is due, found [30, 40) of {PREFIX}b bytes 240+80",
        2: f"orders/1: 20 records committed and lost, first {PREFIX}b {story.attempts[2].batches[1]}",
        4: f"orders/1: read as [20, 30) of {PREFIX}b bytes 80+80, now nothing starts there",
    }


def test_overlap(story: Story) -> None:
    story.sql("update tidemark.runs set start_offset = 29 where start_offset = 30")
    found = story.violations()
    assert found[1] == f"orders/0: offset 30 is due, found [29, 39) of {PREFIX}b bytes 160+80"


def test_first_batch_may_span_the_start_offset(story: Story) -> None:
    story.sql(
        "insert into tidemark.log_starts (partition_id, start_offset, deleted_to, start_bytes) select id, 5, 0, 0 from "
        "tidemark.topic_partitions"
    )
    story.sightings.clear()
    assert story.violations() == {}


def test_end_offset_beyond_the_last_batch(story: Story) -> None:
    story.sql(f"update tidemark.runs set end_offset = 61 where partition_id = {story.ids[0]} and start_offset = 50")
    assert story.violations() == {1: "orders/0: the batches end at 60, the end offset is 61"}


def test_snapshot_with_a_gap(story: Story) -> None:
    """The log is whole in the end, and a reader saw it with a hole in between."""
    last = story.sightings[-1]
    story.sightings[-1] = replace(last, new_records=30)
    assert story.violations() == {1: f"orders/1: 30 records between the end offsets 20 and {story.sightings[-1]}"}


def test_double(story: Story) -> None:
    """The same event at the end of the log again."""
    story.sql(
        "insert into tidemark.runs (start_offset, end_offset, end_bytes, max_timestamp, first_tx, last_tx, first_id, "
        "last_id, partition_id, batches) "
        "select 60, 70, end_bytes, max_timestamp, first_tx, last_tx, first_id, last_id, partition_id, batches "
        f"from tidemark.runs where partition_id = {story.ids[0]} and start_offset = 50"
    )
    assert story.violations() == {2: f"orders/0: placed twice: [60, 70) of {PREFIX}c bytes 160+80"}


def test_loss_at_the_end(story: Story) -> None:
    """A whole commit without offsets leaves a log that is contiguous."""
    lost = story.commit("d")
    assert story.violations() == {2: f"orders/0: 20 records committed and lost, first {lost.key} {lost.batches[0]}"}


def test_phantom(story: Story) -> None:
    """The log holds a batch of an object that no producer knows."""
    del story.attempts[0]
    assert story.violations() == {
        2: f"orders/0: never committed, yet placed: [0, 10) of {PREFIX}a bytes 0+80",
        6: f"{PREFIX}a: stored with id 1, though no commit of it succeeded",
    }


def test_rolled_back_yet_placed(story: Story) -> None:
    story.attempts[0] = replace(story.attempts[0], outcome=Outcome.ROLLED_BACK, object_id=None)
    found = story.violations()
    assert found[2] == f"orders/0: not accepted, yet placed: [0, 10) of {PREFIX}a bytes 0+80"


def test_unknown_outcome_may_be_either(story: Story) -> None:
    """A producer whose connection broke does not know; the database does, and must stand by it."""
    story.attempts[0] = replace(story.attempts[0], outcome=Outcome.UNKNOWN, object_id=None)
    story.attempts[1] = replace(story.attempts[1], outcome=Outcome.UNKNOWN)
    assert story.violations() == {}
    story.sql("delete from tidemark.runs where start_offset = 0")
    assert 2 in story.violations()


@pytest.mark.parametrize("column", ["n_records", "byte_length", "max_timestamp"])
def test_other_content(story: Story, column: str) -> None:
    story.sql(f"update tidemark.record_batch_events set {column} = {column} + 1 where {batch(story, 'c', 2)}")
    found = story.violations()
    assert found[2].startswith(f"orders/0: committed as {story.attempts[4].batches[2]}, placed as [50, 6")


def test_bytes_of_another_batch(story: Story) -> None:
    """Offsets, lengths and keys agree, and yet the object holds something else there."""
    key = f"{PREFIX}b"
    path = story.storage / key
    whole = path.read_bytes()
    path.write_bytes(whole[BYTES:] + whole[:BYTES])
    found = story.violations()
    assert list(found) == [2]
    assert found[2].startswith(f"orders/0: the bytes are not those of batch 0, but b'{key} batch 1\\n")


def test_missing_object(story: Story) -> None:
    (story.storage / PREFIX / "b").unlink()
    assert list(story.violations()) == [2]


def test_reorder_of_commits(story: Story) -> None:
    """Two commits, one after the other, in the wrong order: each batch has offsets, none is missing."""
    _swap(story, "b", "c")
    story.readings.clear()
    found = story.violations()
    assert list(found) == [3]
    assert found[3].startswith(
        f"orders/0: [20, 30) of {PREFIX}c bytes 0+80 stands before [50, 60) of {PREFIX}b bytes 160+80, "
        "which was committed"
    ) or found[3].startswith(
        f"orders/0: [20, 30) of {PREFIX}c bytes 0+80 stands before [40, 50) of {PREFIX}b bytes 0+80"
    )


def test_overlapping_commits_may_stand_either_way(story: Story) -> None:
    _swap(story, "b", "c")
    story.readings.clear()
    c = story.attempts[4]
    story.attempts[4] = replace(c, began=story.attempts[2].began)
    assert story.violations() == {}


def test_replay_does_not_put_a_commit_later(story: Story) -> None:
    """An object is committed when the first of its attempts has returned, however long it is repeated after that."""
    _swap(story, "b", "c")
    story.readings.clear()
    story.attempts[3] = replace(story.attempts[3], returned=time.monotonic() + 60)
    assert list(story.violations()) == [3]


def test_reorder_within_an_object(story: Story) -> None:
    story.sql(
        "update tidemark.record_batch_events set byte_offset = 160 - byte_offset, max_timestamp = 2 - max_timestamp "
        f"where {batch(story, 'b', 0)} or {batch(story, 'b', 2)}"
    )
    story.readings.clear()
    assert story.violations() == {
        3: f"orders/0: batches of one object change places: [20, 30) of {PREFIX}b bytes 160+80 "
        f"and [30, 40) of {PREFIX}b bytes 0+80"
    }


def test_changed_offset(story: Story) -> None:
    """What a reader saw at an offset is another batch later."""
    seen = story.readings[0]
    other = replace(seen.batches[1], object_key=f"{PREFIX}other")
    story.readings[0] = replace(seen, batches=(seen.batches[0], other))
    assert story.violations() == {
        4: f"orders/0: read as [10, 20) of {PREFIX}other bytes 160+80, now [10, 20) of {PREFIX}a bytes 160+80"
    }


def test_shrunk_end_offset_between_looks(story: Story) -> None:
    before, now = story.sightings[0], story.sightings[2]
    shrunk = replace(now, end_offset=10, new_records=-10)
    story.sightings[2] = shrunk
    assert story.violations()[5] == f"orders/0: {before}, then {shrunk}"


def test_shrunk_end_offset_at_the_end(story: Story) -> None:
    """Batches and end offset of a commit that was visible are gone together, so the log is contiguous."""
    story.sql(f"delete from tidemark.runs where partition_id = {story.ids[0]} and start_offset = 50")
    found = story.violations()
    assert found[5] == f"orders/0: {story.sightings[2]}, in the end [0, 50)"
    assert 1 not in found


def test_start_offset_gone_back(story: Story) -> None:
    story.sightings[0] = replace(story.sightings[0], start_offset=5)
    assert story.violations()[5] == f"orders/0: {story.sightings[0]}, then {story.sightings[2]}"


def test_replay_with_another_id(story: Story) -> None:
    first = story.attempts[2].object_id
    assert first is not None
    story.attempts[3] = replace(story.attempts[3], object_id=first + 1)
    assert story.violations() == {6: f"{PREFIX}b: a commit returned id {first + 1}, stored is {first}"}


def test_accepted_conflict(story: Story) -> None:
    first = story.attempts[4].object_id
    story.attempts[5] = replace(story.attempts[5], outcome=Outcome.COMMITTED, object_id=first)
    assert story.violations() == {6: f"{PREFIX}c: committed a second time with other content, returned id {first}"}


def test_refused_replay(story: Story) -> None:
    story.attempts[3] = replace(story.attempts[3], outcome=Outcome.REFUSED, object_id=None)
    assert story.violations() == {6: f"{PREFIX}b: refused as a conflict, though the content is the same"}


def test_rolled_back_object_that_is_stored(story: Story) -> None:
    story.commit("never")
    del story.attempts[-1]
    assert 6 in story.violations()


def test_batches_of_a_fetch_that_are_not_neighbours(story: Story) -> None:
    seen = story.readings[2]
    story.readings[2] = replace(seen, batches=(seen.batches[0], *seen.batches[2:]))
    assert story.violations() == {
        1: f"orders/0: a fetch at 0 returned [20, 30) of {PREFIX}b bytes 0+80 where 10 is due"
    }


def test_a_fetch_that_begins_behind_what_was_asked_for(story: Story) -> None:
    story.readings[2] = replace(story.readings[2], from_offset=60)
    assert 1 in story.violations()


def test_an_end_offset_that_another_reader_knew(story: Story) -> None:
    """Each reader's own offsets only grow, and one is shown less than the other was before."""
    known = story.sightings[2]
    story.sightings.append(
        replace(known, reader=1, began=known.returned + 1, returned=known.returned + 2, end_offset=50, new_records=None)
    )
    assert story.violations()[5].endswith("but the end offset 60 was known before")


def test_a_fetch_that_finds_nothing_where_something_is_known(story: Story) -> None:
    later = time.monotonic()
    empty = Reading(partition_id=story.ids[0], from_offset=50, batches=(), began=later, returned=later)
    story.readings.append(empty)
    assert story.violations() == {5: "orders/0: a fetch at 50 found nothing, the end offset 60 was known"}
    # One that began before anybody knew is right.
    story.readings[-1] = replace(empty, began=0.0)
    assert story.violations() == {}


def test_a_batch_that_was_deleted_and_is_fetched(story: Story) -> None:
    read = story.readings[2]
    delete(story, 20)
    story.see()
    assert story.violations() == {}
    story.readings.append(replace(read, began=time.monotonic(), returned=time.monotonic()))
    assert story.violations()[5].endswith(
        f"[0, 10) of {PREFIX}a bytes 0+80 was fetched after the start offset 20 was known"
    )


def test_deleted_and_read_before(story: Story) -> None:
    """What a reader had before it was deleted still counts: what it holds, and in which order."""
    delete(story, 40)
    assert story.violations() == {}
    del story.attempts[0]
    assert story.violations()[2].startswith("orders/0: never committed, yet placed: [0, 10)")


def test_deleted_unread(story: Story) -> None:
    """Of what nobody has read, the number of records is all that is left."""
    story.readings.clear()
    delete(story, 40)
    assert story.violations() == {}
    lost = story.attempts[2]
    story.attempts.append(replace(lost, key=f"{PREFIX}x"))
    assert story.violations()[2].startswith("orders/0: 60 records committed and lost, first ")
    assert story.violations()[2].endswith("; 40 records were deleted unread")
    del story.attempts[-1]
    del story.attempts[0]
    assert story.violations()[2].startswith("orders/0: 20 records committed and lost, first ")


@pytest.mark.parametrize("sequence", [0, 20])
def test_a_sequence_twice_or_never(answered: Story, sequence: int) -> None:
    """The producer's second batch has the sequence of the first one, or does not go on from it."""
    resequence(answered, "q", sequence)
    answered.answers.clear()
    found = answered.violations()
    assert list(found) == [7]
    assert f"base_sequence={sequence}) comes behind" in found[7]


def test_an_older_epoch_behind_a_newer_one(answered: Story) -> None:
    resequence(answered, "q", 0, epoch=2)
    assert list(answered.violations()) == [7]


def test_a_duplicate_of_nothing(answered: Story) -> None:
    resequence(answered, "again", 20)
    answered.answers.clear()
    found = answered.violations()
    assert list(found) == [7]
    assert found[7].endswith("was called a duplicate, and stands nowhere")


def test_verdicts_that_change(answered: Story) -> None:
    again = next(a for a in answered.attempts if a.key == f"{PREFIX}q")
    answered.attempts.append(replace(again, verdicts=("duplicate",) * 2))
    assert list(answered.violations()) == [6]


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("q", {"base_offset": 7}, "the receipt says offset 7, it stands at 70"),
        ("again", {"base_offset": 7}, "the receipt says offset 7, it stands at 60"),
        ("a", {"base_offset": None, "is_pending": True}, "its offset was known before, and the receipt says pending"),
        ("a", {"base_offset": None}, "it stands at 0, and the receipt says that it is deleted"),
        ("gap", {"base_offset": 7}, "out_of_order_sequence, and the receipt says Answer("),
        ("gap", {"is_pending": True}, "out_of_order_sequence, and the receipt says Answer("),
        ("gap", {"verdict": "accepted"}, "the commit said out_of_order_sequence, the receipt accepted"),
        ("a", {"position": 9}, "a receipt for batch 9, which nobody committed"),
    ],
)
def test_a_wrong_receipt(answered: Story, key: str, change: dict[str, object], message: str) -> None:
    at = max(n for n, a in enumerate(answered.answers) if a.key == PREFIX + key and a.position == 0)
    answered.answers[at] = replace(answered.answers[at], **change)  # type: ignore[arg-type]
    found = answered.violations()
    assert list(found) == [8]
    assert message in found[8]


def test_an_attempt_whose_process_died(story: Story) -> None:
    """Nobody was told, and the database has it."""
    key, batches = f"{PREFIX}killed", story.attempts[2].batches
    upload(story.storage, key, [BYTES] * len(batches))
    note_begin(story.ledger, key, batches)
    commit_object(story.conn, key, *columns(batches))
    assert list(story.violations()) == [2]
    story.place()
    assert story.violations() == {}


def test_observers_and_ledgers_together(conn: Connection[TupleRow], database_url: str, tmp_path: Path) -> None:
    """What the real watcher and reader remember, and what goes through a ledger file, passes for a right log."""
    create_topic(conn, "orders", 2)
    story = Story(conn=conn, ids=partition_ids(conn, "orders"), storage=tmp_path)
    database = Database(database_url, Settings(), threads=3)
    try:
        ledger = story.ledger
        with Watcher(database, story.ids, ledger) as watcher, Reader(database, watcher, ledger) as reader:
            for number in range(20):
                story.commit(f"{number}")
                materialize(conn, story.ids)
                time.sleep(0.02)
            _write_and_read_back(story, tmp_path)
            watcher.finish()
            reader.finish()
        evidence = story.evidence()
    finally:
        database.close()
    assert [f.violation for f in check(evidence)] == [None] * 8
    assert (len(evidence.origins), watcher.materialized) == (80, 80)
    assert evidence.looks > 0
    assert evidence.readings


def test_a_failing_observer_is_heard_of(database_url: str) -> None:
    class Failing(Watcher):
        def look(self, conn: psycopg.Connection[object]) -> None:
            raise ZeroDivisionError

    database = Database(database_url, Settings(), threads=1)
    try:
        with (
            Failing(database, [1], Ledger()) as watcher,
            pytest.raises(DemoError, match="the watcher failed: ZeroDivisionError"),
        ):
            watcher.finish()
    finally:
        database.close()


def _write_and_read_back(story: Story, directory: Path) -> None:
    ask_noted(story.conn, story.ledger, {a.object_id: a.key for a in story.attempts if a.object_id is not None})
    with LedgerWriter(directory / "producer-0.jsonl") as ledger:
        for attempt in story.attempts:
            ledger.write(attempt)
        for answer in story.answers:
            ledger.write(answer)
    with (directory / "producer-0.jsonl").open("a") as file:
        file.write('{"half a line')
    read = list(LedgerTail(directory).read())
    assert read == [*story.attempts, *story.answers]
    assert story.answers
    story.attempts[:] = [record for record in read if isinstance(record, Attempt)]


def _swap(story: Story, one: str, other: str) -> None:
    """Let two objects change places in the log."""
    objects = find_objects(story.conn, PREFIX)
    a, b = objects[PREFIX + one], objects[PREFIX + other]

    def swapped(column: str) -> str:
        return (
            f"{column} = {column} + (case {column} >> 16 when {a} then {b - a} when {b} then {a - b} else 0 end << 16)"
        )

    story.sql(f"update tidemark.record_batch_events set {swapped('id')}")
    story.sql(f"update tidemark.runs set {swapped('first_id')}, {swapped('last_id')}")


def batch(story: Story, key: str, position: int) -> str:
    """A condition for one batch of an object."""
    object_id = find_objects(story.conn, PREFIX)[PREFIX + key]
    return f"(id >> 16 = {object_id} and byte_offset = {position * BYTES})"


def delete(story: Story, offset: int) -> None:
    """Delete the records below an offset, with their rows, as retention does."""
    for partition_id in story.ids:
        delete_records(story.conn, partition_id, offset)
    assert retain(story.conn).deleted


def resequence(story: Story, key: str, sequence: int, *, epoch: int = 0) -> None:
    at = next(n for n, attempt in enumerate(story.attempts) if attempt.key == PREFIX + key)
    batches = [replace(b, base_sequence=sequence, producer_epoch=epoch) for b in story.attempts[at].batches]
    story.attempts[at] = replace(story.attempts[at], batches=tuple(batches))
