"""A streaming standby: what it answers while it lags, and that nothing acknowledged is lost when it takes over."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import Connection, errors
from psycopg.rows import TupleRow

from config.errors import OffsetNotAvailableError, OffsetOutOfRangeError
from db.commit import Batch, columns, commit_object
from db.fetch import fetch_batches
from db.materialize import materialize
from db.migrate import upgrade
from db.translate import is_transient
from tests.demo.check import check
from tests.demo.evidence import collect, find_objects
from tests.demo.ledger import Ledger, Outcome, Reading, commit_noted, note
from tests.integration.conftest import make_topic
from tests.servers import PostgresServer, Standby, copied, synchronize
from tests.support import wait_until

SETTINGS = {"autovacuum": "off", "wal_receiver_status_interval": "1s"}
PARTITIONS = 3
PRODUCERS = 3


@pytest.fixture
def servers(server_directory: Path, postgres_bin: Path | None) -> Iterator[tuple[PostgresServer, Standby]]:
    """A primary that waits for its standby, which is up to date."""
    with ExitStack() as stack:
        name = f"primary-{time.monotonic_ns()}"
        primary = stack.enter_context(
            PostgresServer(server_directory / name, bin_dir=postgres_bin, settings=SETTINGS).start()
        )
        upgrade(primary.url())
        standby = stack.enter_context(copied(primary, server_directory / f"{name}-mirror", postgres_bin, SETTINGS))
        with psycopg.connect(primary.url(), autocommit=True) as conn:
            synchronize(conn)
        yield primary, standby
        if not primary.running:
            # A killed server leaves its shared memory behind; the next one in its place frees it.
            primary.start()


def connect(server: PostgresServer) -> Connection[TupleRow]:
    return psycopg.connect(server.url(), autocommit=True)


def test_a_standby_that_lags(servers: tuple[PostgresServer, Standby]) -> None:
    """An offset that is not there yet is told apart from one that is nowhere; and who would write may try elsewhere."""
    with connect(servers[0]) as primary, connect(servers[1]) as standby:
        ids = make_topic(primary, "orders", partitions=1)
        commit_object(primary, "a", ids, [10], [0], [1], [0])
        materialize(primary, ids)
        wait_until(lambda: read_end(standby, ids[0]) == 10)

        standby.execute("select pg_wal_replay_pause()")
        wait_until(lambda: standby.execute("select pg_get_wal_replay_pause_state()").fetchone() == ("paused",))
        commit_object(primary, "b", ids, [10], [0], [1], [0])
        materialize(primary, ids)
        assert [batch.start_offset for batch in fetch_batches(primary, ids[0], 15)] == [10]
        with pytest.raises(OffsetNotAvailableError, match=r"offset 15 .* standby, which holds 0 to 10") as caught:
            fetch_batches(standby, ids[0], 15)
        assert is_transient(caught.value)
        assert fetch_batches(standby, ids[0], 10) == []
        with pytest.raises(OffsetOutOfRangeError):
            fetch_batches(standby, ids[0], -1)
        with pytest.raises(OffsetOutOfRangeError):
            fetch_batches(primary, ids[0], 21)
        for write in (
            lambda: commit_object(standby, "c", ids, [10], [0], [1], [0]),
            lambda: commit_object(standby, "a", ids, [10], [0], [1], [0]),
            lambda: materialize(standby, ids),
            lambda: materialize(standby, ids, wait=False),
        ):
            with pytest.raises(errors.ReadOnlySqlTransaction) as refused:
                write()
            assert is_transient(refused.value)

        standby.execute("select pg_wal_replay_resume()")
        wait_until(lambda: read_end(standby, ids[0]) == 20)
        assert [batch.start_offset for batch in fetch_batches(standby, ids[0], 15)] == [10]


def read_end(conn: Connection[Any], partition_id: int) -> int:
    row = conn.execute(
        "select end_offset from tidemark.named_partitions where partition_id = %s", (partition_id,)
    ).fetchone()
    return int(row[0]) if row else 0


class Traffic:
    """Producers, a materializer and a reader of the primary, who write down what they were told until it is gone."""

    def __init__(self, url: str, ids: list[int]) -> None:
        self.url = url
        self.ids = ids
        self.ledger = Ledger()
        # What its producer had no answer for: key, batches, and when the attempt began.
        self.unanswered: list[tuple[str, list[Batch], float]] = []
        self.jobs: list[Future[None]] = []

    def produce(self, number: int) -> None:
        with psycopg.connect(self.url, autocommit=True) as conn:
            turn = 0
            while True:
                turn += 1
                key = f"{number}/{turn}"
                batches = [
                    Batch(
                        partition_id=self.ids[(turn + n) % PARTITIONS],
                        n_records=1 + n,
                        byte_offset=n,
                        byte_length=1,
                        max_timestamp=turn,
                    )
                    for n in range(1 + turn % 4)
                ]
                began = time.monotonic()
                try:
                    with conn.transaction():
                        object_id = commit_object(conn, key, *columns(batches))
                        if turn % 5 == 0:
                            # Others commit meanwhile, and are placed: this one is late.
                            time.sleep(0.01)
                except psycopg.OperationalError:
                    self.unanswered.append((key, batches, began))
                    return
                note(self.ledger, key, batches, began, Outcome.COMMITTED, object_id)

    def materialize(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as conn, suppress(psycopg.OperationalError):
            while True:
                materialize(conn, self.ids, events_per_partition=20)

    def read(self) -> None:
        """Each partition from where it stopped; what it was given must stay so."""
        offsets = dict.fromkeys(self.ids, 0)
        with psycopg.connect(self.url, autocommit=True) as conn, suppress(psycopg.OperationalError):
            while True:
                for partition_id, offset in offsets.items():
                    began = time.monotonic()
                    batches = tuple(fetch_batches(conn, partition_id, offset))
                    for batch in batches[-1:]:
                        offsets[partition_id] = batch.start_offset + batch.n_records
                    self.ledger.readings.append(
                        Reading(
                            partition_id=partition_id,
                            from_offset=offset,
                            batches=batches,
                            began=began,
                            returned=time.monotonic(),
                        )
                    )

    @contextmanager
    def until_the_end_of(self, primary: PostgresServer) -> Iterator[None]:
        """Everybody is at work during the block; then the primary is killed."""
        with ThreadPoolExecutor(PRODUCERS + 2) as threads:
            self.jobs = [threads.submit(self.produce, number) for number in range(PRODUCERS)]
            self.jobs += [threads.submit(self.materialize), threads.submit(self.read)]
            try:
                yield
            finally:
                primary.kill()
            for job in self.jobs:
                job.result(10)
        assert len(self.unanswered) == PRODUCERS

    def wait_until_read(self, batches: int) -> None:
        def so_many_are_read() -> bool:
            read = sum(len(reading.batches) for reading in self.ledger.readings)
            return read > batches or any(job.done() for job in self.jobs)

        wait_until(so_many_are_read, timeout=30)


def test_a_standby_that_takes_over(servers: tuple[PostgresServer, Standby]) -> None:
    primary, standby = servers
    with connect(primary) as conn:
        ids = make_topic(conn, partitions=PARTITIONS)
    traffic = Traffic(primary.url(), ids)
    with traffic.until_the_end_of(primary):
        traffic.wait_until_read(1_000)
    with connect(standby) as conn:
        assert conn.execute("select pg_promote()").fetchone() == (True,)
        # Who had no answer asks again, as a broker does.
        for key, batches, began in traffic.unanswered:
            note(traffic.ledger, key, batches, began, Outcome.COMMITTED, commit_object(conn, key, *columns(batches)))
        after = [
            Batch(partition_id=i, n_records=1, byte_offset=n, byte_length=1, max_timestamp=0) for n, i in enumerate(ids)
        ]
        commit_noted(conn, traffic.ledger, "after", after)
        while materialize(conn, ids).events_processed:
            pass
        last = [fetch_batches(conn, i, read_end(conn, i) - 1)[0].object_key for i in ids]
        assert last == ["after"] * PARTITIONS
        evidence = collect(conn, ids, traffic.ledger)
        late = conn.execute("select count(*) from tidemark.runs where seen_tx is not null").fetchone()
    assert [finding.violation for finding in check(evidence)] == [None] * 8
    assert evidence.placed == len(traffic.ledger.sent) > 1_000
    assert evidence.fetched > 1_000
    assert late
    assert late[0] > 0


def test_an_asynchronous_standby_that_takes_over(servers: tuple[PostgresServer, Standby]) -> None:
    """It has lost what was committed last, also what was acknowledged; what it has is whole and in order.

    No commit is there without those that returned before it began; and what is lost can be committed again.
    """
    primary, standby = servers
    with connect(primary) as conn:
        ids = make_topic(conn, partitions=PARTITIONS)
        conn.execute("alter system reset synchronous_standby_names")
        conn.execute("select pg_reload_conf()")
    traffic = Traffic(primary.url(), ids)
    with traffic.until_the_end_of(primary), connect(primary) as conn, connect(standby) as mirror:
        traffic.wait_until_read(500)
        kept_until = time.monotonic()
        kept = conn.execute("select pg_current_wal_flush_lsn()").fetchone()
        replayed = "select pg_last_wal_replay_lsn() >= %s::pg_lsn"
        wait_until(lambda: mirror.execute(replayed, kept).fetchone() == (True,))
        # The network between them is gone.
        mirror.execute("alter system set primary_conninfo = ''")
        mirror.execute("select pg_reload_conf()")
        traffic.wait_until_read(1_500)
    with connect(standby) as conn:
        assert conn.execute("select pg_promote()").fetchone() == (True,)
        has = find_objects(conn, "")
        everything = traffic.ledger.attempts
        lost = [attempt for attempt in everything if attempt.key not in has]
        assert lost
        first_return_lost = min(attempt.returned for attempt in lost)
        assert first_return_lost > kept_until
        assert all(attempt.began < first_return_lost for attempt in everything if attempt.key in has)
        # The history that is left: without them, and with what was read by then.
        traffic.ledger.attempts = [attempt for attempt in everything if attempt.key in has]
        traffic.ledger.readings = [r for r in traffic.ledger.readings if r.returned < kept_until]
        for key, batches, began in [(a.key, list(a.batches), time.monotonic()) for a in lost] + traffic.unanswered:
            note(traffic.ledger, key, batches, began, Outcome.COMMITTED, commit_object(conn, key, *columns(batches)))
        while materialize(conn, ids).events_processed:
            pass
        evidence = collect(conn, ids, traffic.ledger)
    assert [finding.violation for finding in check(evidence)] == [None] * 8
    assert evidence.fetched > 500
