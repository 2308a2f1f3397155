"""What `status` and `top` show: a reading of the database, what Redis says of programs, and why something lags."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from redis import Redis, RedisError
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from config.queues import shard_of, shard_queue
from config.redis import RedisAddress, is_redis
from config.settings import Settings
from db.status import Holder, LockWait, PartitionState, Reading, Session
from tasks import hints
from tasks.app import TidemarkApp
from tasks.commands.display import NOTHING, count, duration, label, number, statement, table, text
from tasks.hints import Program, redis_time
from tasks.metrics import read_stuck
from tasks.names import ranges, together

# Whoever asks is at a screen: a Redis that hangs must not keep what Postgres says from being shown.
REDIS_SECONDS = 0.5
# Programs report every few seconds.
SILENT_SECONDS = 15.0
# What JSON says of a program.
_PROGRAM = ("name", "program", "host", "pid", "shards", "consumes", "seen")
_SHOWN = 10
_IN_JSON = 1000
# What Postgres puts in the place of a query that the role may not see.
_HIDDEN = "<insufficient privilege>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hints:
    """What Redis says. `programs` is None where nobody knows which are up, `error` why Redis does not answer.

    Unlike in Redis, `since` and `seen` of a program are seconds ago.
    """

    programs: Sequence[Program] | None = None
    # Why workers could not materialize partitions, by name.
    stuck: Mapping[str, str]
    error: str | None = None

    def seen(self, program: str) -> float | None:
        """When one of a kind was last heard of, seconds ago; None when none was."""
        return min((p.seen for p in self.programs or () if p.program == program), default=None)

    @property
    def workers(self) -> list[Program]:
        """Those that live."""
        return [p for p in self.programs or () if p.program == "worker" and p.seen < SILENT_SECONDS]

    def shards_differ(self, ours: int) -> str | None:
        """Who goes by how many shards, where they differ."""
        by_number: dict[int, list[str]] = defaultdict(list, {ours: ["this command"]})
        for program in self.programs or ():
            by_number[program.shards].append(program.name)
        if len(by_number) == 1:
            return None
        return "; ".join(f"{number}: {', '.join(names)}" for number, names in sorted(by_number.items()))


def read_programs(redis: Redis) -> list[Program]:
    """The programs that reported lately, by Redis' own clock, by name."""
    now = redis_time(redis)
    entries = hints.read_programs(redis, now).values()
    found = (replace(p, since=max(0.0, now - p.since), seen=max(0.0, now - p.seen)) for p in entries)
    return sorted(found, key=lambda p: p.name)


def read_hints(app: TidemarkApp) -> Hints:
    """Ask Redis, the broker's and ours, and give up soon."""
    redis: Redis | None = None
    try:
        for url in dict.fromkeys(u for u in (app.broker_url, app.redis_url) if u is not None and is_redis(u)):
            redis = RedisAddress.parse(url).client(seconds=REDIS_SECONDS)
            redis.ping()
        if redis is None:
            return Hints(stuck={})
        return Hints(programs=read_programs(redis), stuck=read_stuck(redis, seconds=app.settings.overdue_seconds))
    except RedisError as error:
        return Hints(stuck={}, error=" ".join(str(error).split()).rstrip("."))


class Cause(NamedTuple):
    """What partitions wait for, what ends it, and what the session that holds them up runs."""

    why: str
    repair: str = ""
    # Its age in `why` may be read twice; the session is the same.
    blocker: str | None = None
    query: str | None = None
    # Of a partition that waits for nothing but its turn.
    shard: int | None = None


