"""One producer: threads of a test's process, or a process of its own, `python -m tests.demo.producer ORDER`.

Uploads objects and commits them, several at once, and is difficult in every way a producer may be: slow to commit,
changing its mind, repeating itself, at the same moment too, and repeating itself wrongly; idempotent, and then it
sends what it has no answer for under another key. It asks for the receipts of what it has committed. All goes into its
ledger.

The process' ledger file appears when it is ready. It begins when told to on its standard input, and ends at once when
that closes: nobody is left to tell.
"""

import json
import os
import random
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from enum import Enum, auto
from itertools import accumulate
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, Self

import psycopg

from config.errors import CommitConflictError
from config.settings import load_settings
from db.commit import Batch, Committed, Verdict, columns, commit_batches, commit_object
from db.pool import Database
from db.producers import init_producer
from db.translate import is_transient
from tests.demo.ledger import LedgerWriter, Notes, Outcome, ask_noted, commit_noted, note, note_begin
from tests.demo.storage import upload

# Commits of one producer under way at once: the slow ones must not slow the others down.
THREADS = 4
_BATCHES = (24, 48)
_RECORDS = (1, 50)
_BYTES = (64, 512)
_LONGEST_HOLD = 1.0
_RETRY_PAUSE = 0.2
# After an outage a producer goes on asking so long for what became of its commit.
_RETRIES = 50
# Receipts are asked for so many commits at once, and of so many at most.
_ASKED = 2
_UNASKED = 200


class Kind(Enum):
    """What a producer does with an object."""

    PLAIN = auto()
    SLOW = auto()
    ROLLED_BACK = auto()
    ROLLED_BACK_FIRST = auto()
    REPEATED_LATER = auto()
    REPEATED_AT_ONCE = auto()
    REPEATED_WRONGLY = auto()
    IDEMPOTENT = auto()


