"""Kills a process at every boundary of its statements: before what it sends to Postgres, and behind the answer.

`python -m tests.faults.boundaries ORDER` does every kind of work that Tidemark does in a child process, which ends
itself at the first boundary; then in another one, which ends itself at the second; and so on until one comes through.
Attempts to commit go into its ledger. Its last line says how often it has killed.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Self

import psycopg

from config.errors import InvalidTopicError, TopicExistsError, UnknownTopicError
from config.settings import STRATEGIES
from db.audit import audit
from db.commit import Batch, columns, commit_batches, commit_object
from db.discover import find_committed, save_fan_out, sweep
from db.fetch import fetch_batches
from db.materialize import materialize
from db.objects import condemn, forget_dead_objects, take_dead_objects
from db.producers import init_producer
from db.retention import delete_records, purge, retain
from db.topics import add_partitions, create_topic, delete_topic
from tests.demo.ledger import LedgerWriter, Outcome, note, note_begin
from tests.demo.storage import upload

Conn = psycopg.Connection[Any]


class Boundaries:
    """Counts what passes between this process and Postgres, and ends the process at the one that was asked for."""

    def __init__(self) -> None:
        self.left: int | None = None
        # Every round trip of psycopg's is one call of `wait`.
        wait = psycopg.Connection.wait

        def counted(conn: Conn, *arguments: Any, **options: Any) -> Any:
            self._pass()
            result = wait(conn, *arguments, **options)
            self._pass()
            return result

        psycopg.Connection.wait = counted  # type: ignore[assignment, method-assign]

    def _pass(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """All kinds of work `rounds` times on these partitions; of the log at most half is deleted.

    `objects` is the directory to upload to.
    """

    url: str
    objects: str
    ledger: str
    key_prefix: str
    partition_ids: Sequence[int]
    rounds: int
    seed: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


class Nursery:
    """Bears the children, and knows what each is to do."""

    def __init__(self, order: Order, notes: LedgerWriter) -> None:
        self._order = order
        self._notes = notes
        self._chance = random.Random(order.seed)
        self._keys = count()
        self._boundaries = Boundaries()
        self.killed = 0

    def run(self) -> None:
        for _ in range(self._order.rounds):
            for work in self._works():
                for boundary in count():
                    if not self._dies(work(), boundary):
                        break
                    self.killed += 1

    def _works(self) -> Iterator[Callable[[], Callable[[Conn], object]]]:
        """Each makes one piece of work; what it draws is drawn here, so that a seed repeats it."""
        ids, chance = self._order.partition_ids, self._chance
        doomed = f"{self._order.key_prefix.strip('/')}-doomed"
        yield self._commit
        yield lambda: self._commit(in_transaction=True)
        yield self._commit_in_sequence
        for strategy in STRATEGIES:
            yield (
                lambda strategy=strategy: (
                    lambda conn: materialize(  # type: ignore[misc]
                        conn, ids, events_per_partition=chance.choice([1, 10, 1000]), strategy=strategy
                    )
                )
            )
        yield lambda: lambda conn: save_fan_out(conn, find_committed(conn))
        yield lambda: lambda conn: list(sweep(conn))
        yield lambda: _delete_half(chance.choice(ids))
        yield lambda: retain
        yield (
            lambda: (
                lambda conn: forget_dead_objects(
                    conn, [o.id for o in take_dead_objects(conn, older_than_seconds=0, limit=100)]
                )
            )
        )
        yield lambda: lambda conn: condemn(conn, [f"{self._order.key_prefix}condemned/{next(self._keys)}"])
        yield lambda: audit
        yield lambda: init_producer
        name = f"{doomed}-{next(self._keys)}"
        yield lambda: _unless_done(lambda conn: create_topic(conn, name, 2))
        yield lambda: _unless_done(lambda conn: add_partitions(conn, name, 3))
        yield lambda: _unless_done(lambda conn: delete_topic(conn, name))
        yield lambda: purge

    def _dies(self, work: Callable[[Conn], object], boundary: int) -> bool:
        """Do it in a child that dies at this boundary; whether it came so far."""
        pid = os.fork()
        if not pid:
            code = 1
            try:
                with psycopg.connect(self._order.url, autocommit=True) as conn:
                    self._boundaries.left = boundary
                    work(conn)
                    self._boundaries.left = None
                code = 0
            except BaseException as error:  # noqa: BLE001 - the parent hears of it by the exit code
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
            finally:
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return True
        if status:
            raise SystemExit(f"a child failed at boundary {boundary}")
        return False

    def _batches(self) -> list[Batch]:
        chosen = self._chance.sample(self._order.partition_ids, k=min(4, len(self._order.partition_ids)))
        now = time.time_ns() // 1_000_000
        return [
            Batch(partition_id=i, n_records=1 + n, byte_offset=100 * n, byte_length=100, max_timestamp=now)
            for n, i in enumerate(chosen)
        ]

    def _upload(self, batches: Sequence[Batch]) -> str:
        """Upload them under a new key; returns it."""
        key = f"{self._order.key_prefix}{next(self._keys)}"
        upload(Path(self._order.objects), key, [batch.byte_length for batch in batches])
        return key

    def _commit(self, *, in_transaction: bool = False) -> Callable[[Conn], object]:
        """A new object; now and then the one before, whose child was killed, is committed once more."""
        batches = self._batches()
        key = self._upload(batches)

        def work(conn: Conn) -> None:
            # A second attempt tells what became of the first.
            for _ in range(2):
                began = note_begin(self._notes, key, batches)
                if in_transaction:
                    with conn.transaction():
                        object_id = commit_object(conn, key, *columns(batches))
                else:
                    object_id = commit_object(conn, key, *columns(batches))
                note(self._notes, key, batches, began, Outcome.COMMITTED, object_id)

        return work

    def _commit_in_sequence(self) -> Callable[[Conn], object]:
        batches = self._batches()
        keys = [self._upload(batches) for _ in range(2)]

        def work(conn: Conn) -> None:
            producer = init_producer(conn)
            signed = [
                replace(b, producer_id=producer.producer_id, producer_epoch=producer.producer_epoch, base_sequence=0)
                for b in batches
            ]
            # The same batches under another key: duplicates.
            for key in keys:
                began = note_begin(self._notes, key, signed)
                done = commit_batches(conn, key, signed)
                note(self._notes, key, signed, began, Outcome.COMMITTED, done.object_id, done.verdicts)

        return work


def _delete_half(partition_id: int) -> Callable[[Conn], object]:
    def work(conn: Conn) -> None:
        row = conn.execute(
            "select (start_offset + end_offset) / 2 from tidemark.named_partitions where partition_id = %s",
            (partition_id,),
        ).fetchone()
        if row is not None:
            start = delete_records(conn, partition_id, row[0])
            fetch_batches(conn, partition_id, start)

    return work


def _unless_done(work: Callable[[Conn], object]) -> Callable[[Conn], object]:
    """What a killed child may have done already, and cannot be done twice."""

    def once(conn: Conn) -> None:
        try:
            work(conn)
        except (InvalidTopicError, TopicExistsError, UnknownTopicError):
            conn.execute("select")

    return once


def main(arguments: Sequence[str]) -> None:
    order = Order.from_json(arguments[0])
    with LedgerWriter(Path(order.ledger)) as notes:
        nursery = Nursery(order, notes)
        nursery.run()
    sys.stdout.write(f"{nursery.killed}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
