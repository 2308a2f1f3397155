"""The history check: holds the log against what its producers and observers wrote down (`tests.demo.ledger`).

Nothing of the database's own bookkeeping (transaction ids, cursors, hashes) is believed. A batch is known by its
object's key and its byte offset there. Each check returns the first row that offends it.

Batches that were deleted meanwhile count as well: those that a reader was given before, and of the others how many
records they had.
"""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from db.commit import Batch
from db.fetch import FetchedBatch
from tests.demo.ledger import Answer, Attempt, Outcome, Reading, Sighting
from tests.demo.storage import content


class PartitionLog(NamedTuple):
    """A partition when all is done: its name, its head, the batches of its runs and those fetched from it."""

    name: str
    start_offset: int
    end_offset: int
    batches: Sequence[FetchedBatch]
    fetched: Sequence[FetchedBatch]


class Origin(NamedTuple):
    """The commit that a batch comes from, and its place there.

    `certain` is false where no attempt learnt whether this batch was accepted.
    """

    began: float
    returned: float
    position: int
    batch: Batch
    certain: bool


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known of a run. `objects` are ids by key in the database, `load` returns an object's bytes.

    Without `load` the producers uploaded nothing, and bytes are not compared.
    """

    partitions: Mapping[int, PartitionLog]
    objects: Mapping[str, int]
    attempts: Sequence[Attempt]
    sightings: Sequence[Sighting]
    readings: Sequence[Reading]
    answers: Sequence[Answer] = ()
    load: Callable[[str], bytes] | None = None
    looks: int = 0
    fetched: int = 0

    @property
    def placed(self) -> int:
        """Batches that have their offsets."""
        return sum(len(log.batches) for log in self.partitions.values())

    @cached_property
    def known(self) -> Mapping[int, Sequence[FetchedBatch]]:
        """What is known of each partition, by offset: the batches it has, and before them those that readers had."""
        read: defaultdict[int, dict[int, FetchedBatch]] = defaultdict(dict)
        for reading in self.readings:
            read[reading.partition_id].update((batch.start_offset, batch) for batch in reading.batches)
        known = {}
        for partition_id, log in self.partitions.items():
            gone = [b for b in read[partition_id].values() if _ends(b) <= log.start_offset]
            known[partition_id] = [*sorted(gone, key=lambda b: b.start_offset), *log.batches]
        return known

    @cached_property
    def unread(self) -> Mapping[int, int]:
        """How many records of each partition were deleted before anybody read them."""
        unread = {}
        for partition_id, log in self.partitions.items():
            below = [min(_ends(b), log.start_offset) for b in self.known[partition_id]]
            starts = [min(b.start_offset, log.start_offset) for b in self.known[partition_id]]
            unread[partition_id] = log.start_offset - sum(e - s for s, e in zip(starts, below, strict=True))
        return unread

    @cached_property
    def offsets(self) -> Mapping[tuple[str, int], int]:
        """Where each known batch stands, by key and byte offset."""
        return {(b.object_key, b.byte_offset): b.start_offset for batches in self.known.values() for b in batches}

    @cached_property
    def _loaded(self) -> dict[str, bytes]:
        return {}

    def bytes_of(self, row: FetchedBatch) -> bytes | None:
        """The bytes where a batch should be; None where nothing was uploaded."""
        if self.load is None:
            return None
        if row.object_key not in self._loaded:
            self._loaded[row.object_key] = self.load(row.object_key)
        return self._loaded[row.object_key][row.byte_offset : row.byte_offset + row.byte_length]

    @cached_property
    def by_key(self) -> Mapping[str, Sequence[Attempt]]:
        by_key: defaultdict[str, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            by_key[attempt.key].append(attempt)
        return by_key

    @cached_property
    def origins(self) -> Mapping[tuple[str, int], Origin]:
        """Every committed batch by key and byte offset.

        An object is committed from the first return of an attempt that succeeded, and not before the first of them
        began. One whose outcome no attempt learnt is committed if the database has it, or the log.
        """
        origins = {}
        placed = {key for key, _ in self.offsets}
        for key, attempts in self.by_key.items():
            told = [a for a in attempts if a.outcome is Outcome.COMMITTED]
            untold = [a for a in attempts if a.outcome is Outcome.UNKNOWN]
            if not told and not (untold and (key in self.objects or key in placed)):
                continue
            began = min(a.began for a in (*told, *untold))
            returned = min((a.returned for a in told), default=float("inf"))
            first = (told or untold)[0]
            for position, batch in enumerate(first.batches):
                if first.accepts(position):
                    # Of those of an idempotent producer each may have been a duplicate.
                    certain = bool(told) or batch.producer_id is None
                    origins[key, batch.byte_offset] = Origin(began, returned, position, batch, certain)
        return origins


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one invariant's check counted, and the first row against it."""

    number: int
    name: str
    counted: str
    violation: str | None


