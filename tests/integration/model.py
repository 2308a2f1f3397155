"""What Tidemark's public interface answers, in its plainest form: lists in memory, no concurrency, no limits on work.

It is told what cannot be predicted (ids, transactions, where runs were cut) when it is there, and checks it then.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple
from uuid import UUID

from db.commit import Batch, Verdict
from db.fetch import EARLIEST, LATEST, MAX_TIMESTAMP, FetchError, FetchRequest

# No run has more batches.
RUN = 64
# So many batches of a producer are remembered as what may come again.
REMEMBERED = 5
# Runs that list_offsets reads where only a deleted batch is known to have had the time.
RUNS_SEARCHED = 8
LAST_SEQUENCE = 2**31 - 1
LATEST_TIME = 253402300799999
# Older than any limit of retention here; a limit is an hour, and objects are aged by a day.
OLD = 100_000
HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class Event:
    """An accepted batch. Ordered as offsets are: by transaction, then by object, then by its place in the request."""

    tx: int
    object_id: int
    position: int
    key: str
    batch: Batch

    @property
    def order(self) -> tuple[int, int, int]:
        return self.tx, self.object_id, self.position


class Claim(NamedTuple):
    """A batch that an idempotent producer has appended; `ordinal` counts them in the partition."""

    ordinal: int
    event: Event

    @property
    def owner(self) -> tuple[int, int]:
        return self.event.batch.partition_id, self.event.batch.producer_id or 0

    @property
    def epoch(self) -> int:
        return self.event.batch.producer_epoch or 0

    @property
    def base(self) -> int:
        return self.event.batch.base_sequence or 0

    @property
    def last(self) -> int:
        return (self.base + self.event.batch.n_records - 1) & LAST_SEQUENCE


@dataclass(kw_only=True)
class Object:
    """A commit, or a condemned key, which has no content."""

    id: int
    tx: int
    key: str
    content: list[Batch]
    verdicts: list[Verdict]
    events: dict[int, Event]
    # Of duplicates: the first one.
    firsts: dict[int, Event]
    claims: list[Claim]
    # Read on the machine's clock.
    began: int = 0
    returned: int = 0
    aged: bool = False
    deleted: int = 0

    @property
    def is_condemned(self) -> bool:
        return not self.content

    @property
    def is_dead(self) -> bool:
        return self.deleted == len(self.events)


@dataclass
class Judged:
    """What becomes of the batches of an object; `is_race`: what a producer follows has a higher transaction id."""

    verdicts: list[Verdict] = field(default_factory=list)
    events: dict[int, Event] = field(default_factory=dict)
    firsts: dict[int, Event] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)
    is_race: bool = False


class Placed(NamedTuple):
    """A batch with its offset."""

    start: int
    event: Event

    @property
    def end(self) -> int:
        return self.start + self.event.batch.n_records


class Run(NamedTuple):
    start: int
    end: int
    batches: int


@dataclass
class Partition:
    """A partition: all that ever got an offset, and how much of it is deleted."""

    id: int
    topic: str
    number: int
    log: list[Placed] = field(default_factory=list)
    cursor: tuple[int, int, int] = (0, 0, 0)
    begins: int = 0
    start: int = 0
    # Batches that retention has deleted, the first of the log, and the offset behind them.
    gone: int = 0
    deleted_to: int = 0
    runs: list[Run] = field(default_factory=list)
    is_deleted: bool = False

    @property
    def end(self) -> int:
        return self.log[-1].end if self.log else self.begins

    @property
    def has_begun(self) -> bool:
        return bool(self.log or self.begins)

    @property
    def kept(self) -> list[Placed]:
        """What readers see."""
        return [p for p in self.log if p.end > self.start]

    def pending(self, visible: Iterable[Event]) -> tuple[list[Event], list[Event]]:
        """What waits, late transactions and the others, in the order in which they get offsets.

        Late ones come one after the other, and first the one that the last pass did not place to its end.
        """
        placed = {p.event for p in self.log}
        waiting = [e for e in visible if e.batch.partition_id == self.id and e not in placed]
        resumed = self.log[-1].event.tx if self.log else 0
        late = sorted((e for e in waiting if e.order < self.cursor), key=lambda e: (e.tx != resumed, e.order))
        return late, sorted((e for e in waiting if e.order > self.cursor), key=lambda e: e.order)

    def place(self, events: Iterable[Event]) -> None:
        for event in events:
            self.log.append(Placed(self.end, event))
            self.cursor = max(self.cursor, event.order)

    def cut(self, runs: list[Run]) -> None:
        """Be told where runs begin and end: whole batches, at most so many, one behind the other."""
        edges = [self.deleted_to, *(run.end for run in runs)]
        assert [(run.start, run.end) for run in runs] == list(pairwise(edges)), self
        assert edges[-1] == self.end, self
        ends = [p.end for p in self.log]
        for run in runs:
            count = bisect_right(ends, run.end) - bisect_right(ends, run.start)
            assert (run.end in ends, run.batches) == (True, count), (self, run)
            assert count <= RUN
        self.runs = runs

    def fetch(self, offset: int, max_bytes: int, max_batches: int, *, at_least_one: bool = True) -> list[Placed]:
        found: list[Placed] = []
        size = 0
        for placed in self.kept:
            if placed.end <= offset:
                continue
            size += placed.event.batch.byte_length
            if len(found) == max_batches or (size > max_bytes and (found or not at_least_one)):
                break
            found.append(placed)
            if size >= max_bytes:
                break
        return found

    def find_time(self, wanted: int) -> tuple[int | None, int | None]:
        """The offset and the time of the first batch that may have that time or a later one."""
        kept = self.kept
        matching = [p for p in kept if p.event.batch.max_timestamp >= wanted]
        hidden = any(p.event.batch.max_timestamp >= wanted for p in self.log[: len(self.log) - len(kept)])
        reach = self.end
        if hidden:
            # Only what is deleted is known to have it: the first runs are searched.
            ends = [run.end for run in self.runs]
            reach = [*ends, self.end][min(bisect_right(ends, self.start) + RUNS_SEARCHED, len(ends)) - 1] if ends else 0
        for placed in matching:
            if placed.end <= reach:
                return max(placed.start, self.start), placed.event.batch.max_timestamp
        if hidden and kept:
            return self.start, kept[0].event.batch.max_timestamp
        return None, None


@dataclass
class Topic:
    id: UUID
    name: str
    ids: list[int]
    retention_ms: int | None
    retention_bytes: int | None


class Answer(NamedTuple):
    """A receipt: partition, verdict, offset, whether it is pending."""

    partition_id: int | None
    verdict: Verdict
    base_offset: int | None
    is_pending: bool


class Model:
    def __init__(self) -> None:
        self.topics: dict[str, Topic] = {}
        # Those of deleted topics as well.
        self.partitions: dict[int, Partition] = {}
        # Committed and condemned, until they are forgotten.
        self.objects: dict[str, Object] = {}
        # Committed, in no order, until they are deleted.
        self.visible: list[Event] = []
        self.appended: dict[tuple[int, int], list[Claim]] = {}
        # Of producers that have an id.
        self.epochs: dict[int, int] = {}

    @property
    def live(self) -> list[Partition]:
        return [p for p in self.partitions.values() if not p.is_deleted]

    def partition(self, partition_id: int) -> Partition | None:
        found = self.partitions.get(partition_id)
        return found if found and not found.is_deleted else None

    # --- Commits

    def judge(self, tx: int, object_id: int, key: str, content: Sequence[Batch], own: Sequence[Claim] = ()) -> Judged:
        """What a commit of the transaction `tx`, which has appended `own` before, makes of these batches."""
        done = Judged()
        for position, batch in enumerate(content):
            before = self.claims_of(batch, [*own, *done.claims])
            verdict, first = self._verdict(batch, before)
            done.verdicts.append(verdict)
            if first:
                done.firsts[position] = first
            if verdict != "accepted":
                continue
            done.events[position] = event = Event(tx, object_id, position, key, batch)
            if batch.producer_id is not None:
                done.is_race |= bool(before) and before[-1].event.tx > tx
                done.claims.append(Claim(before[-1].ordinal + 1 if before else 1, event))
        return done

    def claims_of(self, batch: Batch, own: Iterable[Claim]) -> list[Claim]:
        owner = batch.partition_id, batch.producer_id or 0
        return [*self.appended.get(owner, ()), *(c for c in own if c.owner == owner)]

    def _verdict(self, b: Batch, before: Sequence[Claim]) -> tuple[Verdict, Event | None]:
        epoch, base = b.producer_epoch or 0, b.base_sequence or 0
        if b.n_records < 1 or b.byte_offset < 0 or b.byte_length < 0 or b.max_timestamp > LATEST_TIME or base < 0:
            return "malformed", None
        if b.producer_id is None or not self.partition(b.partition_id):
            return ("accepted" if self.partition(b.partition_id) else "unknown_partition"), None
        head = before[-1] if before else None
        if epoch < max(head.epoch if head else 0, self.epochs.get(b.producer_id, 0)):
            return "fenced_epoch", None
        goes_on = head is not None and head.epoch == epoch
        if base == ((head.last + 1) & LAST_SEQUENCE if head and goes_on else 0):
            return "accepted", None
        for claim in before[-REMEMBERED:] if goes_on else ():
            if (claim.epoch, claim.base, claim.event.batch.n_records) == (epoch, base, b.n_records):
                return "duplicate", claim.event
        return "out_of_order_sequence", None

    def commit(self, committed: Object, returned: int) -> None:
        committed.returned = returned
        self.objects[committed.key] = committed
        self.visible += committed.events.values()
        for claim in committed.claims:
            self.appended.setdefault(claim.owner, []).append(claim)

    def receipts(self, committed: Object, moved: set[int] | None) -> list[tuple[int, Answer]]:
        """Of each batch its place, from 1, and what became of it."""
        found = []
        for position, verdict in enumerate(committed.verdicts):
            event = committed.events.get(position) or committed.firsts.get(position)
            answer = self._receipt(verdict, committed.content[position], event)
            partition_id = committed.content[position].partition_id
            if moved is None or (partition_id in moved and answer.base_offset is not None):
                found.append((position + 1, answer))
        return found

    def _receipt(self, verdict: Verdict, batch: Batch, event: Event | None) -> Answer:
        if event is None:
            return Answer(batch.partition_id, verdict, None, is_pending=False)
        if event not in self.visible:
            # What is deleted: nothing but a refusal tells the partition.
            return Answer(batch.partition_id if verdict == "duplicate" else None, verdict, None, is_pending=False)
        offset = next((p.start for p in self.partitions[batch.partition_id].log if p.event == event), None)
        return Answer(batch.partition_id, verdict, offset, is_pending=offset is None)

    # --- Reading

    def fetch_error(self, request: FetchRequest) -> FetchError | None:
        partition = self.partition(request.partition_id)
        if request.from_offset < 0 or request.max_bytes < 1:
            return "malformed"
        if not partition:
            return "unknown_partition"
        return None if partition.start <= request.from_offset <= partition.end else "offset_out_of_range"

    def fetch(
        self, requests: Sequence[FetchRequest], max_bytes: int, max_batches: int
    ) -> list[tuple[FetchError | None, list[Placed]]]:
        """For each request its error and batches, within what those before it have left."""
        answers: list[tuple[FetchError | None, list[Placed]]] = []
        for request in requests:
            error = self.fetch_error(request)
            found: list[Placed] = []
            first = not any(placed for _, placed in answers)
            if not error and max_batches and (max_bytes > 0 or first):
                most = min(request.max_bytes, max_bytes)
                found = self.partitions[request.partition_id].fetch(
                    request.from_offset, most, max_batches, at_least_one=first
                )
            max_bytes -= sum(p.event.batch.byte_length for p in found)
            max_batches -= len(found)
            answers.append((error, found))
        return answers

    def list_offset(self, partition_id: int, wanted: int) -> tuple[FetchError | None, int | None, int | None]:
        partition = self.partition(partition_id)
        if wanted < MAX_TIMESTAMP:
            return "malformed", None, None
        if not partition:
            return "unknown_partition", None, None
        if wanted in (LATEST, EARLIEST):
            return None, partition.end if wanted == LATEST else partition.start, None
        if wanted == MAX_TIMESTAMP:
            wanted = max((p.event.batch.max_timestamp for p in partition.log), default=-1)
        return None, *(partition.find_time(wanted) if wanted >= 0 else (None, None))

    # --- Deleting

    def expired(self, partition: Partition) -> list[Run]:
        """The first runs, all of which retention deletes."""
        topic = self.topics[partition.topic]
        sizes = list(accumulate((p.event.batch.byte_length for p in partition.log), initial=0))
        ends = [p.end for p in partition.log]
        found = []
        for run in partition.runs:
            first, behind = bisect_right(ends, run.start), bisect_right(ends, run.end)
            left = sizes[-1] - sizes[behind]
            by_size = topic.retention_bytes is not None and left >= topic.retention_bytes
            by_time = topic.retention_ms is not None and all(
                0 <= p.event.batch.max_timestamp < OLD or self.objects[p.event.key].aged
                for p in partition.log[first:behind]
            )
            if not (run.end <= partition.start or by_size or by_time):
                break
            found.append(run)
        return found

    def retain(self) -> list[Event]:
        """Delete what is beyond the limits; returns it."""
        deleted: list[Event] = []
        for partition in self.live:
            runs = self.expired(partition)
            if runs:
                behind = partition.gone + sum(run.batches for run in runs)
                deleted += [p.event for p in partition.log[partition.gone : behind]]
                partition.gone, partition.deleted_to = behind, runs[-1].end
                partition.start = max(partition.start, partition.deleted_to)
                partition.runs = partition.runs[len(runs) :]
        return deleted

    def delete(self, events: Iterable[Event]) -> int:
        """Forget events that are deleted; returns how many objects have none left by that."""
        gone = set(events)
        self.visible = [e for e in self.visible if e not in gone]
        touched = {e.key: self.objects[e.key] for e in gone}
        for event in gone:
            touched[event.key].deleted += 1
        return sum(o.is_dead for o in touched.values())

    def delete_records(self, partition: Partition, before: int) -> int:
        target = partition.end if before == LATEST else min(before, partition.end)
        partition.start = max(partition.start, target)
        return partition.start

    # --- Producers

    def silent(self) -> list[tuple[int, int]]:
        """Of which partition and producer the last batch is old; a batch of an object that is forgotten is as old as
        the next commit."""
        by_tx = sorted(self.objects.values(), key=lambda o: o.tx)
        found = []
        for owner, claims in self.appended.items():
            event = claims[-1].event
            known = self.objects.get(event.key)
            if not known or known.id != event.object_id:
                known = next((o for o in by_tx if o.tx > event.tx), None)
            if known and known.aged:
                found.append(owner)
        return found
