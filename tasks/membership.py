"""Which programs live: each worker and beat has an entry in one hash in Redis, which it renews each second.

A hint like everything there. Time is Redis' own: no program compares its clock with another's.
"""

import json
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from tasks.app import TidemarkApp
from tasks.hints import Hints

if TYPE_CHECKING:
    from redis import Redis

KEY = "tidemark:programs"
RENEW_SECONDS = 1.0
# So long a program is shown that says nothing any more.
GONE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A worker or beat as it describes itself; times in seconds since the epoch, by Redis' clock."""

    program: str
    name: str
    host: str
    pid: int
    shards: int
    # Of a worker: how many tasks it runs at once, whether it takes a share of the shards, and those it consumes.
    slots: int = 0
    leases: bool = False
    consumes: tuple[int, ...] = ()
    since: float = 0.0
    seen: float = 0.0


class Membership:
    """This process's entry, and everybody's."""

    def __init__(self, app: TidemarkApp) -> None:
        self._hints = app.once(Hints)
        self._shards = app.settings.shards
        self._me: Program | None = None
        self.id = ""
        self._renewed = -RENEW_SECONDS

    def enter(self, name: str, **facts: Any) -> None:
        """Begin; the next renewal tells the others."""
        self._me = Program(name=name, host=socket.gethostname(), shards=self._shards, **facts)
        # Names may be given twice; what they stand for counts twice, too.
        self.id = f"{name}/{uuid4().hex[:8]}"

    def renew(self, **facts: Any) -> Mapping[str, Program] | None:
        """Say that this process lives, and what is new; returns all who live, None where Redis does not answer."""
        if self._me is None:
            return None
        self._me = replace(self._me, **facts)
        self._renewed = monotonic()
        return self._hints.ask(self._exchange, None)

    def renew_when_due(self) -> None:
        """The same, for a loop that comes by more often."""
        if monotonic() >= self._renewed + RENEW_SECONDS:
            self.renew()

    def leave(self) -> None:
        """End; the others need not wait."""
        if self._me is not None:
            self._hints.ask(lambda redis: redis.hdel(KEY, self.id), 0)
            self._me = None

    def _exchange(self, redis: "Redis") -> Mapping[str, Program]:
        now = redis_time(redis)
        assert self._me is not None  # noqa: S101 - `renew` looked
        self._me = replace(self._me, since=self._me.since or now, seen=now)
        with redis.pipeline() as pipeline:
            pipeline.hset(KEY, self.id, json.dumps(asdict(self._me)))
            pipeline.hgetall(KEY)
            entries = read_entries(pipeline.execute()[-1])
        if dead := [name for name, entry in entries.items() if entry.seen < now - GONE_SECONDS]:
            redis.hdel(KEY, *dead)
        return {name: entry for name, entry in entries.items() if name not in dead}


def redis_time(redis: "Redis") -> float:
    """Seconds since the epoch, by Redis' clock."""
    seconds, microseconds = redis.time()
    return float(seconds) + float(microseconds) / 1e6


def read_programs(redis: "Redis") -> dict[str, Program]:
    """Every entry by its id; those of `GONE_SECONDS` ago may be among them."""
    return read_entries(redis.hgetall(KEY))  # type: ignore[arg-type] # typed for both of its clients


def read_entries(found: Mapping[str, str]) -> dict[str, Program]:
    """Entries as they stand in Redis; those of another release are left out."""
    entries = {}
    for name, text in found.items():
        try:
            fields = json.loads(text)
            entries[name] = Program(**{**fields, "consumes": tuple(fields["consumes"])})
        except (ValueError, TypeError, KeyError):
            continue
    return entries
