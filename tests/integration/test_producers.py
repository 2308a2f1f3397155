"""Verdicts and idempotent producers, after Kafka's rules for sequences (ProducerStateManager, KIP-98, KIP-360)."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.errors import SerializationFailure

from config.errors import (
    CommitConflictError,
    CommitTooLargeError,
    FencedProducerError,
    InvalidCommitError,
    UnknownProducerError,
)
from db.commit import Batch, Committed, Verdict, commit_batches, commit_object
from db.materialize import materialize
from db.producers import Producer, expire_producers, init_producer, producer_states
from db.receipts import receipts
from tests.integration.conftest import make_topic
from tests.support import Connect, wait_until

Conn = psycopg.Connection[Any]
LAST = 2**31 - 1


def batch(partition_id: int, n: int = 1, *, producer: int | None = None, epoch: int = 0, sequence: int = 0) -> Batch:
    made = Batch(partition_id=partition_id, n_records=n, byte_offset=0, byte_length=10, max_timestamp=0)
    if producer is None:
        return made
    return replace(made, producer_id=producer, producer_epoch=epoch, base_sequence=sequence)


class Producing:
    """One producer of a partition, each of whose batches is an object of its own."""

    def __init__(self, conn: Conn, partition_id: int, producer_id: int | None = None) -> None:
        self.conn = conn
        self.partition_id = partition_id
        self.producer_id = init_producer(conn).producer_id if producer_id is None else producer_id
        self.objects = 0

    def send(self, sequence: int, n: int = 1, *, epoch: int = 0) -> Committed:
        self.objects += 1
        sent = batch(self.partition_id, n, producer=self.producer_id, epoch=epoch, sequence=sequence)
        return commit_batches(self.conn, f"{self.producer_id}/{self.partition_id}/{self.objects}", [sent])

    def __call__(self, sequence: int, n: int = 1, *, epoch: int = 0) -> Verdict:
        (verdict,) = self.send(sequence, n, epoch=epoch).verdicts
        return verdict


@pytest.fixture
def ids(conn: Conn) -> list[int]:
    return make_topic(conn, partitions=3)


@pytest.fixture
def send(conn: Conn, ids: list[int]) -> Producing:
    return Producing(conn, ids[0])


def events(conn: Conn) -> list[Any]:
    return conn.execute("select id >> 16, id & 65535 from tidemark.record_batch_events order by tx, id").fetchall()


# --- Verdicts


def test_a_verdict_for_each_batch_in_the_order_of_the_request(conn: Conn, ids: list[int]) -> None:
    bad = replace(batch(ids[0]), n_records=0)
    done = commit_batches(conn, "o", [batch(ids[1]), bad, batch(99), batch(ids[0], 5)])
    assert done.verdicts == ["accepted", "malformed", "unknown_partition", "accepted"]
    assert events(conn) == [(done.object_id, 0), (done.object_id, 3)]
    row = conn.execute("select batches, partition_ids, batch_counts from tidemark.objects").fetchone()
    assert row == (2, ids[:2], [1, 1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_records": 0},
        {"n_records": -1},
        {"byte_offset": -1},
        {"byte_length": -1},
        {"max_timestamp": 253402300800000},
        {"producer_id": -2, "producer_epoch": 0, "base_sequence": 0},
        {"producer_id": 1, "producer_epoch": -1, "base_sequence": 0},
        {"producer_id": 1, "producer_epoch": 32768, "base_sequence": 0},
        {"producer_id": 1, "producer_epoch": 0, "base_sequence": -1},
    ],
)
def test_a_malformed_batch_harms_no_other_one(conn: Conn, ids: list[int], wrong: dict[str, int]) -> None:
    done = commit_batches(conn, "o", [replace(batch(ids[0]), **wrong), batch(ids[0])])
    assert done.verdicts == ["malformed", "accepted"]
    assert events(conn) == [(done.object_id, 1)]


def test_an_object_with_nothing_accepted_is_listed_for_deletion(conn: Conn) -> None:
    done = commit_batches(conn, "o", [batch(98), batch(99)])
    assert done.verdicts == ["unknown_partition", "unknown_partition"]
    assert conn.execute("select object_id from tidemark.dead_objects").fetchall() == [(done.object_id,)]
    assert events(conn) == []


def test_a_repeated_commit_gets_the_same_verdicts(conn: Conn, ids: list[int]) -> None:
    """Also where they would be others by now: the partition exists, the sequence follows."""
    producer = init_producer(conn).producer_id
    batches = [batch(ids[0]), batch(ids[2] + 1), batch(ids[1], producer=producer, sequence=5)]
    first = commit_batches(conn, "o", batches)
    assert first.verdicts == ["accepted", "unknown_partition", "out_of_order_sequence"]
    make_topic(conn, "other")
    commit_batches(conn, "p", [batch(ids[1], 5, producer=producer)])
    assert commit_batches(conn, "o", batches) == first
    assert len(events(conn)) == 2
    with pytest.raises(CommitConflictError):
        commit_batches(conn, "o", batches[:2])


def test_the_producers_are_part_of_the_content(conn: Conn, ids: list[int]) -> None:
    commit_batches(conn, "o", [batch(ids[0], producer=1)])
    with pytest.raises(CommitConflictError):
        commit_batches(conn, "o", [batch(ids[0], producer=2)])
    with pytest.raises(CommitConflictError):
        commit_batches(conn, "o", [batch(ids[0])])


def test_commit_object_is_the_same_commit(conn: Conn, ids: list[int]) -> None:
    done = commit_batches(conn, "o", [batch(ids[0])])
    assert commit_object(conn, "o", ids[:1], [1], [0], [10], [0]) == done.object_id


@pytest.mark.parametrize(
    ("batches", "error"),
    [([], InvalidCommitError), ([batch(1)] * 65_537, CommitTooLargeError), ([batch(2**31)], InvalidCommitError)],
)
def test_what_is_wrong_with_the_request_is_an_error(conn: Conn, batches: list[Batch], error: type[Exception]) -> None:
    with pytest.raises(error):
        commit_batches(conn, "o", batches)
    assert conn.execute("select count(*) from tidemark.objects").fetchone() == (0,)


@pytest.mark.parametrize(
    "arrays",
    [
        "'{1}', null, null",
        "'{1}', '{0}', '{0,1}'",
        "'{1,2}', '{0,0}', '{0,0}'",
        "'{}', '{}', '{}'",
        "'{{1}}', '{{0}}', '{{0}}'",
    ],
)
def test_producers_arrays_of_another_length(conn: Conn, ids: list[int], arrays: str) -> None:
    call = f"select tidemark.commit_batches('o', '{{{ids[0]}}}', '{{1}}', '{{0}}', '{{1}}', '{{1}}', {arrays})"
    with pytest.raises(psycopg.Error, match="one element for each of the 1 batches") as caught:
        conn.execute(call.encode())
    assert caught.value.sqlstate == "TM001"


# --- Sequences


def test_sequences_go_on_by_producer_and_partition(conn: Conn, ids: list[int], send: Producing) -> None:
    other_partition = Producing(conn, ids[1], send.producer_id)
    other_producer = Producing(conn, ids[0])
    for sequence in (0, 3, 6):
        assert send(sequence, 3) == "accepted"
    assert other_partition(3) == "out_of_order_sequence"
    assert (other_partition(0), other_producer(0), other_producer(1)) == ("accepted", "accepted", "accepted")
    assert (send(10), send(8), send(9)) == ("out_of_order_sequence", "out_of_order_sequence", "accepted")


def test_the_last_five_batches_again_are_duplicates(conn: Conn, send: Producing) -> None:
    """A sixth one, and a part of one, is out of order."""
    first = [send.send(2 * n, 2) for n in range(7)]
    assert {done.verdicts[0] for done in first} == {"accepted"}
    materialize(conn, [send.partition_id])
    for n in range(7):
        again = send.send(2 * n, 2)
        assert again.verdicts == ["duplicate" if n >= 2 else "out_of_order_sequence"]
        offset = 2 * n if n >= 2 else None
        assert [r.base_offset for r in receipts(conn, [again.object_id])] == [offset]
    assert (send(12, 1), send(13, 1), send(12, 3)) == ("out_of_order_sequence",) * 3
    assert len(events(conn)) == 7


def test_duplicates_in_one_object(conn: Conn, ids: list[int]) -> None:
    def of(sequence: int) -> Batch:
        return batch(ids[0], 2, producer=7, sequence=sequence)

    done = commit_batches(conn, "o", [of(0), of(2), of(0), of(2), of(4), of(9)])
    expected = ["accepted", "accepted", "duplicate", "duplicate", "accepted", "out_of_order_sequence"]
    assert done.verdicts == expected
    materialize(conn, ids)
    assert [r.base_offset for r in receipts(conn, [done.object_id])] == [0, 2, 0, 2, 4, None]


def test_a_new_epoch_begins_at_zero_and_fences_the_old_one(send: Producing) -> None:
    assert (send(0), send(1)) == ("accepted", "accepted")
    assert send(2, epoch=1) == "out_of_order_sequence"
    assert (send(0, epoch=1), send(1, epoch=1)) == ("accepted", "accepted")
    assert (send(2), send(1)) == ("fenced_epoch", "fenced_epoch")
    # Of the old epoch, though the numbers are those of the last batch.
    assert (send(0, epoch=3), send(1, epoch=1), send(1, epoch=3)) == ("accepted", "fenced_epoch", "accepted")


def test_an_unknown_producer_begins_at_zero(send: Producing) -> None:
    assert (send(1), send(0)) == ("out_of_order_sequence", "accepted")


def test_sequences_begin_again_after_the_last_one(conn: Conn, ids: list[int], send: Producing) -> None:
    """Also inside of a batch. (A batch may have as many records as there are sequences.)"""
    assert (send(0, LAST), send(LAST, 1), send(0, 5)) == ("accepted",) * 3
    other = Producing(conn, ids[1])
    assert (other(0, LAST - 1), other(LAST - 1, 5), other(3, 2)) == ("accepted",) * 3
    assert (other(LAST - 1, 5), other(3, 2), other(4, 1)) == ("duplicate", "duplicate", "out_of_order_sequence")
    assert [s.last_sequence for s in producer_states(conn, ids[1])] == [4]


@pytest.mark.parametrize("beside", [[], [98]])
def test_once_round_all_sequences_is_no_duplicate(
    conn: Conn, ids: list[int], send: Producing, beside: list[int]
) -> None:
    """Whether the batches beside it are sound or not."""
    assert (send(0, LAST - 1), send(LAST - 1, 2)) == ("accepted", "accepted")
    again = batch(ids[0], LAST - 1, producer=send.producer_id, sequence=0)
    assert commit_batches(conn, "o", [again, *map(batch, beside)]).verdicts[0] == "accepted"


def test_only_the_last_batches_are_kept(conn: Conn, send: Producing) -> None:
    """At most 69 rows, however many batches; the last five are always among them."""
    for sequence in range(200):
        assert send(sequence) == "accepted"
        row = conn.execute("select count(*), max(ordinal) from tidemark.producer_batches").fetchone()
        assert row is not None
        assert (min(sequence + 1, 5) <= row[0] <= 69, row[1]) == (True, sequence + 1)
    assert send(195) == "duplicate"


def test_the_judged_ones_clean_up_as_well(conn: Conn, ids: list[int]) -> None:
    for n in range(200):
        refused = replace(batch(ids[0]), n_records=0)
        commit_batches(conn, f"o{n}", [batch(ids[0], producer=7, sequence=n), refused])
    row = conn.execute("select count(*) from tidemark.producer_batches").fetchone()
    assert row is not None
    assert row[0] <= 69


def test_state_outlives_the_batches(conn: Conn, send: Producing) -> None:
    assert (send(0), send(1)) == ("accepted", "accepted")
    conn.execute("delete from tidemark.record_batch_events; delete from tidemark.objects")
    again = send.send(1)
    assert again.verdicts == ["duplicate"]
    # Nothing tells its offset any more.
    (receipt,) = receipts(conn, [again.object_id])
    assert (receipt.base_offset, receipt.is_pending) == (None, False)
    assert send(2) == "accepted"


def test_many_producers_and_partitions_in_one_object(conn: Conn, ids: list[int]) -> None:
    def of(sequence: int) -> list[Batch]:
        places = [(p, producer) for producer in range(1, 40) for p in ids]
        return [batch(p, 2, producer=producer, sequence=sequence) for p, producer in reversed(places)]

    for n in range(3):
        assert set(commit_batches(conn, f"o{n}", of(2 * n)).verdicts) == {"accepted"}
    assert set(commit_batches(conn, "again", of(4)).verdicts) == {"duplicate"}
    assert [len(producer_states(conn, p)) for p in ids] == [39, 39, 39]


# --- Two brokers at one moment


def test_the_same_batch_from_two_brokers_at_one_moment(conn: Conn, connect: Connect, send: Producing) -> None:
    """Under another key each: one is appended, the other is its duplicate."""
    connections, barrier = [connect(), connect()], Barrier(2)

    def one(broker: int, sequence: int) -> Committed:
        barrier.wait(20)
        sent = batch(send.partition_id, producer=send.producer_id, sequence=sequence)
        return commit_batches(connections[broker], f"{broker}/{sequence}", [sent])

    with ThreadPoolExecutor(2) as threads:
        for n in range(30):
            done = list(threads.map(one, range(2), [n] * 2))
            assert sorted(d.verdicts[0] for d in done) == ["accepted", "duplicate"]
            materialize(conn, [send.partition_id])
            assert {r.base_offset for r in receipts(conn, [d.object_id for d in done])} == {n}


def test_who_comes_second_waits_and_sees_the_first(conn: Conn, connect: Connect, send: Producing) -> None:
    """The batch after the first one's, committed by a transaction whose id is lower: it would stand before it."""
    slow, early = connect(), connect()
    sent = [batch(send.partition_id, producer=send.producer_id, sequence=n) for n in range(2)]
    early.autocommit = False
    early.execute("select pg_current_xact_id()")
    with slow.transaction():
        commit_batches(slow, "slow", sent[:1])
    with pytest.raises(SerializationFailure, match="Repeat the call in a new transaction"):
        commit_batches(early, "early", sent[1:])
    early.rollback()
    early.autocommit = True
    assert commit_batches(early, "early", sent[1:]).verdicts == ["accepted"]


