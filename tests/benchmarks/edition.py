"""A process that measures one edition: run by path, with the edition's checkout as PYTHONPATH and working directory.

It imports only what the first edition has as well, and takes what it does (tables, servers, workers) from that
checkout. Its one argument is the settings of its server. For each line of JSON it reads, it answers with one.
"""

import hashlib
import json
import multiprocessing as mp
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import psycopg
from redis import Redis

from db import discover
from db.commit import commit_object
from db.materialize import materialize
from db.retention import retain
from tests.benchmarks.cold import Backlog, drain, shares
from tests.benchmarks.server import running_server
from tests.benchmarks.tables import fresh, load, wal_position
from tests.servers import RedisServer

try:
    from tests.demo.programs import Process, celery_argv
except ModuleNotFoundError:  # where the first edition has it
    from tests.acceptance.nodes import Process, celery_argv  # type: ignore[attr-defined,no-redef,unused-ignore]

Conn = psycopg.Connection[Any]
_TIMESTAMP = 1_767_225_600_000
_SHARDS = 8
_LOOK_SECONDS = 0.4
_DEADLINE = 60.0

_PLACED = {
    "first": "select coalesce(sum(end_offset), 0)::bigint from tidemark.topic_partitions",
    "second": """
        select coalesce(sum(r.end_offset), 0)::bigint
        from tidemark.topic_partitions p
        cross join lateral (
            select r.end_offset from tidemark.runs r where r.partition_id = p.id order by r.start_offset desc limit 1
        ) r
    """,
}
_FETCH = "select * from tidemark.fetch_batches(%s::int, %s::bigint, 1000000000::bigint, %s::int)"


def _commit(conn: Conn, key: str, ids: list[int], n_records: list[int] | None = None) -> None:
    n = len(ids)
    commit_object(conn, key, ids, n_records or [1] * n, range(0, n * 1000, 1000), [1000] * n, [_TIMESTAMP] * n)


def _fan_out(conn: Conn) -> int:
    found: Any = discover.find_committed(conn)
    if hasattr(discover, "save_seen"):
        discover.save_seen(conn, found.snapshot)
    else:
        discover.save_fan_out(conn, found)
    return len(found.partitions)


def _placed(conn: Conn) -> int:
    edition = "first" if hasattr(discover, "save_seen") else "second"
    row = conn.execute(_PLACED[edition]).fetchone()
    assert row is not None
    return int(row[0])


def drained(conn: Conn, partitions: int, events_each: int, group: int) -> dict[str, float]:
    """A backlog, drained by one client."""
    fresh(conn, partitions)
    load(conn, partitions, events_each)
    (share,) = shares(Backlog(partitions=partitions, events_each=events_each, group=group), 1)
    log, began = wal_position(conn), time.perf_counter()
    events = drain(conn, share)
    seconds = time.perf_counter() - began
    if events != partitions * events_each:
        raise RuntimeError(f"{events} of {partitions * events_each} events were taken")
    return {"seconds": seconds, "units": events, "log_bytes": wal_position(conn) - log}


