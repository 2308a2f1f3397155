"""A candidate strategy on a share of the partitions, and whether it is faster than the current one.

Which strategy a partition gets is a matter of a hash of its id: the same in every process and every release,
independent of its shard, and growing the share only adds partitions. Offsets do not depend on it, so changing it while
workers run is harmless.

The sides of a task are groups of as many partitions, see `split`, with more or less in them. Smaller
transactions cost more per event whatever the strategy, so like is compared with like. A transaction of the candidate is
paired with one of the current strategy that had about as many events (within 9 %) and partitions (within a factor of
two); what has no partner is left out. The ratio of the two times is the result: its mean over the pairs, by a t-test on
the logarithms, which is scipy's.

What it assumes: that the pairs are independent. Those of one minute share disk and neighbours, as the two sides do;
those of one partition share its shape. So the interval is a 99 % one, and with a handful of partitions on a
side it says more about them than about the strategy.

Bounded: the newest 5,000 transactions of a side, in a list in Redis; only while a candidate is set.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from itertools import permutations
from math import ceil, exp, log, log2
from typing import Any, Literal, NamedTuple

from redis import Redis

from config.errors import SettingsError
from config.settings import STRATEGIES, Settings, Strategy
from db.materialize import MaterializationMetrics
from tasks.app import TidemarkApp
from tasks.metrics import WorkerMetrics

# Hundredths of a percent.
_BUCKETS = 10_000
# Fewer say little about a variance.
PAIRS_AT_LEAST = 30
# The difference that one wants to hear of.
_WORTH_KNOWING = 0.05
_FAILED = "failed"

Verdict = Literal["real", "not shown", "too few transactions"]


def bucket_of(partition_id: int) -> int:
    """A number from 0 to 9,999 for a partition, evenly spread."""
    digest = blake2b(partition_id.to_bytes(8, "big"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _BUCKETS


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Partitions of a task that share transactions; `compared`: their figures are noted."""

    strategy: Strategy
    partition_ids: list[int]
    compared: bool = False


class Observer:
    """Hears of everything that happens to a task's partitions, and does nothing about it."""

    def transaction(self, side: Side, done: MaterializationMetrics) -> None:
        """Hear of one that committed; `done.moved` has each partition's share."""

    def failed(self, side: Side, error: BaseException) -> None:
        """Hear of an attempt that failed."""

    def stuck(self, partition_ids: Sequence[int], error: BaseException) -> None:
        """Hear of partitions that this task gives up."""

    def finished(self, partition_ids: Sequence[int], total: MaterializationMetrics) -> None:
        """Hear what the task did in all."""


def split(partition_ids: Iterable[int], settings: Settings) -> list[Side]:
    """Partitions by strategy, in their order; the candidate's last, so that its failure holds up nobody else.

    As many as the candidate has in this task are taken apart with the current strategy, and compared with it: beside
    all the others it would get the smallest transactions, which cost most per event.
    """
    ids = list(partition_ids)
    if settings.candidate is None or not settings.candidate_percent:
        return [Side(strategy=settings.strategy, partition_ids=ids)]
    share = round(settings.candidate_percent * _BUCKETS / 100)
    buckets = {i: bucket_of(i) for i in ids}
    candidate = [i for i in ids if buckets[i] < share]
    others = sorted((i for i in ids if buckets[i] >= share), key=lambda i: buckets[i])
    # Where it has none, as one that travels alone: a share as large as the candidate's.
    chosen = set(others[: len(candidate)] if candidate else (i for i in others if buckets[i] < 2 * share))
    control = [i for i in ids if i in chosen]
    rest = [i for i in ids if buckets[i] >= share and i not in chosen]
    sides = (
        Side(strategy=settings.strategy, partition_ids=rest),
        Side(strategy=settings.strategy, partition_ids=control, compared=True),
        Side(strategy=settings.candidate, partition_ids=candidate, compared=True),
    )
    return [side for side in sides if side.partition_ids]


# --- What is noted, and what it says


def _key(current: Strategy, candidate: Strategy, side: Strategy) -> str:
    return f"tidemark:compare:{current}>{candidate}:{side}"


class DrainComparison(Observer):
    """Notes what each compared side of a drain took: one of its observers."""

    def __init__(self, app: TidemarkApp) -> None:
        self._metrics = app.once(WorkerMetrics)
        self._settings = app.settings

    def transaction(self, side: Side, done: MaterializationMetrics) -> None:
        """Note its events, its partitions, its time without the lock wait, and that wait, in microseconds."""
        wait = round(done.lock_wait_time_ms * 1000)
        took = max(round(done.processing_time_ms * 1000) - wait, 1)
        self._note(side, f"{done.events_processed} {done.partitions_processed} {took} {wait}")

    def failed(self, side: Side, error: BaseException) -> None:  # noqa: ARG002 - an observer's
        self._note(side, _FAILED)

    def _note(self, side: Side, what: str) -> None:
        if side.compared and self._settings.candidate is not None:
            self._metrics.sample(_key(self._settings.strategy, self._settings.candidate, side.strategy), what)


class Transaction(NamedTuple):
    """One that was noted; times are microseconds."""

    events: int
    partitions: int
    took: int
    wait: int


