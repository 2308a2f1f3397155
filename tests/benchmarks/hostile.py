"""What a hostile producer costs the others: `python -m tests.benchmarks.hostile [--rounds N] [--only NAME]`.

Its login is a member of tidemark_producer and nothing else. It does one thing after the other, and meanwhile another
producer commits, a worker materializes and a consumer fetches: milliseconds, medians, and the median of the rounds'
ratios to the same work without it, in turns. `a busy loop` touches nothing of ours: what a session costs that just has
the server compute. The tests run the same tricks (tests/integration/test_hostile.py).
"""

import argparse
import signal
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Event
from time import monotonic, perf_counter
from typing import Any

import psycopg
from rich.console import Console
from rich.table import Table

from db.adopt import _LOCK_KEY as ADOPTIONS
from db.commit import Batch, commit_batches
from db.fetch import fetch_batches
from db.materialize import materialize
from db.migrate import _LOCK_KEY as MIGRATIONS
from db.producers import Producer, init_producer
from db.topics import create_topic, partition_ids
from tests.benchmarks.server import running_server
from tests.support_roles import logins

Conn = psycopg.Connection[Any]

_PARTITIONS = 16


def _commit(key: str, partition_ids: str, batches: int) -> str:
    zeros, ones = (f"array_fill({value}, array[{batches}])" for value in ("0::bigint", "1"))
    return f"select tidemark.commit_batches({key}, {partition_ids}, {ones}, {zeros}, {ones}, {zeros})"


def _subtransactions(number: int) -> str:
    """Each block with a handler is one, and what it writes gives it an id of its own."""
    block = "begin perform tidemark.init_producer(); exception when division_by_zero then null; end;"
    return f"do $$ begin for i in 1..{number} loop {block} end loop; end $$"


OWN = _commit("'hostile/' || gen_random_uuid()", "tidemark.partition_ids('orders')", _PARTITIONS)


@dataclass(frozen=True)
class Trick:
    """What is done once, and then again and again. Where it is `refused`, every statement is."""

    once: Sequence[str] = ()
    again: str | None = None
    refused: bool = False


TRICKS = {
    "a busy loop": Trick(again="select count(*) from generate_series(1, 300000)"),
    "commits of its own": Trick(again=OWN),
    "an open transaction with commits": Trick(["begin", OWN]),
    "a held snapshot": Trick(["begin isolation level repeatable read", "select tidemark.list_topics()"]),
    "5,000 subtransactions, left open": Trick(["begin", OWN, _subtransactions(5_000)]),
    "subtransactions without end": Trick(again=_subtransactions(200)),
    "a thousand advisory locks, ours among them": Trick(
        [f"select pg_advisory_lock({key})" for key in (MIGRATIONS, ADOPTIONS)]
        + ["select pg_advisory_lock(n) from generate_series(1, 1000) n"]
    ),
    "temporary tables": Trick(again="create temp table t as select n from generate_series(1, 1000) n; drop table t"),
    "look-alikes in pg_temp": Trick(
        [
            "create temp table objects (id bigint, key text)",
            "create temp table topic_partitions (id int)",
            "create temp table record_batch_events (tx bigint)",
            "create function pg_temp.nextval(regclass) returns bigint return 1",
            "create function pg_temp.never(int, int) returns boolean return false",
            "create operator pg_temp.= (leftarg = int, rightarg = int, procedure = pg_temp.never)",
            "create operator pg_temp.< (leftarg = int, rightarg = int, procedure = pg_temp.never)",
            "create function pg_temp.nothing(text, text) returns boolean return false",
            "create operator pg_temp.= (leftarg = text, rightarg = text, procedure = pg_temp.nothing)",
            # What a domain checks runs with the rights of whoever casts to it.
            """create function pg_temp.is_mine() returns boolean language plpgsql as
               $$ begin assert current_user = session_user, 'runs as the owner'; return true; end $$""",
            "create domain pg_temp.bytea as pg_catalog.bytea check (pg_temp.is_mine())",
            "create domain pg_temp.text as pg_catalog.text check (pg_temp.is_mine())",
            "set search_path = pg_temp, pg_catalog",
        ],
        again=OWN,
    ),
    "65,536 batches, and a key of 1,016 bytes": Trick(
        again=_commit(
            "repeat('k', 980) || gen_random_uuid()",
            "array_fill((tidemark.partition_ids('orders'))[1], array[65536])",
            65_536,
        )
    ),
    "a million batches": Trick(again=_commit("'hostile/x'", "array_fill(1, array[1000000])", 1_000_000), refused=True),
    "a key of 20 MB": Trick(again="select tidemark.condemn(array[repeat('x', 20000000)])", refused=True),
    "keys condemned, 10,000 at a time": Trick(
        again="""select count(*)
            from tidemark.condemn(array(select gen_random_uuid()::text from generate_series(1, 10000)))"""
    ),
    "new producers without end": Trick(again="select count(tidemark.init_producer()) from generate_series(1, 1000)"),
    "notifications": Trick(
        ["listen hostile"], again="select count(pg_notify('hostile', n::text)) from generate_series(1, 1000) n"
    ),
    "settings of its own": Trick(
        [
            f"set {name} = {value}"
            for name, value in {
                "default_transaction_isolation": "serializable",
                "default_transaction_deferrable": "on",
                "synchronous_commit": "off",
                "enable_indexscan": "off",
                "enable_indexonlyscan": "off",
                "enable_bitmapscan": "off",
                "plan_cache_mode": "force_custom_plan",
                "work_mem": "'64kB'",
                "jit_above_cost": "0",
                "statement_timeout": "0",
                "lock_timeout": "0",
                "idle_in_transaction_session_timeout": "0",
                "transform_null_equals": "on",
                "datestyle": "'SQL, DMY'",
                "bytea_output": "escape",
            }.items()
        ],
        again=OWN,
    ),
}