# Shuffled, this comes again and again: even a short run meets every kind.
_KINDS = (
    *(Kind.PLAIN,) * 9,
    *(Kind.IDEMPOTENT,) * 3,
    *(Kind.SLOW,) * 2,
    *(Kind.ROLLED_BACK,) * 2,
    Kind.ROLLED_BACK_FIRST,
    Kind.REPEATED_LATER,
    *(Kind.REPEATED_AT_ONCE,) * 2,
    Kind.REPEATED_WRONGLY,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What a producer is to do; `rate` is commits a second. Without `objects`, a directory, nothing is uploaded.

    `ledger` is the file of a process.
    """

    number: int
    key_prefix: str
    rate: float
    partition_ids: Sequence[int]
    objects: str | None = None
    ledger: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shift:
    """From when to when, by the monotonic clock."""

    start: float
    stop: float = float("inf")

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


@dataclass(slots=True)
class Identity:
    """An idempotent producer: one thread's own, since its commits must come one after the other."""

    producer_id: int
    epoch: int
    due: dict[int, int] = field(default_factory=dict)

    def sign(self, batches: Sequence[Batch]) -> list[Batch]:
        """The batches with the next sequences of their partitions."""
        due, signed = self.due, []
        for batch in batches:
            sequence = due.get(batch.partition_id, 0)
            signed.append(
                replace(batch, producer_id=self.producer_id, producer_epoch=self.epoch, base_sequence=sequence)
            )
            due[batch.partition_id] = sequence + batch.n_records
        return signed


class Producer:
    """Several threads that share a schedule."""

    def __init__(self, order: Order, database: Database, notes: Notes) -> None:
        self._order = order
        self._database = database
        self._notes = notes
        self._over = Event()
        self._random = random.Random(f"{order.key_prefix}{order.number}")
        self._lock = Lock()
        self._number = 0
        self._kinds = self._endless_kinds()
        # Keys of what is committed, by object id, whose receipts are to be asked for.
        self._unasked: deque[tuple[int, str]] = deque(maxlen=_UNASKED)

    def run(self, shift: Shift) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            for done in [threads.submit(self._work, shift) for _ in range(THREADS)]:
                done.result()

    def end(self) -> None:
        """Let `run` return after the commits at hand."""
        self._over.set()

    def _work(self, shift: Shift) -> None:
        identity: Identity | None = None
        while True:
            with self._lock:
                number, kind = self._number, next(self._kinds)
                self._number += 1
                key, batches = self._draw(number)
                hold, pause = (self._random.uniform(0, _LONGEST_HOLD) for _ in range(2))
            due = shift.start + number / self._order.rate
            if due >= shift.stop or time.monotonic() >= shift.stop or self._over.wait(max(0.0, due - time.monotonic())):
                return
            if self._order.objects is not None:
                upload(Path(self._order.objects), key, [batch.byte_length for batch in batches])
            if kind is Kind.IDEMPOTENT:
                identity = self._commit_in_sequence(identity, key, batches)
            else:
                self._carry_out(kind, key, batches, hold, pause)
            self._ask()

    def _carry_out(self, kind: Kind, key: str, batches: Sequence[Batch], hold: float, pause: float) -> None:
        match kind:
            case Kind.PLAIN:
                self._commit(key, batches)
            case Kind.SLOW:
                self._commit(key, batches, hold=hold)
            case Kind.ROLLED_BACK:
                self._roll_back(key, batches, hold=hold / 2)
            case Kind.ROLLED_BACK_FIRST:
                self._roll_back(key, batches, hold=hold / 2)
                self._commit(key, batches)
            case Kind.REPEATED_LATER:
                self._commit(key, batches)
                time.sleep(pause)
                self._commit(key, batches)
            case Kind.REPEATED_AT_ONCE:
                # Whichever comes second has to wait for the other's transaction.
                with ThreadPoolExecutor(2) as both:
                    for done in [both.submit(self._commit, key, batches, hold=hold / 2) for _ in range(2)]:
                        done.result()
            case Kind.REPEATED_WRONGLY:
                self._commit(key, batches)
                time.sleep(pause)
                self._commit(key, [replace(batches[0], n_records=batches[0].n_records + 1), *batches[1:]])

    def _commit(self, key: str, batches: Sequence[Batch], *, hold: float = 0.0) -> None:
        """Commit, and after a lost connection again: that is what the replay is for."""
        for _ in range(_RETRIES):
            began = note_begin(self._notes, key, batches)
            object_id = None
            try:
                if hold:
                    with self._database.connection() as conn, conn.transaction():
                        object_id = commit_object(conn, key, *columns(batches))
                        time.sleep(hold)
                else:
                    with self._database.connection() as conn:
                        object_id = commit_object(conn, key, *columns(batches))
                outcome = Outcome.COMMITTED
            except CommitConflictError:
                outcome = Outcome.REFUSED
            except Exception as error:
                if not is_transient(error):
                    raise
                outcome, object_id = Outcome.UNKNOWN, None
            self._note(key, batches, began, outcome, object_id)
            if outcome is not Outcome.UNKNOWN:
                return
            time.sleep(_RETRY_PAUSE)

    def _commit_in_sequence(self, identity: Identity | None, key: str, batches: Sequence[Batch]) -> Identity | None:
        """Commit as the idempotent producer of this thread; what has no answer is sent again under another key."""
        if identity is None:
            with Outage(), self._database.connection() as conn:
                known = init_producer(conn)
                identity = Identity(known.producer_id, known.producer_epoch)
        if identity is None:
            return None
        signed = identity.sign(batches)
        for attempt in range(_RETRIES):
            attempt_key = f"{key}.{attempt}" if attempt else key
            if attempt and self._order.objects is not None:
                upload(Path(self._order.objects), attempt_key, [batch.byte_length for batch in batches])
            began = note_begin(self._notes, attempt_key, signed)
            done: Committed | None = None
            with Outage(), self._database.connection() as conn:
                done = commit_batches(conn, attempt_key, signed)
            if done is not None:
                self._note(attempt_key, signed, began, Outcome.COMMITTED, done.object_id, done.verdicts)
                # After a silence so long that it was forgotten, or fenced: it begins again as a new one.
                return identity if {*done.verdicts} <= {"accepted", "duplicate"} else None
            self._note(attempt_key, signed, began, Outcome.UNKNOWN)
            time.sleep(_RETRY_PAUSE)
        return None

    def _note(
        self,
        key: str,
        batches: Sequence[Batch],
        began: float,
        outcome: Outcome,
        object_id: int | None = None,
        verdicts: Sequence[Verdict] = (),
    ) -> None:
        note(self._notes, key, batches, began, outcome, object_id, verdicts)
        if object_id is not None:
            self._unasked.append((object_id, key))

    def _ask(self) -> None:
        """Ask what became of the oldest commits; those that have no offset yet are asked for again."""
        with self._lock:
            asked = dict(self._unasked.popleft() for _ in range(min(_ASKED, len(self._unasked))))
        if not asked:
            return
        with Outage(), self._database.connection() as conn:
            pending = {r.object_id for r in ask_noted(conn, self._notes, asked) if r.is_pending}
            self._unasked.extend((object_id, asked[object_id]) for object_id in pending)

    def _roll_back(self, key: str, batches: Sequence[Batch], *, hold: float) -> None:
        began = note_begin(self._notes, key, batches)
        with Outage(), self._database.connection() as conn, conn.transaction(force_rollback=True):
            commit_object(conn, key, *columns(batches))
            time.sleep(hold)
        note(self._notes, key, batches, began, Outcome.ROLLED_BACK)

    def _draw(self, number: int) -> tuple[str, list[Batch]]:
        draw = self._random.randint
        lengths = [draw(*_BYTES) for _ in range(draw(*_BATCHES))]
        now = _now()
        batches = [
            Batch(
                partition_id=self._random.choice(self._order.partition_ids),
                n_records=draw(*_RECORDS),
                byte_offset=end - length,
                byte_length=length,
                max_timestamp=now,
            )
            for length, end in zip(lengths, accumulate(lengths), strict=True)
        ]
        return f"{self._order.key_prefix}producer-{self._order.number}/commit-{number:06d}", batches

    def _endless_kinds(self) -> Iterator[Kind]:
        while True:
            yield from self._random.sample(_KINDS, len(_KINDS))


class Outage:
    """Leaves out what an outage caused."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        return isinstance(error, Exception) and is_transient(error)


def commit_everywhere(
    conn: psycopg.Connection[Any], objects: Path, notes: Notes, key: str, partition_ids: Sequence[int]
) -> int:
    """Upload and commit one batch for every partition; returns the object's id."""
    length = _BYTES[0]
    batches = [
        Batch(partition_id=i, n_records=1, byte_offset=n * length, byte_length=length, max_timestamp=_now())
        for n, i in enumerate(partition_ids)
    ]
    upload(objects, key, [length] * len(batches))
    return commit_noted(conn, notes, key, batches)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _end_with_standard_input() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


def main(arguments: Sequence[str]) -> None:
    order = Order.from_json(arguments[0])
    settings = load_settings()
    if settings.database_url is None:
        raise SystemExit("TIDEMARK_DATABASE_URL is not set")
    database = Database(settings.database_url, settings, threads=THREADS)
    try:
        database.pool.wait()
        with LedgerWriter(Path(order.ledger)) as ledger:
            line = sys.stdin.readline()
            if not line:
                raise SystemExit(1)
            Thread(target=_end_with_standard_input, daemon=True).start()
            Producer(order, database, ledger).run(Shift.from_json(line))
    finally:
        database.close()


if __name__ == "__main__":
    main(sys.argv[1:])