def test_an_older_snapshot_sees_no_end_of_the_race(connect: Connect, send: Producing) -> None:
    """In repeatable read the other session's batches stay unseen: it says so at once, and does not look for ever."""
    first, second = connect(), connect(autocommit=False)
    second.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    sent = [batch(send.partition_id, producer=send.producer_id)]
    for batches in (sent, [*sent, replace(sent[0], n_records=0)]):
        second.rollback()
        second.execute("select from tidemark.topics")
        commit_batches(first, f"first {len(batches)}", [replace(sent[0], base_sequence=len(batches) - 1)])
        late = [replace(b, base_sequence=len(batches) - 1) for b in batches]
        with pytest.raises(SerializationFailure, match="meanwhile"):
            commit_batches(second, f"second {len(batches)}", late)


def test_a_commit_that_waited_for_one_that_rolled_back(conn: Conn, connect: Connect, send: Producing) -> None:
    first, second = connect(), connect()
    sent = [batch(send.partition_id, producer=send.producer_id)]

    def waits() -> bool:
        question = "select from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
        return conn.execute(question, (second.info.backend_pid,)).rowcount > 0

    with ThreadPoolExecutor(1) as threads:
        with first.transaction(force_rollback=True):
            commit_batches(first, "first", sent)
            waiting = threads.submit(commit_batches, second, "second", sent)
            wait_until(waits)
        assert waiting.result(20).verdicts == ["accepted"]


