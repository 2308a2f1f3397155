"""The faults. Each does some injections to a running world, ends what it began, and says how many there were."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import psutil
import psycopg
from redis import Redis

from config.errors import UnknownPartitionError
from config.queues import all_queues
from db.commit import Batch, columns, commit_object
from db.fetch import fetch_batches
from db.materialize import materialize
from db.retention import delete_records, purge
from db.topics import create_topic, delete_topic, partition_ids, set_retention
from tests.demo.ledger import Ledger
from tests.demo.producer import Outage, commit_everywhere
from tests.demo.programs import DemoError, celery_argv
from tests.faults import boundaries
from tests.faults.world import PREFIX, RETENTION_BYTES, SHARDS, World
from tests.servers import copied, synchronize
from tests.support import frozen

Fault: TypeAlias = Callable[[World], int]
T = TypeVar("T")

# So many boundaries has a task at most; one that is not met is survived.
_BOUNDARIES = 24
# So long an outage lasts, in seconds, at least and at most.
_OUTAGE = (0.2, 3.0)


def child_of_a_worker_is_killed(world: World) -> int:
    """SIGKILL at any moment to the process of a worker's pool that runs the tasks."""
    done = 0
    for _ in range(10):
        worker = world.chance.choice(world.workers)
        with suppress(psutil.NoSuchProcess):
            for pid in worker.children()[:1]:
                psutil.Process(pid).kill()
                done += 1
        world.pause(world.chance.uniform(0.05, 0.4))
    return done


def child_dies_at_a_boundary(world: World) -> int:
    """SIGKILL before or behind a statement of a task: before and after lock, place and commit."""
    done = 0
    for _ in range(10):
        (world.deaths / "armed").write_text(str(world.chance.randrange(_BOUNDARIES)))
        _await_the_death(world)
        done += any(world.deaths.glob("taken-*"))
        _bury(world)
    return done


def worker_dies_before_it_acknowledges(world: World) -> int:
    """The task is done, and its message is not acknowledged: it comes again."""
    (world.deaths / "armed").write_text("acknowledge")
    _await_the_death(world)
    died = any(world.deaths.glob("survived-*"))
    _bury(world)
    return int(died)


def _await_the_death(world: World) -> None:
    def somebody_has_died_or_survived() -> bool:
        taken = [int(path.name.partition("-")[2]) for path in world.deaths.glob("taken-*")]
        return any(world.deaths.glob("survived-*")) or any(not psutil.pid_exists(pid) for pid in taken)

    world.wait(somebody_has_died_or_survived, 10, fails=False)


def _bury(world: World) -> None:
    for path in [*world.deaths.glob("armed"), *world.deaths.glob("taken-*"), *world.deaths.glob("survived-*")]:
        path.unlink(missing_ok=True)


def every_boundary(world: World) -> int:
    """Every kind of work, by processes that are killed at each boundary of its statements in turn."""
    number = world.chance.randrange(10**9)
    order = boundaries.Order(
        url=world.url,
        objects=str(world.objects),
        ledger=str(world.directory / "ledgers" / f"boundaries-{number}.jsonl"),
        key_prefix=f"{PREFIX}boundaries-{number}/",
        partition_ids=world.ids,
        rounds=1,
        seed=number,
    )
    argv = [sys.executable, "-m", "tests.faults.boundaries", order.to_json()]
    nursery = world.programs.process(f"boundaries {number}", argv, may_end=True)
    world.wait(lambda: not nursery.running, 600, "all boundaries are passed")
    nursery.require_well()
    nursery.close()
    return int(nursery.output().split()[-1])


def worker_is_killed(world: World) -> int:
    """SIGKILL to a worker and all its children, as by the system that has no memory left."""
    world.chance.choice(world.workers).kill()
    return 1


def worker_is_stopped(world: World) -> int:
    """SIGTERM: it ends its task, gives its shards away, and is started again."""
    before = world.restarts
    world.chance.choice(world.workers).signal(signal.SIGTERM)
    world.wait(lambda: world.restarts > before, 20, fails=False)
    return 1


def worker_is_frozen(world: World) -> int:
    """SIGSTOP, longer than its shards stay its own; then it goes on where it was."""
    worker = world.chance.choice(world.workers)
    with frozen(worker.pid):
        world.pause(4)
    return 1


def beat_is_killed(world: World) -> int:
    world.beat.kill()
    return 1