def check(evidence: Evidence) -> list[Finding]:
    """Check all eight."""
    commits = len({key for key, _ in evidence.origins})
    rolled_back = sum(a.outcome is Outcome.ROLLED_BACK for a in evidence.attempts)
    refused = sum(a.outcome is Outcome.REFUSED for a in evidence.attempts)
    committed = sum(a.outcome is Outcome.COMMITTED for a in evidence.attempts)
    repeated = max(0, committed - commits)
    subjects: list[tuple[str, str, Iterator[str]]] = [
        (
            "contiguous",
            f"{evidence.placed:,} batches in {len(evidence.partitions)} partitions",
            _not_contiguous(evidence),
        ),
        ("exactly once", f"{len(evidence.origins):,} events, {rolled_back:,} rollbacks", _not_once(evidence)),
        ("real-time order", f"{commits:,} commits in {len(evidence.partitions)} partitions", _out_of_order(evidence)),
        ("immutable", f"{evidence.fetched:,} batches read meanwhile", _changed(evidence)),
        ("never back", f"{evidence.looks:,} looks at the offsets", _gone_back(evidence)),
        ("replay-safe", f"{repeated:,} repeated, {refused:,} conflicts refused", _not_replay_safe(evidence)),
        ("idempotent", f"{_sequences(evidence):,} batches of idempotent producers", _not_idempotent(evidence)),
        ("receipts agree", f"{len(evidence.answers):,} answers", _against_receipts(evidence)),
    ]
    return [
        Finding(number=number, name=name, counted=counted, violation=next(violations, None))
        for number, (name, counted, violations) in enumerate(subjects, start=1)
    ]


def _not_contiguous(evidence: Evidence) -> Iterator[str]:
    yield from _log_not_contiguous(evidence)
    for reading in evidence.readings:
        expected, name = reading.from_offset, _partition(evidence, reading.partition_id)
        for position, batch in enumerate(reading.batches):
            ends = _ends(batch)
            if not batch.start_offset <= expected < ends or (position and batch.start_offset != expected):
                yield f"{name}: a fetch at {reading.from_offset:,} returned {_row(batch)} where {expected:,} is due"
            expected = ends
    # And in every snapshot that the watcher saw.
    for before, now in _successive(evidence.sightings):
        known = before.end_offset if before else 0
        if now.new_records is not None and now.end_offset != known + now.new_records:
            yield f"{_name(evidence, now)}: {now.new_records:,} records between the end offsets {known:,} and {now}"


def _log_not_contiguous(evidence: Evidence) -> Iterator[str]:
    for partition_id, log in evidence.partitions.items():
        expected = log.start_offset
        for position, batch in enumerate(log.batches):
            ends = _ends(batch)
            spans = position == 0 and batch.start_offset <= expected < ends
            if batch.start_offset != expected and not spans:
                yield f"{log.name}: offset {expected:,} is due, found {_row(batch)}"
            expected = ends
        if expected != log.end_offset:
            yield f"{log.name}: the batches end at {expected:,}, the end offset is {log.end_offset:,}"
        for position, (stored, fetched) in enumerate(zip(log.batches, log.fetched, strict=False)):
            if stored != fetched:
                yield f"{log.name}: batch {position} of the log is {_row(stored)}, fetched was {_row(fetched)}"
        if len(log.batches) != len(log.fetched):
            yield f"{log.name}: the log holds {len(log.batches):,} batches, {len(log.fetched):,} were fetched"
        for one, other in pairwise(evidence.known[partition_id]):
            if other.start_offset < _ends(one) and one.start_offset < log.start_offset:
                yield f"{log.name}: {_row(other)} overlaps {_row(one)}, which was deleted"