def test_commits_of_many_producers_in_opposite_order_do_not_wait_in_a_circle(
    conn: Conn, connect: Connect, ids: list[int]
) -> None:
    places = [(p, producer) for p in ids for producer in range(1, 9)]
    barrier = Barrier(2)

    def one(order: Sequence[tuple[int, int]], mine: Conn, name: str) -> int:
        accepted = 0
        for n in range(25):
            barrier.wait(20)
            sent = [batch(p, producer=producer, sequence=n) for p, producer in order]
            verdicts = commit_batches(mine, f"{name}{n}", sent).verdicts
            assert set(verdicts) <= {"accepted", "duplicate"}
            accepted += verdicts.count("accepted")
        return accepted

    with ThreadPoolExecutor(2) as threads:
        done = threads.map(one, (places, places[::-1]), (connect(), connect()), "ab")
        assert sum(done) == 25 * len(places)


# --- Ids and epochs


def test_ids_and_epochs(conn: Conn) -> None:
    one, two = init_producer(conn), init_producer(conn)
    assert (one.producer_epoch, two.producer_epoch, one.producer_id != two.producer_id) == (0, 0, True)
    assert init_producer(conn, one.producer_id) == Producer(one.producer_id, 1)
    assert init_producer(conn, one.producer_id, 1) == Producer(one.producer_id, 2)
    with pytest.raises(FencedProducerError, match=f"producer {one.producer_id} with epoch 1 is fenced: its epoch is 2"):
        init_producer(conn, one.producer_id, 1)
    # One that went on to the next epoch by itself, as clients do since KIP-360.
    assert init_producer(conn, one.producer_id, 5) == Producer(one.producer_id, 6)
    with pytest.raises(UnknownProducerError, match="producer 12345 is not known"):
        init_producer(conn, 12345)
    assert conn.execute("select count(*) from tidemark.producers").fetchone() == (2,)