@dataclass(frozen=True, slots=True)
class SideSummary:
    """What one strategy's transactions did; times leave out lock waits, which stand apart."""

    strategy: Strategy
    transactions: int
    empty: int
    failed: int
    events: int
    events_per_second: float
    micros_per_event: float | None
    lock_wait_ms: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two sides: the candidate's time by the current one's over `pairs` of transactions alike, and its interval."""

    current: SideSummary
    candidate: SideSummary
    confidence: float
    pairs: int
    time_ratio: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether the difference of times is real."""
        if self.low is None or self.high is None or self.pairs < PAIRS_AT_LEAST:
            return "too few transactions"
        return "not shown" if self.low <= 1 <= self.high else "real"

    @property
    def transactions_needed(self) -> int | None:
        """About how many of the candidate it takes to see a difference of 5 %; None where nothing tells."""
        if self.pairs == 0:
            return None
        pairs = float(PAIRS_AT_LEAST)
        if self.low is not None and self.high is not None:
            # An interval narrows with the root of their number.
            pairs = max(pairs, self.pairs * (log(self.high / self.low) / 2 / log(1 + _WORTH_KNOWING)) ** 2)
        needed = ceil(self.candidate.transactions * pairs / self.pairs)
        # An estimate has two digits.
        step = int(10 ** max(len(str(needed)) - 2, 0))
        return -(-needed // step) * step

    @property
    def words(self) -> str:
        ours, theirs = self.current.strategy, self.candidate.strategy
        needed, there = self.transactions_needed, self.candidate.transactions
        if needed is None:
            more = f", none of them like one of {ours}'s yet"
        elif needed > there:
            more = f"; a difference of {_WORTH_KNOWING:.0%} shows with about {needed:,}"
        else:
            more = f": enough to see a difference of {_WORTH_KNOWING:.0%}"
        more = f"{theirs} has {there:,} transactions{more}"
        if self.time_ratio is None or self.verdict == "too few transactions":
            return f"too few transactions alike, {self.pairs} of at least {PAIRS_AT_LEAST} pairs: {more}"
        ratio = (
            f"{theirs} takes {self.time_ratio:.2f} of {ours}'s time for transactions alike "
            f"({100 * self.confidence:.4g} % sure: {self.low:.2f} to {self.high:.2f}; {self.pairs:,} pairs)"
        )
        return ratio if self.verdict == "real" else f"no difference shown: {ratio}. {more}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {name: getattr(self, name) for name in ("verdict", "words", "transactions_needed")}


def read(redis: Redis, *, confidence: float = 0.99) -> list[Comparison]:
    """Every pair of strategies that the workers have noted something of."""
    found = []
    for current, candidate in permutations(STRATEGIES, 2):
        noted: list[Any] = [redis.lrange(_key(current, candidate, side), 0, -1) for side in (current, candidate)]
        if any(noted):
            found.append(compare(current, candidate, *noted, confidence=confidence))
    return found


def forget(redis: Redis) -> None:
    """Start over: what was compared so far is dropped, and no other figure."""
    redis.delete(*(_key(*pair, side) for pair in permutations(STRATEGIES, 2) for side in pair))


def compare(
    current: Strategy, candidate: Strategy, ours: Sequence[str], theirs: Sequence[str], *, confidence: float = 0.99
) -> Comparison:
    """Compare two strategies by what was noted of each. SettingsError where scipy is not installed."""
    sides = [[Transaction(*map(int, note.split())) for note in notes if note != _FAILED] for notes in (ours, theirs)]
    ratios = [log(b.took / a.took) for a, b in _alike(*sides)]
    found = Comparison(
        current=_summary(current, sides[0], len(ours)),
        candidate=_summary(candidate, sides[1], len(theirs)),
        confidence=confidence,
        pairs=len(ratios),
    )
    # Ratios that are all the same have no variance to tell anything by.
    if len(set(ratios)) < 2:  # noqa: PLR2004
        return found
    try:
        from scipy import stats  # noqa: PLC0415 - an extra, and slow to import
    except ModuleNotFoundError:
        raise SettingsError("compare needs scipy; install: pip install '.[compare]'") from None
    low, high = map(exp, stats.ttest_1samp(ratios, 0).confidence_interval(confidence))
    return replace(found, time_ratio=exp(sum(ratios) / len(ratios)), low=low, high=high)


def _summary(strategy: Strategy, transactions: Sequence[Transaction], attempts: int) -> SideSummary:
    count, events, took = len(transactions), sum(t.events for t in transactions), sum(t.took for t in transactions)
    return SideSummary(
        strategy,
        transactions=count,
        empty=sum(t.events == 0 for t in transactions),
        failed=attempts - count,
        events=events,
        events_per_second=events / took * 1e6 if took else 0.0,
        micros_per_event=took / events if events else None,
        lock_wait_ms=sum(t.wait for t in transactions) / count / 1000 if count else None,
    )


def _alike(*sides: Iterable[Transaction]) -> Iterator[tuple[Transaction, Transaction]]:
    """Pairs of one size, in the order they came; a transaction without events had nothing to take time for."""
    by_size: defaultdict[tuple[int, int], tuple[list[Transaction], ...]] = defaultdict(lambda: ([], []))
    for number, transactions in enumerate(sides):
        for t in transactions:
            if t.events:
                by_size[round(8 * log2(t.events)), t.partitions.bit_length()][number].append(t)
    for ours, theirs in by_size.values():
        yield from zip(ours, theirs, strict=False)
