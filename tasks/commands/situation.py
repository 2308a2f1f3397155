"""How `status` and `top` show a reading of the database, as text and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from redis import RedisError
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from config.queues import CONTROL, shard_of, shard_queue
from config.settings import Settings
from db.status import Holder, LockWait, PartitionState, Reading, TopicBacklog
from tasks.app import TidemarkApp
from tasks.commands.display import NOTHING, duration, number, statement, table, text
from tasks.exporter import overdue_seconds
from tasks.metrics import read_stuck

_SHOWN = 10
_IN_JSON = 1000
# What Postgres puts in the place of a query that the role may not see.
_HIDDEN = "<insufficient privilege>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Situation:
    """A reading, the records per second by topic (None where they were not measured), and who asks."""

    reading: Reading
    rates: dict[str, float] | None
    # Why workers could not materialize partitions, by name.
    stuck: Mapping[str, str]
    settings: Settings
    # What is shorter than this is everyday life.
    after: float

    @property
    def waiting(self) -> list[PartitionState]:
        """Partitions whose oldest event waits too long, the longest first."""
        late = [p for p in self.reading.pending if (p.lag or 0.0) >= self.after]
        return sorted(late, key=lambda p: -(p.lag or 0.0))

    @property
    def lock_waits(self) -> list[LockWait]:
        return [w for w in self.reading.lock_waits if w.waited >= self.after]

    @property
    def holders(self) -> list[Holder]:
        return [h for h in self.reading.holders if (h.seconds or 0.0) >= self.after]

    def reason(self, partition: PartitionState) -> str:
        """What a partition waits for, as far as the database knows."""
        if not self.reading.dispatch.own_cluster:
            return "the database was restored; run: celery -A tasks rebase"
        for wait in self.reading.lock_waits:
            if (wait.topic, wait.partition) == (partition.topic, partition.partition):
                return f"a lock of {_who(wait.blocker_pid, wait.blocker_gid)}"
        if why := self.stuck.get(f"{partition.topic}/{partition.partition}"):
            return f"fails with {why}"
        undispatched = self.reading.dispatch.undispatched
        if undispatched is not None and undispatched >= self.after and (partition.lag or 0.0) <= undispatched + 1:
            return f"fan-out: is beat running, and a worker on {CONTROL}?"
        return f"a worker on {self.queue(partition)}"

    def queue(self, partition: PartitionState) -> str:
        """The queue of a partition's shard."""
        return shard_queue(shard_of(partition.partition_id, self.settings.shards))

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        backlogs = self.reading.backlogs()
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
                    **_backlog_json(backlogs.get(topic.name, TopicBacklog())),
                    "records_per_second": None if self.rates is None else round(self.rates.get(topic.name, 0.0), 3),
                }
                for topic in self.reading.topics
            ],
            "waiting": [
                {
                    "topic": p.topic,
                    "partition": p.partition,
                    "partition_id": p.partition_id,
                    "queue": self.queue(p),
                    "backlog_events": p.backlog,
                    "lag_seconds": p.lag,
                    "waits_for": self.reason(p),
                }
                for p in self.waiting[:_IN_JSON]
            ],
            "waiting_partitions": len(self.waiting),
            "lock_waits": [asdict(w) for w in self.reading.lock_waits],
            "holders": [asdict(h) for h in self.reading.holders],
            "fan_out": {
                "last_seconds": self.reading.dispatch.last,
                "undispatched_seconds": self.reading.dispatch.undispatched,
            },
            "own_cluster": self.reading.dispatch.own_cluster,
        }

    def render(self, *, busiest_first: bool = False) -> RenderableType:
        """For people. With `busiest_first` one line a topic, those that lag at the top."""
        parts: list[RenderableType] = [self._topics(busiest_first=busiest_first)]
        if not self.reading.dispatch.own_cluster:
            what = "Nothing is materialized: the database was restored into another cluster."
            parts += [Text(), text(f"{what} Run: celery -A tasks rebase", "bold red")]
        if self.waiting:
            parts += [Text(), self._waiting()]
        if self.lock_waits:
            parts += [Text(), text("Waiting for locks", "bold"), *(_lock_wait(w) for w in self.lock_waits)]
        if self.holders:
            title = "Open (keeps dead rows from vacuum; with an id, what it commits comes late)"
            parts += [Text(), text(title, "bold"), *(_holder(h) for h in self.holders)]
        queries = [w.blocker_query for w in self.lock_waits] + [h.query for h in self.holders]
        if _HIDDEN in queries:
            hint = "Queries of other roles are hidden; a superuser can: grant pg_monitor to <role>"
            parts += [Text(), text(hint, "dim")]
        return Group(*parts)

    def _topics(self, *, busiest_first: bool) -> RenderableType:
        if not self.reading.topics:
            return text("no topics; create one with: celery -A tasks topics create NAME")
        backlogs = self.reading.backlogs()
        topics: Sequence[Any] = self.reading.topics
        if busiest_first:
            rates = self.rates or {}
            topics = sorted(
                topics, key=lambda t: (-(backlogs[t.name].lag or 0.0) // 1, -rates.get(t.name, 0.0), t.name)
            )
        rows = table("Topic", ">Partitions", ">End offsets", ">Backlog", ">Lag", ">Records/s")
        for topic in topics:
            backlog = backlogs[topic.name]
            ends = text(number(topic.end_offsets))
            if topic.min_end_offset != topic.max_end_offset and not busiest_first:
                ends.append(f"\n{number(topic.min_end_offset)} to {number(topic.max_end_offset)}", "dim")
            name = text(topic.name)
            if busiest_first:
                # The text and not the column, which would take the room of the others.
                name.no_wrap, name.overflow = True, "ellipsis"
            rows.add_row(
                name,
                number(topic.partitions),
                ends,
                number(backlog.events) + "+" * (not backlog.counted),
                text(duration(backlog.lag), "yellow" if (backlog.lag or 0.0) >= self.after else ""),
                NOTHING if self.rates is None else number(round(self.rates.get(topic.name, 0.0))),
            )
        return rows

    def _waiting(self) -> Table:
        late = self.waiting
        more = f"; the first {_SHOWN} of {number(len(late))}" if len(late) > _SHOWN else ""
        title = f"Waiting {duration(self.after)} or longer{more}"
        rows = table("Topic", ">Partition", ">Backlog", ">Lag", "Waits for", title=title)
        for p in late[:_SHOWN]:
            rows.add_row(
                text(p.topic),
                str(p.partition),
                number(p.backlog) + "+" * (not p.counted),
                text(duration(p.lag), "yellow"),
                text(self.reason(p)),
            )
        return rows


def stuck_partitions(app: TidemarkApp) -> dict[str, str]:
    """What workers said lately of partitions that they could not materialize; nothing without Redis."""
    if app.redis is None:
        return {}
    try:
        return read_stuck(app.redis, seconds=overdue_seconds(app))
    except RedisError:
        return {}


def _backlog_json(backlog: TopicBacklog) -> dict[str, Any]:
    return {
        "backlog_events": backlog.events,
        "backlog_counted": backlog.counted,
        "backlog_partitions": backlog.partitions,
        "lag_seconds": backlog.lag,
    }


def _who(pid: int | None, gid: str | None) -> str:
    return f"pid {pid}" if pid else f"prepared transaction {gid or '(unknown)'}"


def _session(pid: int | None, user: str | None, application: str | None, state: str | None, age: float | None) -> str:
    name = " ".join(part for part in (user, application and f"({application})") if part)
    return ", ".join(part for part in (f"pid {pid}", name, state, f"transaction open {duration(age)}") if part)


def _lock_wait(wait: LockWait) -> RenderableType:
    target = f"partition {wait.partition} of {wait.topic}" if wait.topic is not None else f"a lock ({wait.lock})"
    by = f" ({wait.application})" if wait.application else ""
    first = text(f"pid {wait.pid}{by} has waited {duration(wait.waited)} for {target}")
    if wait.blocker_pid:
        blocker = _session(
            wait.blocker_pid, wait.blocker_user, wait.blocker_application, wait.blocker_state, wait.blocker_age
        )
        return _indented(
            first,
            text(f"held by {blocker}", "yellow"),
            text(statement(wait.blocker_query)),
            text(f"to end it: select pg_terminate_backend({wait.blocker_pid});", "dim"),
        )
    return _indented(
        first,
        text(f"held by {_who(None, wait.blocker_gid)}, {duration(wait.blocker_age)} old", "yellow"),
        text(f"to end it: {_end_prepared(wait.blocker_gid)}", "dim"),
    )


def _holder(held: Holder) -> RenderableType:
    with_id = ", with an id" * held.has_id
    if held.kind == "session":
        session = _session(int(held.name), held.user, held.application, held.state, held.seconds)
        return _indented(text(f"{session}{with_id}, in {held.database}"), text(statement(held.query)))
    if held.kind == "prepared transaction":
        what = f"{_who(None, held.name)} of {held.user} in {held.database}, {duration(held.seconds)} old{with_id}"
        return _indented(text(what), text(f"to end it: {_end_prepared(held.name)}", "dim"))
    who = f"{held.kind} {held.name}" + f" ({held.application})" * bool(held.application)
    return _indented(text(f"{who}, {held.state}, {duration(held.seconds)} behind"))


def _indented(first: Text, *more: Text) -> RenderableType:
    below = (Padding(line, (0, 0, 0, 4), expand=False) for line in more)
    return Group(Padding(first, (0, 0, 0, 2), expand=False), *below)


def _end_prepared(gid: str | None) -> str:
    quoted = (gid or "").replace("'", "''")
    return f"commit prepared '{quoted}'; or rollback prepared '{quoted}';"