def two_beats(world: World) -> int:
    """A second beat beside the first, which is then killed."""
    second = world.programs.celery("second beat", "beat", "-l", "WARNING")
    world.pause(3)
    world.beat.kill()
    world.pause(2)
    second.close()
    return 1


def producer_is_killed(world: World) -> int:
    """SIGKILL in the middle of its commits; another one comes in its place."""
    for _ in range(3):
        world.chance.choice(world.producers).kill()
        world.pause(world.chance.uniform(0.5, 1.5))
    return 3


def clock_jumps(world: World) -> int:
    """A worker's clock, as Python sees it, an hour ahead, an hour behind, and right again."""
    jumps = (3600, -3600)
    for seconds in jumps:
        (world.deaths / "clock").write_text(str(seconds))
        world.pause(2)
    (world.deaths / "clock").unlink()
    return len(jumps) + 1


def postgres_is_killed(world: World) -> int:
    """SIGKILL to all its processes; it recovers from its log."""
    world.postgres.kill()
    world.pause(world.chance.uniform(0, 2))
    world.postgres.restart()
    return 1


def postgres_is_shut_down_at_once(world: World) -> int:
    """SIGQUIT, `pg_ctl stop -m immediate`."""
    psutil.Process(world.postgres.pid).send_signal(signal.SIGQUIT)
    world.wait(lambda: not world.postgres.running, 20, "Postgres has ended")
    world.postgres.restart()
    return 1


def backend_is_killed(world: World) -> int:
    """SIGKILL to one server process: Postgres ends all others and recovers."""
    backends = _backends(world)
    if not backends:
        return 0
    psutil.Process(world.chance.choice(backends)).kill()
    return 1


def sessions_are_terminated(world: World) -> int:
    """`pg_terminate_backend` of whoever is at work."""
    done = 0
    for _ in range(15):
        with Outage(), world.connect() as conn:
            row = conn.execute(
                "select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid() "
                "and datname = current_database() and state <> 'idle' order by random() limit 1"
            ).fetchone()
            if row is not None:
                conn.execute("select pg_terminate_backend(%s)", row)
                done += 1
        world.pause(0.05)
    return done


def _backends(world: World) -> list[int]:
    with world.connect() as conn:
        found = conn.execute(
            "select pid from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid()"
        )
        return [int(str(pid)) for (pid,) in found]


def connections_are_cut(world: World) -> int:
    """The network drops all connections of workers and producers, five times."""
    done = 0
    for _ in range(5):
        done += world.cold.cut() + world.hot.cut()
        world.pause(world.chance.uniform(0.1, 0.5))
    return done


def answers_to_commits_are_lost(world: World) -> int:
    """The hot path: a producer does not learn whether it has committed."""
    return _lose(world, "hot")


def answers_to_materializations_are_lost(world: World) -> int:
    """The cold path: a worker does not learn whether it has placed."""
    return _lose(world, "cold")


def _lose(world: World, name: str) -> int:
    proxy = getattr(world, name)
    before = proxy.lost
    proxy.to_lose = 10
    world.wait(lambda: not proxy.to_lose, 15, fails=False)
    proxy.to_lose = 0
    return int(proxy.lost - before)


def network_goes_silent(world: World) -> int:
    """No packet passes between workers, producers and Postgres; connections stay open."""
    for proxy in (world.cold, world.hot):
        proxy.silent = True
    world.pause(world.chance.uniform(1, 6))
    for proxy in (world.cold, world.hot):
        proxy.silent = False
    return 2


def connections_are_exhausted(world: World) -> int:
    """Somebody takes every connection that is left, and holds them."""
    with ExitStack() as held:
        while True:
            try:
                held.enter_context(psycopg.connect(world.url, connect_timeout=5))
            except psycopg.OperationalError:
                break
        # Those that the programs give back are taken as well.
        world.cold.cut()
        world.pause(2)
    return 1


def transaction_stays_open(world: World) -> int:
    """One that has committed an object and does not end, while others come and go; then it ends, and is late."""
    notes = Ledger()
    with world.connect() as conn:
        conn.execute("set idle_in_transaction_session_timeout = 0")
        with conn.transaction():
            commit_everywhere(conn, world.objects, notes, world.new_key("late"), world.ids)
            world.pause(world.long)
        for attempt in notes.attempts:
            world.ledger.write(replace(attempt, returned=time.monotonic()))
    return 1


def snapshot_is_held(world: World) -> int:
    """A backup that takes its time."""
    with world.connect() as conn:
        conn.execute("set idle_in_transaction_session_timeout = 0")
        conn.execute("begin isolation level repeatable read")
        conn.execute("select count(*) from tidemark.runs")
        world.pause(world.long)
    return 1