class Turns:
    """A batch for each of the partitions, over and over; beside an old snapshot from `hold` on."""

    def __init__(self, conn: Conn, partitions: int) -> None:
        self._conn = conn
        self._ids = list(range(1, partitions + 1))
        self._number = self._start = 0
        fresh(conn, partitions)

    def take(self, turns: int) -> dict[str, float]:
        """Median milliseconds of what is done in each turn."""
        conn = self._conn
        times: dict[str, list[float]] = {}

        def timed(name: str, do: Callable[[], object]) -> None:
            began = time.perf_counter()
            do()
            times.setdefault(name, []).append((time.perf_counter() - began) * 1e3)

        def fetch(offset: int) -> None:
            if not conn.execute(_FETCH, (random.choice(self._ids), offset, 20), prepare=True).fetchall():
                raise RuntimeError(f"nothing at {offset}")

        for _ in range(turns):
            self._number += 1
            timed("commit", lambda: _commit(conn, f"turn/{self._number}", self._ids))
            timed("fan-out", lambda: _fan_out(conn))
            timed("materialize", lambda: materialize(conn, self._ids))
            timed("fetch the newest", lambda: fetch(max(self._start, self._number - 20)))
            timed("fetch the oldest", lambda: fetch(self._start))
        return {name: statistics.median(values) for name, values in times.items()}

    def hold(self) -> None:
        """Take a snapshot, as a dump does, and keep it."""
        self._other = psycopg.connect(self._conn.info.dsn, options="-c idle_in_transaction_session_timeout=0")
        self._other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        self._other.execute("select count(*) from tidemark.topics")

    def fill(self, events: int) -> None:
        """So many batches more, a transaction's worth to each partition."""
        each = 100
        for _ in range(events // (each * len(self._ids))):
            self._number += each
            for first in range(0, len(self._ids), 100):
                _commit(self._conn, f"fill/{self._number}/{first}", self._ids[first : first + 100] * each)
            materialize(self._conn, self._ids)

    def retain(self, batches: int) -> dict[str, float]:
        """Delete all but the last `batches` of each partition; milliseconds of the first and the last transactions."""
        self._conn.execute("update tidemark.topics set retention_bytes = %s", (batches * 1000,))
        marks = [time.perf_counter()]

        def mark() -> bool:
            marks.append(time.perf_counter())
            return False

        deleted = retain(self._conn, stop=mark).deleted
        self._conn.execute("update tidemark.topics set retention_bytes = null")
        row = self._conn.execute("select max(start_offset) from tidemark.log_starts").fetchone()
        assert row is not None
        self._start = row[0]
        times = [(b - a) * 1e3 for a, b in pairwise(marks)]
        fifth = max(1, len(times) // 5)
        return {
            "deleted": deleted,
            "first": statistics.median(times[:fifth]),
            "last": statistics.median(times[-fifth:]),
        }


class Log:
    """A log to be fetched from; the same one in both editions."""

    def __init__(self, conn: Conn, partitions: int, commits: int, *, passes: bool) -> None:
        """With `passes` each commit is materialized by itself, otherwise all of them at the end."""
        self._conn = conn
        choice = random.Random(7)
        ends: Counter[int] = Counter()
        fresh(conn, partitions)
        for number in range(commits):
            ids = choice.choices(range(1, partitions + 1), k=1_500)
            n_records = choice.choices(range(1, 500), k=len(ids))
            _commit(conn, f"commit/{number}", ids, n_records)
            for partition, n in zip(ids, n_records, strict=True):
                ends[partition] += n
            if passes:
                materialize(conn, ids)
        left = tuple(ends)
        while left:
            left = materialize(conn, left).backlog_partition_ids
        conn.execute("vacuum analyze")
        asked = choice.choices(sorted(ends), k=200)
        self._asked = [(partition, choice.randrange(ends[partition] * 9 // 10 + 1)) for partition in asked]

    def fetch(self, batches: int) -> dict[str, Any]:
        conn, digest = self._conn, hashlib.sha256()
        seconds = 0.0
        for partition, offset in self._asked:
            began = time.perf_counter()
            rows = conn.execute(_FETCH, (partition, offset, batches), prepare=True).fetchall()
            seconds += time.perf_counter() - began
            digest.update(repr(rows).encode())
        return {"seconds": seconds, "units": len(self._asked), "digest": digest.hexdigest()}


def fanned_out(conn: Conn, partitions: int) -> dict[str, float]:
    """Fan-outs after 100 commits to 100 of the partitions."""
    fresh(conn, partitions)
    active = range(1, partitions + 1, partitions // 100)
    seconds = 0.0
    for turn in range(20):
        for partition in active:
            _commit(conn, f"commit/{turn}/{partition}", [partition])
        began = time.perf_counter()
        found = _fan_out(conn)
        seconds += time.perf_counter() - began
        if found != len(active):
            raise RuntimeError(f"{found} of {len(active)} partitions were found")
    return {"seconds": seconds, "units": 20}


def beside_writers(conn: Conn, partitions: int, writers: int, *, others: bool) -> dict[str, float]:
    """Passes over all partitions while that many transactions are open.

    With `others` they are other ones at each pass: producers, each of which has committed a batch by the next one.
    """
    fresh(conn, partitions)
    ids = list(range(1, partitions + 1))
    seconds, turns = 0.0, 8
    try:
        for turn in range(-2, turns):
            if turn == -2 or others:
                _commit_writers(conn)
                for number in range(writers):
                    conn.execute("begin")
                    _commit(conn, f"writer/{turn}/{number}", [number % partitions + 1])
                    conn.execute(f"prepare transaction 'writer {turn} {number}'")
            _commit(conn, f"commit/{turn}", ids)
            began = time.perf_counter()
            materialize(conn, ids)
            if turn >= 0:
                seconds += time.perf_counter() - began
    finally:
        _commit_writers(conn)
    return {"seconds": seconds, "units": turns}


def _commit_writers(conn: Conn) -> None:
    for (name,) in conn.execute("select gid from pg_prepared_xacts").fetchall():
        conn.execute(f"commit prepared '{name}'")


def _produce(
    url: str, number: int, partitions: int, batches: int, seconds: float, start: Any, count: Any, answers: Any
) -> None:
    """Commit as fast as it goes, and count the batches; answers the times of all commits and the CPU seconds."""
    choice = random.Random(number)
    objects = [choice.choices(range(1, partitions + 1), k=batches) for _ in range(64)]
    n_records = [10] * batches
    times: list[float] = []
    with psycopg.connect(url, autocommit=True) as conn:
        start.wait(_DEADLINE)
        cpu, until = time.process_time(), time.perf_counter() + seconds
        while (began := time.perf_counter()) < until:
            _commit(conn, f"producer-{number}/{len(times)}", objects[len(times) % len(objects)], n_records)
            times.append(time.perf_counter() - began)
            count.value += batches
        answers.put((times, time.process_time() - cpu))


def _cpu_seconds(pid: int) -> float:
    """Of a process and all it started, also of those that have ended."""
    process = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:4]) for p in (process, *process.children(recursive=True)))


@contextmanager
def _fleet(url: str, workers: int) -> Iterator[dict[str, list[int]]]:
    """Redis, beat and that many workers, which have shared the shards; yields the pids by kind."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidemark-sustained-")))
        directory.chmod(0o711)
        redis = stack.enter_context(RedisServer(directory / "redis").start())
        env = {
            "TIDEMARK_DATABASE_URL": url,
            "TIDEMARK_BROKER_URL": redis.url,
            "TIDEMARK_DATA_DIR": str(directory),
            "TIDEMARK_SHARDS": str(_SHARDS),
        }

        def start(name: str, *arguments: str) -> int:
            process = Process(celery_argv(*arguments), env, directory / f"{name}.log")
            stack.callback(process.close)
            return process.pid

        names = [f"w{number}" for number in range(workers)]
        pids = [start(name, "worker", "-n", f"{name}@bench") for name in names]
        beat = start("beat", "beat")
        leases: Any = stack.enter_context(Redis.from_url(redis.url))
        deadline = time.monotonic() + _DEADLINE
        key = f"tidemark:leases:{_SHARDS}:owners"
        while sorted(Counter(leases.hvals(key)).values()) != [_SHARDS // workers] * workers:
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text() for path in sorted(directory.glob("*.log")))
                raise RuntimeError(f"the workers have not shared the shards: {leases.hgetall(key)}\n{logs}")
            time.sleep(0.1)
        yield {"workers": pids, "beat": [beat], "redis": [redis.pid]}


def sustained(
    conn: Conn, url: str, partitions: int, batches: int, producers: int, seconds: float, workers: int
) -> dict[str, Any]:
    """Producers for a time beside the workers, until all has its offsets; without workers, producers alone."""
    fresh(conn, partitions)
    with ExitStack() as stack:
        pids = stack.enter_context(_fleet(url, workers)) if workers else {}
        pids["postgres"] = [psutil.Process(conn.info.backend_pid).ppid()]
        context = mp.get_context("spawn")
        start, counts = context.Barrier(producers + 1), [context.Value("q", 0) for _ in range(producers)]
        answers: Any = context.Queue()
        for number, count in enumerate(counts):
            arguments = (url, number, partitions, batches, seconds, start, count, answers)
            process = context.Process(target=_produce, args=arguments, daemon=True)
            process.start()
            stack.callback(process.join)
        start.wait(_DEADLINE)
        log, began = wal_position(conn), time.perf_counter()
        cpu = {kind: sum(map(_cpu_seconds, its)) for kind, its in pids.items()}
        backlog: list[tuple[float, int]] = [(0.0, 0)]
        committing = True
        while committing or (workers and backlog[-1][1]):
            time.sleep(_LOOK_SECONDS if committing else _LOOK_SECONDS / 20)
            committing = answers.qsize() < producers
            placed = _placed(conn) // 10
            backlog.append((time.perf_counter() - began, sum(count.value for count in counts) - placed))
            if backlog[-1][0] > seconds + _DEADLINE:
                raise RuntimeError(f"{backlog[-1][1]} events are left after {_DEADLINE:g} s more")
        cpu = {kind: sum(map(_cpu_seconds, its)) - cpu[kind] for kind, its in pids.items()}
        answered = [answers.get() for _ in counts]
    times = sorted(seconds for its, _ in answered for seconds in its)
    return {
        # Alone they are as fast as they commit.
        "seconds": backlog[-1][0] if workers else seconds,
        "units": sum(count.value for count in counts),
        "log_bytes": wal_position(conn) - log,
        "p50": statistics.median(times) * 1e3,
        "p99": times[len(times) * 99 // 100] * 1e3,
        "backlog": backlog if workers else [],
        "cpu": {"producers": sum(used for _, used in answered), **cpu},
    }


def main() -> None:
    # Whatever else is printed must not get among the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    kept: dict[str, Any] = {}
    with running_server(json.loads(sys.argv[1])) as url, psycopg.connect(url, autocommit=True) as conn:
        jobs: dict[str, Callable[..., Any]] = {job.__name__: job for job in (drained, fanned_out, beside_writers)}
        jobs["sustained"] = partial(sustained, url=url)
        for line in sys.stdin:
            name, arguments = json.loads(line)
            made, _, method = name.partition(".")
            if name in jobs:
                answer = jobs[name](conn, **arguments)
            elif method:
                answer = getattr(kept[made], method)(**arguments)
            else:
                kept[made] = {"Turns": Turns, "Log": Log}[made](conn, **arguments)
                answer = None
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