def _not_once(evidence: Evidence) -> Iterator[str]:
    placed = set()
    for partition_id, log in evidence.partitions.items():
        for row in evidence.known[partition_id]:
            key = row.object_key, row.byte_offset
            origin = evidence.origins.get(key)
            if origin is None:
                known = row.object_key in evidence.by_key
                yield f"{log.name}: {'not accepted' if known else 'never committed'}, yet placed: {_row(row)}"
                continue
            if key in placed:
                yield f"{log.name}: placed twice: {_row(row)}"
            placed.add(key)
            committed = origin.batch
            if (partition_id, *_content(row)) != (committed.partition_id, *_content(committed)):
                yield f"{log.name}: committed as {committed}, placed as {_row(row)}"
            # Of what is deleted the upload may be gone as well.
            found = None if row.start_offset < log.start_offset else evidence.bytes_of(row)
            if found is not None and found != content(row.object_key, origin.position, row.byte_length):
                yield f"{log.name}: the bytes are not those of batch {origin.position}, but {found[:80]!r}: {_row(row)}"
    yield from _lost(evidence, placed)


def _lost(evidence: Evidence, placed: Collection[tuple[str, int]]) -> Iterator[str]:
    missing: defaultdict[int, list[tuple[str, Origin]]] = defaultdict(list)
    for key, origin in evidence.origins.items():
        if key not in placed:
            missing[origin.batch.partition_id].append((key[0], origin))
    for partition_id, lost in missing.items():
        unread, certain = evidence.unread.get(partition_id, 0), [o for o in lost if o[1].certain]
        most, least = (sum(o.batch.n_records for _, o in some) for some in (lost, certain))
        if not least <= unread <= most:
            first = f", first {certain[0][0]} {certain[0][1].batch}" if certain else ""
            deleted = f"; {unread:,} records were deleted unread" if unread else ""
            yield f"{_partition(evidence, partition_id)}: {least:,} records committed and lost{first}{deleted}"
    for partition_id, unread in evidence.unread.items():
        if unread and partition_id not in missing:
            yield f"{_partition(evidence, partition_id)}: {unread:,} records were deleted that nobody committed"


def _out_of_order(evidence: Evidence) -> Iterator[str]:
    for partition_id, log in evidence.partitions.items():
        known = [
            (evidence.origins[row.object_key, row.byte_offset], row)
            for row in evidence.known[partition_id]
            if (row.object_key, row.byte_offset) in evidence.origins
        ]
        for (one, row), (other, later) in pairwise(known):
            if row.object_key == later.object_key and other.position < one.position:
                yield f"{log.name}: batches of one object change places: {_row(row)} and {_row(later)}"
        # For every position, whose commit was the first to return among those that follow.
        first: tuple[Origin, FetchedBatch] | None = None
        against = []
        for origin, row in reversed(known):
            if first is not None and first[0].returned < origin.began:
                ahead = origin.began - first[0].returned
                against.append(
                    f"{log.name}: {_row(row)} stands before {_row(first[1])}, which was committed {ahead:.3f} s "
                    f"before its own commit began"
                )
            if first is None or origin.returned < first[0].returned:
                first = origin, row
        yield from reversed(against)


def _changed(evidence: Evidence) -> Iterator[str]:
    stored = {(partition_id, row.start_offset): row for partition_id, rows in evidence.known.items() for row in rows}
    for reading in evidence.readings:
        for batch in reading.batches:
            now = stored.get((reading.partition_id, batch.start_offset))
            if now != batch:
                found = _row(now) if now else "nothing starts there"
                yield f"{_partition(evidence, reading.partition_id)}: read as {_row(batch)}, now {found}"


class _Seen:
    """The highest offsets told so far, of (partition id, time, offset)."""

    def __init__(self, told: Iterable[tuple[int, float, int]]) -> None:
        self._times: defaultdict[int, list[float]] = defaultdict(list)
        self._highest: defaultdict[int, list[int]] = defaultdict(list)
        for partition_id, time, offset in sorted(told):
            highest = self._highest[partition_id]
            self._times[partition_id].append(time)
            highest.append(max(offset, highest[-1]) if highest else offset)

    def before(self, partition_id: int, time: float) -> int:
        """The highest offset of a partition that was told before this time."""
        at = bisect_left(self._times[partition_id], time)
        return self._highest[partition_id][at - 1] if at else 0


def _gone_back(evidence: Evidence) -> Iterator[str]:
    last = {}
    for before, now in _successive(evidence.sightings):
        if before and (now.start_offset < before.start_offset or now.end_offset < before.end_offset):
            yield f"{_name(evidence, now)}: {before}, then {now}"
        last[now.reader, now.partition_id] = now
    for seen in last.values():
        log = evidence.partitions[seen.partition_id]
        if log.start_offset < seen.start_offset or log.end_offset < seen.end_offset:
            yield f"{log.name}: {seen}, in the end [{log.start_offset:,}, {log.end_offset:,})"
    yield from _forgotten(evidence)