def test_after_the_last_epoch_comes_a_new_id(conn: Conn) -> None:
    one = init_producer(conn)
    assert init_producer(conn, one.producer_id, 32766).producer_epoch == 32767
    new = init_producer(conn, one.producer_id, 32767)
    assert (new.producer_id != one.producer_id, new.producer_epoch) == (True, 0)


def test_a_raised_epoch_fences_at_once(conn: Conn, send: Producing) -> None:
    assert send(0) == "accepted"
    init_producer(conn, send.producer_id)
    assert (send(1), send(0)) == ("fenced_epoch", "fenced_epoch")
    assert send(0, epoch=1) == "accepted"


def test_epochs_raised_at_one_moment_differ(connect: Connect, send: Producing) -> None:
    with ThreadPoolExecutor(4) as threads:
        connections = [connect() for _ in range(4)]
        raised = list(threads.map(lambda c: [init_producer(c, send.producer_id) for _ in range(10)], connections))
    epochs = sorted(p.producer_epoch for mine in raised for p in mine)
    assert epochs == list(range(1, 41))


def test_what_a_partition_knows_of_its_producers(conn: Conn, ids: list[int]) -> None:
    for producer in (30, 10, 20):
        for n in range(3):
            commit_batches(conn, f"{producer}/{n}", [batch(ids[0], 2, producer=producer, sequence=2 * n)])
    found = producer_states(conn, ids[0])
    assert [(s.producer_id, s.producer_epoch, s.last_sequence, s.batches) for s in found] == [
        (30, 0, 5, 3),
        (20, 0, 5, 3),
        (10, 0, 5, 3),
    ]
    assert all(s.last_commit is not None for s in found)
    assert [s.producer_id for s in producer_states(conn, ids[0], before=30, limit=1)] == [20]
    assert producer_states(conn, ids[0], limit=0) == producer_states(conn, ids[0], before=-(2**63)) == []
    row = conn.execute("select count(*) from tidemark.producer_states(%s, at_most => null)", (ids[0],)).fetchone()
    assert row == (3,)
    assert producer_states(conn, ids[1]) == []