def partitions_are_locked(world: World) -> int:
    """A forgotten session has a few rows locked."""
    chosen = world.chance.sample(world.ids, 3)
    with world.connect() as conn:
        conn.execute("begin")
        conn.execute("select from tidemark.topic_partitions where id = any(%s) for update", (chosen,))
        world.pause(3)
    return len(chosen)


def synchronous_standby_takes_over(world: World) -> int:
    """Postgres is killed, and its synchronous standby promoted: everybody talks to that one."""
    directory = world.disk / f"standby-{world.chance.randrange(10**9)}"
    primary = world.postgres
    standby = copied(primary, directory, None, world.settings)
    world.stack.callback(standby.stop)
    with psycopg.connect(primary.url(), autocommit=True) as conn:
        synchronize(conn)
    world.pause(2)
    primary.kill()
    with psycopg.connect(standby.url(), autocommit=True) as conn:
        conn.execute("select pg_promote()")
    world.take_over(standby)
    # A killed server leaves its shared memory behind; the next one in its place frees it. And the disk is small.
    primary.start().stop()
    shutil.rmtree(primary._data)
    return 1


def disk_is_full(world: World) -> int:
    """Nothing can be written: Postgres' disk has no room; then it has again."""
    ballast = world.disk / "ballast"
    with ballast.open("wb") as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
    world.pause(4)
    # Postgres ends where it cannot write its log; as long as that is so it does not start.
    ballast.unlink()
    return 1


def redis_is_killed(world: World) -> int:
    world.redis.kill()
    world.pause(world.chance.uniform(*_OUTAGE))
    world.redis.restart()
    return 1


def redis_is_emptied(world: World) -> int:
    """Messages, tokens, leases and schedule are gone."""
    _redis(world, lambda redis: redis.flushall())
    return 1


def redis_is_full(world: World) -> int:
    """It refuses every write."""
    _redis(world, lambda redis: redis.config_set("maxmemory", "1"))
    world.pause(3)
    _redis(world, lambda redis: redis.config_set("maxmemory", "0"))
    return 1


def redis_is_slow(world: World) -> int:
    for proxy in (world.messages, world.apart):
        proxy.delay = 0.15
    world.pause(4)
    for proxy in (world.messages, world.apart):
        proxy.delay = 0.0
    return 1


def redis_is_frozen(world: World) -> int:
    with frozen(world.redis.pid):
        world.pause(world.chance.uniform(1, 5))
    return 1


def worker_is_partitioned_from_redis(world: World) -> int:
    """One worker does not reach Redis, the others do; they take its shards over, and it comes back."""
    world.apart.silent = True
    world.pause(6)
    world.apart.silent = False
    return 1


def messages_are_doubled_delayed_and_reordered(world: World) -> int:
    """Workers stand still while messages pile up; these are doubled and shuffled, and come all at once."""
    with ExitStack() as still:
        for worker in world.workers:
            still.enter_context(frozen(worker.pid))
        world.pause(1.5)

        def shuffle(redis: Redis) -> int:
            done = 0
            for queue in all_queues(SHARDS):
                messages = redis.lrange(queue, 0, -1) * 3
                world.chance.shuffle(messages)
                if messages:
                    redis.rpush(queue, *messages)
                    done += len(messages)
            return done

        done = _redis(world, shuffle)
    with _app(world) as send:
        for _ in range(5):
            for partition_id in world.chance.sample(world.ids, len(world.ids)):
                done += send(partition_id, world.chance.choice([0, 0, 1, 2]))
    return done


@contextmanager
def _app(world: World) -> Iterator[Callable[[int, float], int]]:
    """Publishes materializations, now or some seconds later."""
    from tests.support_commands import app_for  # noqa: PLC0415 - Celery, for this fault alone

    changes: dict[str, Any] = {"database_url": world.url, "broker_url": world.redis.url, "shards": SHARDS}
    with app_for(**changes) as app:

        def send(partition_id: int, seconds: float) -> int:
            app.send_task("tasks.materialize", kwargs={"partition_ids": [partition_id]}, countdown=seconds)
            return 1

        yield send


def shards_change(world: World) -> int:
    """Other numbers of shards, program by program, while all run; then the first one again."""
    for shards in (world.chance.choice([2, 3, 7]), SHARDS):
        for program in (*world.workers, world.beat):
            program.env["TIDEMARK_SHARDS"] = str(shards)
            program.restart()
            world.pause(1)
    return 2