def _forgotten(evidence: Evidence) -> Iterator[str]:
    """What one reader was told, another one that begins later must know."""
    start = _Seen((s.partition_id, s.returned, s.start_offset) for s in evidence.sightings)
    fetched = ((r.partition_id, r.returned, _ends(r.batches[-1])) for r in evidence.readings if r.batches)
    end = _Seen([*fetched, *((s.partition_id, s.returned, s.end_offset) for s in evidence.sightings)])
    for sighting in evidence.sightings:
        for what, offset, seen in (("end", sighting.end_offset, end), ("start", sighting.start_offset, start)):
            known = seen.before(sighting.partition_id, sighting.began)
            if offset < known:
                yield f"{_name(evidence, sighting)}: {sighting}, but the {what} offset {known:,} was known before"
    for reading in evidence.readings:
        name = _partition(evidence, reading.partition_id)
        known = end.before(reading.partition_id, reading.began)
        if not reading.batches and reading.from_offset < known:
            yield f"{name}: a fetch at {reading.from_offset:,} found nothing, the end offset {known:,} was known"
        known = start.before(reading.partition_id, reading.began)
        for batch in reading.batches:
            if _ends(batch) <= known:
                yield f"{name}: {_row(batch)} was fetched after the start offset {known:,} was known"


def _not_replay_safe(evidence: Evidence) -> Iterator[str]:
    for key, attempts in evidence.by_key.items():
        told = [a for a in attempts if a.outcome is Outcome.COMMITTED]
        stored = evidence.objects.get(key)
        for attempt in told:
            # An object whose last batch is deleted is forgotten in the end.
            if attempt.object_id != (told[0].object_id if stored is None else stored):
                yield f"{key}: a commit returned id {attempt.object_id}, stored is {stored or told[0].object_id}"
            if attempt.verdicts != told[0].verdicts:
                yield f"{key}: a commit returned {attempt.verdicts}, the first one {told[0].verdicts}"
            if attempt.batches != told[0].batches:
                yield f"{key}: committed a second time with other content, returned id {attempt.object_id}"
        for attempt in attempts:
            if attempt.outcome is not Outcome.REFUSED:
                continue
            if not any(a.batches != attempt.batches for a in attempts):
                yield f"{key}: refused as a conflict, though the content is the same"
    unexplained = evidence.objects.keys() - {
        a.key for a in evidence.attempts if a.outcome in {Outcome.COMMITTED, Outcome.UNKNOWN}
    }
    for key in sorted(unexplained):
        yield f"{key}: stored with id {evidence.objects[key]}, though no commit of it succeeded"


def _sequences(evidence: Evidence) -> int:
    return sum(origin.batch.producer_id is not None for origin in evidence.origins.values())


def _not_idempotent(evidence: Evidence) -> Iterator[str]:
    """Each producer's sequences in a partition: one behind the other, a new epoch from 0 on, and none twice."""
    found: set[tuple[int, ...]] = set()
    for partition_id, log in evidence.partitions.items():
        last: dict[int, Batch] = {}
        for row in evidence.known[partition_id]:
            origin = evidence.origins.get((row.object_key, row.byte_offset))
            if origin is None or origin.batch.producer_id is None:
                continue
            now, before = origin.batch, last.get(origin.batch.producer_id)
            last[origin.batch.producer_id] = now
            found.add(_sequence(now))
            if not _goes_on(before, now, gaps=bool(evidence.unread[partition_id])):
                yield f"{log.name}: {now} comes behind {before}"
    for attempt in evidence.attempts:
        for batch, verdict in zip(attempt.batches, attempt.verdicts, strict=False):
            lost = verdict == "duplicate" and _sequence(batch) not in found
            if lost and not evidence.unread.get(batch.partition_id, 1):
                name = _partition(evidence, batch.partition_id)
                yield f"{name}: {batch} was called a duplicate, and stands nowhere"


def _goes_on(before: Batch | None, now: Batch, *, gaps: bool) -> bool:
    """Whether a producer's batch follows the one before; with `gaps` some between them may have been deleted unread."""
    _, _, epoch, sequence = _sequence(now)
    due = 0
    if before is not None:
        _, _, last_epoch, last_sequence = _sequence(before)
        if epoch < last_epoch:
            return False
        due = last_sequence + before.n_records if epoch == last_epoch else 0
    return sequence >= due if gaps else sequence == due