@dataclass(frozen=True, kw_only=True)
class Situation:
    """A reading, the records per second by topic (None where they were not measured), and who asks."""

    reading: Reading
    rates: dict[str, float] | None
    hints: Hints
    settings: Settings
    # What is shorter than this is everyday life.
    after: float

    @cached_property
    def waiting(self) -> list[PartitionState]:
        """Partitions whose oldest event waits too long, the longest first."""
        late = [p for p in self.reading.pending if (p.lag or 0.0) >= self.after]
        return sorted(late, key=lambda p: -(p.lag or 0.0))

    @cached_property
    def lock_waits(self) -> list[LockWait]:
        return [w for w in self.reading.lock_waits if w.waited >= self.after]

    @cached_property
    def _blockers(self) -> dict[int | str, Session]:
        """Who holds a partition, by its id, or what all workers wait for, by no name."""
        found: dict[int | str, Session] = {}
        for wait in self.lock_waits:
            if wait.topic is not None:
                found[f"{wait.topic}/{wait.partition}"] = wait.blocker
            elif wait.application == "tidemark":
                found[""] = wait.blocker
        # Of several holders the oldest. How old it is may be hidden; then it counts.
        for lock in reversed(self.reading.row_locks):
            if lock.age is None or lock.age >= self.after:
                found |= dict.fromkeys(lock.partition_ids, lock)
        # Who waits as well is not the one to end.
        behind = {wait.pid: wait.blocker for wait in self.lock_waits}
        for _ in behind:
            found = {key: behind.get(session.pid, session) for key, session in found.items()}
        return found

    def cause(self, partition: PartitionState) -> Cause:
        """The one thing that a partition waits for, as far as anybody knows."""
        return next(self._causes(partition))

    def _causes(self, partition: PartitionState) -> Iterator[Cause]:
        dispatch, hints, name = self.reading.dispatch, self.hints, f"{partition.topic}/{partition.partition}"
        if not dispatch.own_cluster:
            yield Cause("the database was restored", "celery -A tasks rebase")
        for blocker in (self._blockers[key] for key in (partition.partition_id, name, "") if key in self._blockers):
            yield Cause(f"blocked by {_session(blocker)}", blocker.repair, blocker=blocker.name, query=blocker.query)
        if name in hints.stuck:
            yield Cause(f"fails with {hints.stuck[name]}")
        if hints.error is not None:
            yield Cause("Redis does not answer", "start it, or correct TIDEMARK_BROKER_URL")
        if hints.programs is not None and not hints.workers:
            yield _silence("worker", hints.seen("worker"))
        undispatched = dispatch.undispatched
        if undispatched is not None and undispatched >= self.after and (partition.lag or 0.0) <= undispatched + 1:
            tick = hints.seen("beat")
            if hints.programs is None:
                yield Cause("fan-out", "see that beat runs, and a worker that serves control")
            if tick is None or tick >= SILENT_SECONDS:
                yield _silence("beat", tick)
            yield Cause("fan-out, which is behind", "celery -A tasks workers: does one serve control?")
        # Nothing is in its way, as long as there is a worker for it.
        worker, shard = self._worker(partition), self._shard(partition)
        if worker is None and any(w.consumes for w in hints.workers):
            yield Cause("no worker", "celery -A tasks worker", shard=shard)
        yield Cause(f"worker {worker}" if worker else "a worker", shard=shard)

    def _worker(self, partition: PartitionState) -> str | None:
        """Who reads the queue of its shard."""
        return next((w.name for w in self.hints.workers if self._shard(partition) in w.consumes), None)

    def _shard(self, partition: PartitionState) -> int:
        return shard_of(partition.partition_id, self.settings.shards)

    def as_dict(self) -> dict[str, Any]:
        reading, hints, backlogs = self.reading, self.hints, self.reading.backlogs()
        return {
            "topics": [
                {
                    "topic": topic.name,
                    "partitions": topic.partitions,
                    "end_offset_sum": topic.end_offsets,
                    "end_offset_min": topic.min_end_offset,
                    "end_offset_max": topic.max_end_offset,
                    "records": topic.records,
                    "byte_size": topic.byte_size,
                    "backlog_events": backlogs[topic.name].events,
                    "backlog_counted": backlogs[topic.name].counted,
                    "backlog_partitions": backlogs[topic.name].partitions,
                    "lag_seconds": backlogs[topic.name].lag,
                    "records_per_second": None if self.rates is None else round(self.rates.get(topic.name, 0.0), 3),
                }
                for topic in reading.topics
            ],
            "waiting": [
                {
                    "topic": p.topic,
                    "partition": p.partition,
                    "partition_id": p.partition_id,
                    "queue": shard_queue(self._shard(p)),
                    "backlog_events": p.backlog,
                    "lag_seconds": p.lag,
                    "waits_for": _words(cause),
                    "repair": cause.repair or None,
                }
                for p, cause in ((p, self.cause(p)) for p in self.waiting[:_IN_JSON])
            ],
            "waiting_partitions": len(self.waiting),
            "row_locks": [asdict(r) for r in reading.row_locks],
            "lock_waits": [asdict(w) for w in reading.lock_waits],
            "holders": [asdict(h) for h in reading.holders],
            "fan_out": {"last_seconds": reading.dispatch.last, "undispatched_seconds": reading.dispatch.undispatched},
            "own_cluster": reading.dispatch.own_cluster,
            "to_delete": asdict(reading.leftovers),
            "programs": None
            if hints.programs is None
            else [{**{name: getattr(p, name) for name in _PROGRAM}, "up": p.since} for p in hints.programs],
            "redis_error": hints.error,
        }

    def render(self, curves: Callable[[str], tuple[str, str]] | None = None) -> RenderableType:
        """For people. With `curves`, of lag and rate by topic: one line a topic, those that lag at the top."""
        wrong = []
        if not self.reading.dispatch.own_cluster:
            what = "Nothing is materialized: the database was restored into another cluster."
            wrong.append(f"{what} Run: celery -A tasks rebase")
        if self.hints.error is not None:
            wrong.append(f"Redis does not answer: {self.hints.error}")
        if (numbers := self.hints.shards_differ(self.settings.shards)) is not None:
            wrong.append(f"TIDEMARK_SHARDS differs: {numbers}")
        parts = [self._topics(curves), *(part for what in wrong for part in ("", text(what, "bold red")))]
        if left := self.reading.leftovers.partitions:
            parts += ["", text(f"Deleted topics: {count(left, 'partition')} to be purged", "dim")]
        if self.waiting:
            parts += ["", text(f"Waiting {duration(self.after)} or longer", "bold"), *self._waiting()]
        if self.lock_waits:
            parts += ["", text("Waiting for locks", "bold"), *(_lock_wait(w) for w in self.lock_waits)]
        named = {blocker.name for blocker in self._blockers.values()}
        holders = [h for h in self.reading.holders if (h.seconds or 0.0) >= self.after and h.name not in named]
        if holders:
            title = "Open (keeps dead rows from vacuum; with an id, what it commits comes late)"
            parts += ["", text(title, "bold"), *(_holder(h) for h in holders)]
        queries = [b.query for b in self._blockers.values()] + [h.query for h in holders]
        if _HIDDEN in queries:
            hint = "Queries of other roles are hidden; a superuser can: grant pg_monitor to <role>"
            parts += ["", text(hint, "dim")]
        return Group(*parts)

    def _topics(self, curves: Callable[[str], tuple[str, str]] | None) -> RenderableType:
        if not self.reading.topics:
            return text("no topics; create one with: celery -A tasks topics create NAME")
        backlogs, rates, topics = self.reading.backlogs(), self.rates or {}, self.reading.topics
        if curves is None:
            rows = table("Topic", ">Partitions", ">End offsets", ">Backlog", ">Lag", ">Records/s")
        else:
            rows = table("Topic", ">End offsets", ">Backlog", ">Lag", ">Records/s")
            topics = sorted(topics, key=lambda t: (-(backlogs[t.name].lag or 0.0) // 1, -rates.get(t.name, 0), t.name))
        for topic in topics:
            backlog = backlogs[topic.name]
            ends = text(number(topic.end_offsets))
            lag = text(duration(backlog.lag), "yellow" if (backlog.lag or 0.0) >= self.after else "")
            rate = text(NOTHING if self.rates is None else number(round(rates.get(topic.name, 0.0))))
            cells = [label(topic.name), text(number(topic.partitions))]
            if curves is not None:
                of_lag, of_rate = curves(topic.name)
                lag, rate = text(f"{of_lag} ", "cyan") + lag, text(f"{of_rate} ", "cyan") + rate
                del cells[1]
            elif topic.min_end_offset != topic.max_end_offset:
                ends.append(f"\n{number(topic.min_end_offset)} to {number(topic.max_end_offset)}", "dim")
            rows.add_row(*cells, ends, number(backlog.events) + "+" * (not backlog.counted), lag, rate)
        return rows

    def _waiting(self) -> list[RenderableType]:
        """One paragraph for all partitions that wait for the same thing."""
        groups: dict[tuple[str, str], list[tuple[PartitionState, Cause]]] = defaultdict(list)
        for partition in self.waiting:
            cause = self.cause(partition)
            groups[cause.blocker or cause.why, cause.repair].append((partition, cause))
        parts: list[RenderableType] = []
        for group in list(groups.values())[:_SHOWN]:
            partitions, cause = [p for p, _ in group], group[0][1]
            events = sum(p.backlog for p in partitions)
            more = "" if all(p.counted for p in partitions) else " or more"
            what = f", {count(events, 'event')}{more}: {together((p.topic, p.partition) for p in partitions)}"
            first = text(duration(partitions[0].lag), "yellow") + label(what)
            first.no_wrap, first.overflow = True, "ellipsis"
            shards = {c.shard for _, c in group if c.shard is not None}
            lines = [text(_words(cause, shards)), *_query(cause.query)]
            tried = [p for p in partitions if cause.query and f"{p.topic}/{p.partition}" in self.hints.stuck]
            for p in tried[:1]:
                name, worker = f"{p.topic}/{p.partition}", self._worker(p) or "(unknown)"
                lines.append(text(f"worker {worker} has tried {name}: {' '.join(self.hints.stuck[name].split())}"))
            lines += [text(cause.repair, "cyan")] * bool(cause.repair)
            parts.append(_indented(first, *lines))
        if len(groups) > _SHOWN:
            parts.append(text(f"  … and {number(len(groups) - _SHOWN)} more causes (--json lists them)", "dim"))
        return parts


def _words(cause: Cause, shards: Collection[int] = ()) -> str:
    if len(shards) > 1:
        return f"{cause.why} on shards {ranges(sorted(shards))}"
    return cause.why if cause.shard is None else f"{cause.why} on {shard_queue(cause.shard)}"


def _silence(program: str, seen: float | None) -> Cause:
    """A worker or beat that does not run, or not any more."""
    noun = "tick" if program == "beat" else "sign"
    why = f"no {program} runs" if seen is None else f"no {program} {noun} for {duration(seen)}"
    return Cause(why, f"celery -A tasks {program}")


def _session(lock: Session) -> str:
    """A session, or a prepared transaction."""
    if not lock.pid:
        return f"{lock} of {lock.user or 'somebody'}, {duration(lock.age)} old"
    name = " ".join(part for part in (lock.user, lock.application and f"({lock.application})") if part)
    return ", ".join(part for part in (str(lock), name, lock.state, f"transaction open {duration(lock.age)}") if part)


def _lock_wait(wait: LockWait) -> RenderableType:
    target = f"partition {wait.partition} of {wait.topic}" if wait.topic is not None else f"a lock ({wait.lock})"
    by = f" ({wait.application})" if wait.application else ""
    return _indented(
        text(f"pid {wait.pid}{by} has waited {duration(wait.waited)} for {target}"),
        text(f"held by {_session(wait.blocker)}", "yellow"),
        *_query(wait.blocker.query),
        text(wait.blocker.repair, "cyan"),
    )


def _holder(held: Holder) -> RenderableType:
    with_id = ", with an id" * held.has_id
    if held.kind in {"session", "prepared transaction"}:
        session = held.session
        first = text(f"{_session(session)}{with_id}, in {held.database}")
        return _indented(first, *_query(held.query), text(session.repair, "cyan"))
    who = f"{held.kind} {held.name}" + f" ({held.application})" * bool(held.application)
    return _indented(text(f"{who}, {held.state}, {duration(held.seconds)} behind"))


def _query(query: str | None) -> list[Text]:
    return [text(statement(query))] if query else []


def _indented(first: Text, *more: Text) -> RenderableType:
    below = (Padding(line, (0, 0, 0, 4), expand=False) for line in more)
    return Group(Padding(first, (0, 0, 0, 2), expand=False), *below)