def next_version_is_deployed(world: World) -> int:
    """A new migration while the old programs run, then the new ones one by one, beside those that are left."""
    copy = Path(_next_version(world))
    migrated = subprocess.run(
        celery_argv("migrate"),
        cwd=copy,
        env={**world.beat.env},
        capture_output=True,
        text=True,
        check=False,
        timeout=90,
    )
    if migrated.returncode:
        raise DemoError(f"the migration failed: {migrated.stdout}{migrated.stderr}")
    world.pause(2)
    for program in (*world.workers, world.beat):
        program.directory = copy
        program.restart()
        world.pause(1)
    return 1


def _next_version(world: World) -> Path:
    """A copy of the code that runs now, with one migration more."""
    known = world.workers[0].directory
    versions = sorted((known / "db/migrations/versions").glob("0*.py"))
    number = int(versions[-1].stem[:4]) + 1
    copy = world.directory / f"version-{number}"
    for name in ("config", "db", "tasks", "tests"):
        shutil.copytree(known / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / f"db/migrations/versions/{number:04}_next.py").write_text(
        f'"""One more column."""\n\nfrom alembic import op\n\nrevision = "{number:04}"\n'
        f'down_revision = "{number - 1:04}"\nbranch_labels = None\ndepends_on = None\n\n\ndef upgrade() -> None:\n'
        f'    op.execute("alter table tidemark.topics add column next_{number} int")\n'
    )
    return copy


def records_are_deleted(world: World) -> int:
    """Delete-records at any offset of some partitions, and another limit of the topic, which holds from then on."""
    with world.connect() as conn:
        limit = world.chance.choice([50_000, 200_000, RETENTION_BYTES])
        set_retention(conn, "faults", retention_ms=None, retention_bytes=limit)
        for partition_id in world.chance.sample(world.ids, 5):
            end = world.watcher.end_offsets[partition_id]
            delete_records(conn, partition_id, world.chance.randint(0, end // 2))
    world.pause(3)
    return 6


def topic_is_deleted(world: World) -> int:
    """A topic comes, is committed to and placed, and goes while it is committed to; then it is purged."""
    name = f"doomed-{world.chance.randrange(10**9)}"
    refused = False
    with world.connect() as conn, world.connect() as other:
        create_topic(conn, name, 3)
        ids = partition_ids(conn, name)
        batches = [Batch(partition_id=i, n_records=2, byte_offset=0, byte_length=1, max_timestamp=0) for i in ids]
        for number in range(30):
            commit_object(conn, f"{name}/{number}", *columns(batches))
        materialize(conn, ids)
        for partition_id in ids:
            offsets = [batch.start_offset for batch in fetch_batches(conn, partition_id, 0)]
            if offsets != list(range(0, 60, 2)):
                raise DemoError(f"{name}: partition id {partition_id} has the offsets {offsets}")
        delete_topic(other, name)
        try:
            commit_object(conn, f"{name}/late", *columns(batches))
        except UnknownPartitionError:
            refused = True
        if not refused:
            raise DemoError(f"{name}: a commit to a deleted topic was accepted")
        purge(conn)
    return 1


FAULTS: Mapping[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        every_boundary,
        child_dies_at_a_boundary,
        child_of_a_worker_is_killed,
        worker_dies_before_it_acknowledges,
        worker_is_killed,
        worker_is_stopped,
        worker_is_frozen,
        beat_is_killed,
        two_beats,
        producer_is_killed,
        clock_jumps,
        answers_to_commits_are_lost,
        answers_to_materializations_are_lost,
        connections_are_cut,
        network_goes_silent,
        sessions_are_terminated,
        backend_is_killed,
        postgres_is_killed,
        postgres_is_shut_down_at_once,
        synchronous_standby_takes_over,
        connections_are_exhausted,
        disk_is_full,
        transaction_stays_open,
        snapshot_is_held,
        partitions_are_locked,
        redis_is_killed,
        redis_is_emptied,
        redis_is_full,
        redis_is_slow,
        redis_is_frozen,
        worker_is_partitioned_from_redis,
        messages_are_doubled_delayed_and_reordered,
        shards_change,
        next_version_is_deployed,
        records_are_deleted,
        topic_is_deleted,
    )
}


def _redis(world: World, ask: Callable[[Redis], T]) -> T:
    with Redis.from_url(world.redis.url) as redis:
        return ask(redis)
