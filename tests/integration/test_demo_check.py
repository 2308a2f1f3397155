"""The demo's check fails for every kind of violation, and names the first row that offends."""

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
from db.commit import Batch, columns, commit_object
from db.fetch import fetch_batches
from db.materialize import materialize
from db.pool import Database
from db.topics import create_topic, partition_ids
from tests.demo.check import Evidence, Finding, check
from tests.demo.evidence import collect, find_objects, read_partitions
from tests.demo.ledger import Attempt, Ledger, LedgerTail, LedgerWriter, Outcome, Reading, Sighting, note
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

    @property
    def attempts(self) -> list[Attempt]:
        return self.ledger.attempts

    @property
    def sightings(self) -> list[Sighting]:
        return self.ledger.sightings

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

    def place(self) -> None:
        """Give what is pending its offsets, one batch in a run: then the tests can bend single batches."""
        while materialize(self.conn, self.ids, events_per_partition=1).events_processed:
            pass

    def see(self) -> None:
        """Look at both partitions as the watcher and the reader do."""
        known = {s.partition_id: s.end_offset for s in self.sightings}
        for partition_id, log in read_partitions(self.conn, self.ids).items():
            self.sightings.append(
                Sighting(
                    partition_id=partition_id,
                    start_offset=log.start_offset,
                    end_offset=log.end_offset,
                    new_records=log.end_offset - known.get(partition_id, 0),
                )
            )
            self.ledger.readings += [
                Reading(partition_id=partition_id, batch=batch)
                for batch in fetch_batches(self.conn, partition_id, log.start_offset)
            ]

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


def test_passes_what_is_right(story: Story) -> None:
    findings = check(replace(story.evidence(), looks=4, fetched=8))
    assert findings == [
        Finding(number=1, name="contiguous", counted="12 batches in 2 partitions", violation=None),
        Finding(number=2, name="exactly once", counted="12 events, 1 rollbacks", violation=None),
        Finding(number=3, name="real-time order", counted="3 commits in 2 partitions", violation=None),
        Finding(number=4, name="immutable", counted="8 batches read meanwhile", violation=None),
        Finding(number=5, name="never back", counted="4 looks at the offsets", violation=None),
        Finding(number=6, name="replay-safe", counted="1 repeated, 1 conflicts refused", violation=None),
    ]


def test_gap(story: Story) -> None:
    story.sql(f"delete from tidemark.runs where partition_id = {story.ids[1]} and start_offset in (20, 40)")
    assert story.violations() == {
        1: f"orders/1: offset 20 is due, found [30, 40) of {PREFIX}b bytes 240+80",
        2: f"orders/1: committed and lost: {PREFIX}b {story.attempts[2].batches[1]}",
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
    assert story.violations() == {2: f"orders/0: committed and lost: {lost.key} {lost.batches[0]}"}


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
    assert found[2] == f"orders/0: rolled back, yet placed: [0, 10) of {PREFIX}a bytes 0+80"


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
    seen = story.readings[1]
    story.readings[1] = replace(seen, batch=replace(seen.batch, object_key=f"{PREFIX}other"))
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
    assert [f.violation for f in check(evidence)] == [None] * 6
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
    with LedgerWriter(directory / "producer-0.jsonl") as ledger:
        for attempt in story.attempts:
            ledger.write(attempt)
    with (directory / "producer-0.jsonl").open("a") as file:
        file.write('{"half a line')
    read = list(LedgerTail(directory).read())
    assert read == story.attempts
    story.attempts[:] = read


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