@contextmanager
def playing(url: str, trick: Trick) -> Iterator[None]:
    """The trick goes on until the end, and what it holds is given back then."""
    over = Event()
    with psycopg.connect(url, autocommit=True) as conn, ThreadPoolExecutor(1) as threads:
        for statement in trick.once:
            conn.execute(statement.encode())

        def play() -> None:
            while trick.again is not None and not over.is_set():
                # What is refused, or cancelled at the end.
                with suppress(psycopg.Error):
                    conn.execute(trick.again.encode())

        playing = threads.submit(play)
        try:
            yield
        finally:
            over.set()
            conn.cancel_safe()
        playing.result()


class Others:
    """Another producer, a worker and a consumer, each with a connection and a role of its own."""

    def __init__(self, producer: Conn, worker: Conn, consumer: Conn) -> None:
        self.producer, self.worker, self.consumer = producer, worker, consumer
        self.ids = partition_ids(producer, "orders")
        self.identity: Producer = init_producer(producer)
        self.sent = 0

    def commit(self) -> int:
        """A batch to each partition, the next of this producer's sequences; returns the object's id."""
        place = Batch(partition_id=0, n_records=1, byte_offset=0, byte_length=1, max_timestamp=0)
        who = self.identity
        mine = replace(place, producer_id=who.producer_id, producer_epoch=who.producer_epoch, base_sequence=self.sent)
        done = commit_batches(self.producer, f"others/{monotonic()}", [replace(mine, partition_id=i) for i in self.ids])
        if set(done.verdicts) != {"accepted"}:
            raise AssertionError(done)
        self.sent += 1
        return done.object_id

    def materialize(self) -> bool:
        """A pass; whether it left something."""
        return bool(materialize(self.worker, self.ids).backlog_partition_ids)

    def fetch(self) -> None:
        fetch_batches(self.consumer, self.ids[0], 0, max_batches=100)

    def times(self, steps: int) -> dict[str, float]:
        """Milliseconds of each, the median of so many steps."""
        took: defaultdict[str, list[float]] = defaultdict(list)
        for _ in range(steps):
            for name in ("commit", "materialize", "fetch"):
                began = perf_counter()
                getattr(self, name)()
                took[name].append(1e3 * (perf_counter() - began))
        return {name: statistics.median(each) for name, each in took.items()}


def measure(url: str, rounds: int, steps: int, tricks: Sequence[str], console: Console) -> None:
    """Print milliseconds of each kind of work under each trick, and their ratios to those without."""
    with ExitStack() as stack:
        urls = stack.enter_context(logins(url))
        connections = [stack.enter_context(psycopg.connect(urls[letter], autocommit=True)) for letter in "pwc"]
        with psycopg.connect(url, autocommit=True) as owner:
            create_topic(owner, "orders", _PARTITIONS)
        others = Others(*connections)
        others.times(steps)
        found: defaultdict[str, list[dict[str, tuple[float, float]]]] = defaultdict(list)
        for number in range(rounds):
            for name in tricks if number % 2 == 0 else reversed(tricks):
                alone = others.times(steps)
                with playing(urls["h"], TRICKS[name]):
                    beside = others.times(steps)
                found[name].append({work: (beside[work], beside[work] / alone[work]) for work in alone})
                # What it left is not the next one's.
                while others.materialize():
                    pass
    table = Table("Trick", "Commit ms", "Ratio", "Materialize ms", "Ratio", "Fetch ms", "Ratio")
    for name in tricks:
        cells = (
            f"{statistics.median(each[work][at] for each in found[name]):.2f}"
            for work in ("commit", "materialize", "fetch")
            for at in (0, 1)
        )
        table.add_row(name, *cells)
    console.print(table)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=40, help="of each kind of work in a round (default: %(default)s)")
    parser.add_argument("--only", choices=TRICKS, action="append", help="this trick; may be given several times")
    options = parser.parse_args(arguments)
    # An end by SIGTERM stops the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with running_server() as url:
        measure(url, options.rounds, options.steps, options.only or list(TRICKS), Console(width=110))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