def test_silent_producers_expire(conn: Conn, ids: list[int]) -> None:
    old, new = Producing(conn, ids[0]), Producing(conn, ids[0])
    for n in range(3):
        assert old(n) == "accepted"
    elsewhere = Producing(conn, ids[1], old.producer_id)
    assert elsewhere(0) == "accepted"
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '1 hour'")
    conn.execute("update tidemark.producers set created_at = created_at - interval '1 hour'")
    # One batch within the time keeps a producer, by partition.
    assert (elsewhere(1), new(0)) == ("accepted", "accepted")
    assert expire_producers(conn, silent_seconds=1800) == 1
    known = {p: [s.producer_id for s in producer_states(conn, p)] for p in ids[:2]}
    assert known == {ids[0]: [new.producer_id], ids[1]: [old.producer_id]}
    assert (old(3), elsewhere(2), old(0)) == ("out_of_order_sequence", "accepted", "accepted")
    with pytest.raises(UnknownProducerError):
        init_producer(conn, old.producer_id)
    assert init_producer(conn).producer_id > new.producer_id


def test_a_producer_whose_object_is_forgotten_is_as_old_as_the_next_commit(conn: Conn, ids: list[int]) -> None:
    producing = Producing(conn, ids[0])
    done = producing.send(0)
    commit_object(conn, "later", ids[:1], [1], [0], [1], [0])
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '1 hour'")
    conn.execute("delete from tidemark.objects where id = %s", (done.object_id,))
    assert expire_producers(conn, silent_seconds=7200) == 0
    assert expire_producers(conn, silent_seconds=1800) == 1