def _sequence(batch: Batch) -> tuple[int, ...]:
    """What an idempotent producer's batch is known by."""
    return (batch.partition_id, batch.producer_id or 0, batch.producer_epoch or 0, batch.base_sequence or 0)


def _against_receipts(evidence: Evidence) -> Iterator[str]:
    placed = {
        _sequence(origin.batch): evidence.offsets[key]
        for key, origin in evidence.origins.items()
        if origin.batch.producer_id is not None and key in evidence.offsets
    }
    # When it was first known that a batch has its offset.
    known: dict[tuple[str, int], float] = {}
    for reading in evidence.readings:
        for batch in reading.batches:
            at = batch.object_key, batch.byte_offset
            known[at] = min(reading.returned, known.get(at, reading.returned))
    committed = {
        key: next((a for a in attempts if a.outcome is Outcome.COMMITTED), attempts[0])
        for key, attempts in evidence.by_key.items()
    }
    for answer in sorted(evidence.answers, key=lambda answer: answer.returned):
        attempt = committed.get(answer.key)
        if attempt is None or answer.position >= len(attempt.batches):
            yield f"{answer.key}: a receipt for batch {answer.position}, which nobody committed"
            continue
        at = answer.key, attempt.batches[answer.position].byte_offset
        if fault := _wrong_receipt(evidence, answer, attempt, placed, known.get(at, float("inf"))):
            name = _partition(evidence, attempt.batches[answer.position].partition_id)
            yield f"{name}: {answer.key} batch {answer.position}: {fault}"
        if answer.base_offset is not None:
            known[at] = min(answer.returned, known.get(at, answer.returned))


def _wrong_receipt(
    evidence: Evidence, answer: Answer, attempt: Attempt, placed: Mapping[tuple[int, ...], int], known: float
) -> str | None:
    """What is wrong with an answer; `placed` are offsets by sequence, the batch's offset is `known` since then."""
    batch = attempt.batches[answer.position]
    verdict = attempt.verdicts[answer.position] if attempt.verdicts else "accepted"
    own = evidence.offsets.get((answer.key, batch.byte_offset))
    if answer.verdict != verdict:
        return f"the commit said {verdict}, the receipt {answer.verdict}"
    if verdict not in {"accepted", "duplicate"}:
        refused = answer.base_offset is None and not answer.is_pending
        return None if refused else f"{verdict}, and the receipt says {answer}"
    if answer.base_offset is not None:
        stands = placed.get(_sequence(batch)) if verdict == "duplicate" else own
        unread = stands is None and evidence.unread.get(batch.partition_id, 1)
        fine = stands == answer.base_offset or unread
        return None if fine else f"the receipt says offset {answer.base_offset:,}, it stands at {stands}"
    if answer.is_pending:
        late = verdict == "accepted" and known < answer.began
        return "its offset was known before, and the receipt says pending" if late else None
    log = evidence.partitions.get(batch.partition_id)
    if own is not None and log is not None and own + batch.n_records > log.start_offset:
        return f"it stands at {own:,}, and the receipt says that it is deleted"
    return None


def _ends(batch: FetchedBatch) -> int:
    """The offset behind a batch."""
    return batch.start_offset + batch.n_records


def _content(batch: Batch | FetchedBatch) -> tuple[int, int, int, int]:
    return batch.n_records, batch.byte_offset, batch.byte_length, batch.max_timestamp


def _successive(sightings: Iterable[Sighting]) -> Iterator[tuple[Sighting | None, Sighting]]:
    """Each sighting with the one before it of the same partition by the same reader."""
    last: dict[tuple[int, int], Sighting] = {}
    for now in sightings:
        yield last.get((now.reader, now.partition_id)), now
        last[now.reader, now.partition_id] = now


def _partition(evidence: Evidence, partition_id: int) -> str:
    log = evidence.partitions.get(partition_id)
    return log.name if log else f"partition id {partition_id}"


def _name(evidence: Evidence, sighting: Sighting) -> str:
    return _partition(evidence, sighting.partition_id)


def _row(batch: FetchedBatch) -> str:
    """A row of the log as a line."""
    return (
        f"[{batch.start_offset:,}, {_ends(batch):,}) of {batch.object_key} "
        f"bytes {batch.byte_offset}+{batch.byte_length}"
    )