def test_pages_of_producers_end(conn: Conn, ids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("db.producers._PAGE", 4)
    for n in range(10):
        commit_batches(conn, f"o{n}", [batch(p, producer=n + 1) for p in ids])
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '1 hour'")
    assert expire_producers(conn, silent_seconds=60) == 30
    assert conn.execute("select count(*) from tidemark.producer_batches").fetchone() == (0,)


def test_expiring_may_begin_at_any_partition(conn: Conn, ids: list[int]) -> None:
    """Or a turn whose time is up would never come to those at the end of its way."""
    for n, partition_id in enumerate(ids):
        commit_batches(conn, f"o{n}", [batch(partition_id, producer=7)])
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '1 hour'")
    assert expire_producers(conn, silent_seconds=60, from_partition_id=ids[1]) == 2
    assert [len(producer_states(conn, p)) for p in ids] == [0, 0, 1]


# --- Against a model


class Model:
    """Kafka's rules for one partition in the plainest form: what each producer has appended."""

    def __init__(self) -> None:
        self.appended: dict[int, list[tuple[int, int, int]]] = {}

    def judge(self, producer: int, epoch: int, sequence: int, n: int) -> str:
        mine = self.appended.setdefault(producer, [])
        newest = max((e for e, _, _ in mine), default=-1)
        of_epoch = [(s, m) for e, s, m in mine if e == epoch]
        if epoch < newest:
            return "fenced_epoch"
        due = (of_epoch[-1][0] + of_epoch[-1][1]) % 2**31 if of_epoch else 0
        if sequence != due:
            return "duplicate" if (sequence, n) in of_epoch[-5:] else "out_of_order_sequence"
        mine.append((epoch, sequence, n))
        return "accepted"


sent = st.tuples(
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from([0, 1, 2, 3, 4, LAST - 1, LAST]),
    st.sampled_from([1, 2, LAST - 1]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(sent, min_size=1, max_size=6), max_size=12))
def test_as_the_model_says(conn: Conn, ids: list[int], objects: list[list[tuple[int, int, int, int]]]) -> None:
    conn.execute("truncate tidemark.producer_batches, tidemark.record_batch_events, tidemark.objects cascade")
    model = Model()
    for number, places in enumerate(objects):
        batches = [batch(ids[0], n, producer=p, epoch=e, sequence=s) for p, e, s, n in places]
        expected = [model.judge(*place) for place in places]
        assert commit_batches(conn, f"o{number}", batches).verdicts == expected
    known = {s.producer_id: s.batches for s in producer_states(conn, ids[0])}
    assert known == {p: len(mine) for p, mine in model.appended.items() if mine}
