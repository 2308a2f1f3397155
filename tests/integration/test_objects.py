"""Objects: condemned or committed, deleted from a store once they are dead, and compared with it.

The store is a directory, and S3 as moto's server speaks it. What is the same for both is tested with both.
"""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import count as numbers
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import psycopg
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from psycopg import Connection, errors

from config.celery import celery_config
from config.errors import CondemnedObjectError, InvalidCommitError, SettingsError, StoreError
from config.settings import Settings
from db import objects
from db.arrays import Int8Array, register
from db.materialize import materialize
from db.objects import condemn, forget_dead_objects, read_reconciliation, take_dead_objects
from db.retention import retain
from db.statements import pipelined, statements
from tasks import cleanup, store
from tasks.app import TidemarkApp
from tasks.cleanup import Found, collect, reconcile, store_of
from tasks.jobs import collect as collect_job
from tasks.jobs import reconcile as reconcile_job
from tasks.logs import secrets_of
from tasks.store import Bucket, Directory, Upload, open_store
from tests.integration.conftest import MakeApp, commit, make_topic
from tests.support import Connect, wait_until

# The least that the settings take: what is there is old with the next tick of the store's clock.
AT_ONCE = 0.001
NOBODY = "redis://127.0.0.1:1/0"
# Keys that a program which splits, quotes or sorts them otherwise gets wrong.
ODD = [
    "a",
    "a-b",
    "b/c",
    "b-c",
    "b.d/e",
    "b/c.d",
    "b0",
    "with space ",
    "plus+and%2Fpercent",
    "quote'\"<&>\\",
    "tab\tand\x01control",
    "Größe/日本/🦀",
    "\ufffd",
    "z" * 200,
]


class Uploads(Protocol):
    """A store as its brokers and its administrator see it."""

    settings: dict[str, Any]

    def put(self, key: str) -> None: ...

    def keys(self) -> list[str]: ...


class Files(Uploads):
    def __init__(self, root: Path) -> None:
        self.root = root
        self.settings = {"object_store": f"file://{root}"}

    def put(self, key: str) -> None:
        file = self.root / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")

    def keys(self) -> list[str]:
        return sorted(str(file.relative_to(self.root)) for file in self.root.rglob("*") if file.is_file())


class S3(Uploads):
    """A prefix of a bucket, with something beside it that is nobody's business."""

    def __init__(self, endpoint: str) -> None:
        self._bucket = uuid4().hex
        options = {"endpoint_url": endpoint, "key": "an-access-key", "secret": "a-secret-key"}
        self.settings = {
            "object_store": f"s3://{self._bucket}/the/prefix/",
            "object_store_options": json.dumps(options),
        }
        self._fs: Any = s3fs.S3FileSystem(**options)
        self._fs.call_s3("create_bucket", Bucket=self._bucket)
        for beside in ("the/prefixes", "the/other", "the/prefix/"):
            self._fs.call_s3("put_object", Bucket=self._bucket, Key=beside, Body=b"")

    def put(self, key: str) -> None:
        self._fs.call_s3("put_object", Bucket=self._bucket, Key=f"the/prefix/{key}", Body=b"x")

    def keys(self) -> list[str]:
        found = self._fs.call_s3("list_objects_v2", Bucket=self._bucket)
        keys = {item["Key"] for item in found["Contents"]}
        assert {"the/prefixes", "the/other", "the/prefix/"} <= keys
        return sorted(
            key.removeprefix("the/prefix/") for key in keys if key.startswith("the/prefix/") and key[-1] != "/"
        )


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture(params=["files", "s3"])
def uploads(request: pytest.FixtureRequest, files: Files) -> Uploads:
    return files if request.param == "files" else S3(request.getfixturevalue("s3_endpoint"))


class MakeCleaner(Protocol):
    """An app with this store. What is dead goes at once, and what is unknown is old at once, unless settings say."""

    def __call__(self, uploads: Uploads, **changes: Any) -> TidemarkApp: ...


@pytest.fixture
def make_cleaner(make_app: MakeApp) -> MakeCleaner:
    def make(uploads: Uploads, **changes: Any) -> TidemarkApp:
        quick = {"object_grace_seconds": AT_ONCE, "object_ttl_seconds": AT_ONCE}
        return make_app(**{"broker_url": NOBODY, **quick, **uploads.settings, **changes})

    return make


@pytest.fixture
def ids(conn: Connection[Any]) -> list[int]:
    return make_topic(conn, partitions=2)


def rows(conn: Connection[Any], text: str) -> list[Any]:
    return [row[0] for row in conn.execute(text.encode()).fetchall()]


def known(conn: Connection[Any]) -> list[str]:
    return rows(conn, "select key from tidemark.objects order by key")


def bring(conn: Connection[Any], uploads: Uploads, keys: Sequence[str], ids: Sequence[int]) -> None:
    """Upload and commit."""
    for key in keys:
        uploads.put(key)
        commit(conn, key, ids)


def free(conn: Connection[Any], ids: list[int]) -> None:
    """Let retention delete all that was committed."""
    materialize(conn, ids)
    conn.execute("select tidemark.set_retention('orders', 0, null)")
    retain(conn)
    conn.execute("select tidemark.set_retention('orders', null, null)")


def turns(task: Callable[[TidemarkApp], dict[str, Any]], app: TidemarkApp, field: str, wanted: int) -> None:
    """Turns of a task until they have added up to so many: a store's clock may tick once a second."""
    total = 0

    def enough() -> bool:
        nonlocal total
        total += int(task(app)[field])
        return total >= wanted

    wait_until(enough)
    assert total == wanted


def collect_all(app: TidemarkApp, wanted: int) -> None:
    turns(collect, app, "deleted", wanted)


# --- Condemn meets commit


def test_a_condemned_key_refuses_its_commit(conn: Connection[Any], ids: list[int]) -> None:
    assert condemn(conn, ["late", "also"]) == ["also", "late"]
    with pytest.raises(CondemnedObjectError, match="'late' is condemned"):
        commit(conn, "late", ids)
    assert rows(conn, "select count(*) from tidemark.record_batch_events") == [0]
    # It is listed, and its place in the order of commits is its transaction's.
    assert rows(conn, "select count(*) from tidemark.dead_objects") == [2]
    with conn.transaction():
        condemn(conn, ["third"])
        own = "tidemark.tx_base() + pg_current_xact_id()::text::bigint"
        assert rows(conn, f"select tx = {own} from tidemark.objects where key = 'third'") == [True]


def test_a_committed_key_is_not_condemned(conn: Connection[Any], ids: list[int]) -> None:
    object_id = commit(conn, "mine", ids)
    assert condemn(conn, ["mine", "other", "other"]) == ["other"]
    assert commit(conn, "mine", ids) == object_id
    # Said again, it is the same: the answer may have been lost.
    assert condemn(conn, ["mine", "other"]) == ["other"]
    assert rows(conn, "select count(*) from tidemark.objects") == [2]
    assert condemn(conn, []) == []


def test_a_freed_key_is_not_condemned(conn: Connection[Any], ids: list[int]) -> None:
    object_id = commit(conn, "freed", ids)
    free(conn, ids)
    assert condemn(conn, ["freed"]) == []
    assert commit(conn, "freed", ids) == object_id


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("null", "keys to condemn are NULL"),
        ("array['good', null]", "the key NULL"),
        ("array['good', '']", "the key ''"),
        ("array['good', repeat('ä', 513)]", "the key 'äää"),
        ("array(select 'key-' || n from generate_series(1, 10001) n)", "10001 keys"),
    ],
)
def test_bad_keys_condemn_nothing(keys: str, said: str, conn: Connection[Any]) -> None:
    with pytest.raises(psycopg.Error, match=said) as caught:
        conn.execute(f"select * from tidemark.condemn({keys})".encode())
    assert caught.value.sqlstate == InvalidCommitError.code
    assert known(conn) == []


@pytest.mark.parametrize("key", ["nul\0", "\udc80", "", "k" * 1025])
def test_bad_keys_from_python(key: str, conn: Connection[Any]) -> None:
    with pytest.raises(InvalidCommitError):
        condemn(conn, ["good", key])
    assert known(conn) == []


def test_the_greatest_number_of_keys(conn: Connection[Any]) -> None:
    assert len(condemn(conn, [f"{n:0>1020}" for n in range(10_000)])) == 10_000


@pytest.mark.parametrize("level", ["off", "local", "on", "remote_apply"])
def test_condemning_is_durable(level: str, conn: Connection[Any]) -> None:
    conn.execute(f"set synchronous_commit = {level}".encode())
    with conn.transaction():
        condemn(conn, ["key"])
        assert rows(conn, "show synchronous_commit") == [level if level == "remote_apply" else "on"]


def test_a_producer_role_may_condemn(conn: Connection[Any]) -> None:
    conn.execute("set role tidemark_producer")
    assert condemn(conn, ["mine"]) == ["mine"]
    with pytest.raises(errors.InsufficientPrivilege):
        conn.execute("delete from tidemark.objects")


@pytest.mark.parametrize("commits", [True, False])
def test_a_commit_under_way_is_waited_for(
    commits: bool,  # noqa: FBT001 - a parameter of the test
    connect: Connect,
    conn: Connection[Any],
    ids: list[int],
) -> None:
    broker = connect(autocommit=False)
    commit(broker, "mine", ids)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(condemn, connect(), ["mine"])
        wait_until(lambda: waits_for_lock(conn))
        if commits:
            broker.commit()
        else:
            broker.rollback()
        assert answer.result(10) == ([] if commits else ["mine"])
    assert rows(conn, "select count(*) from tidemark.record_batch_events") == [2 if commits else 0]


@pytest.mark.parametrize("condemns", [True, False])
def test_a_condemnation_under_way_is_waited_for(
    condemns: bool,  # noqa: FBT001 - a parameter of the test
    connect: Connect,
    conn: Connection[Any],
    ids: list[int],
) -> None:
    cleaner = connect(autocommit=False)
    condemn(cleaner, ["mine"])
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(commit, connect(), "mine", ids)
        wait_until(lambda: waits_for_lock(conn))
        if condemns:
            cleaner.commit()
            with pytest.raises(CondemnedObjectError):
                answer.result(10)
        else:
            cleaner.rollback()
            assert answer.result(10) > 0
    assert rows(conn, "select count(*) from tidemark.record_batch_events") == [0 if condemns else 2]


def waits_for_lock(conn: Connection[Any]) -> bool:
    return bool(rows(conn, "select pid from pg_locks where not granted and locktype = 'transactionid'"))


def test_at_the_same_moment_one_of_both_wins(connect: Connect, conn: Connection[Any], ids: list[int]) -> None:
    keys = [f"key-{n}" for n in range(300)]
    committed, condemned = set[str](), set[str]()
    barrier = threading.Barrier(4)

    def brokers(mine: Connection[Any], order: list[str]) -> None:
        barrier.wait()
        for key in order:
            try:
                commit(mine, key, ids)
            except CondemnedObjectError:
                continue
            committed.add(key)

    def cleaners(mine: Connection[Any], order: list[str]) -> None:
        barrier.wait()
        for first in range(0, len(order), 10):
            # In whatever order they are given, two calls do not deadlock.
            condemned.update(condemn(mine, random.sample(order[first : first + 10], 10)))

    with ThreadPoolExecutor(4) as pool:
        done = [
            pool.submit(brokers, connect(), keys[::-1]),
            pool.submit(brokers, connect(), keys),
            pool.submit(cleaners, connect(), keys),
            pool.submit(cleaners, connect(), keys),
        ]
        for one in done:
            one.result(60)
    assert committed | condemned == set(keys)
    assert committed & condemned == set()
    assert set(rows(conn, "select o.key from tidemark.objects o where o.content_hash <> ''")) == committed
    assert rows(conn, "select count(distinct id >> 16) from tidemark.record_batch_events") == [len(committed)]


# --- Forgetting


def test_what_is_forgotten_leaves_nothing_behind(conn: Connection[Any], ids: list[int]) -> None:
    """Of a key that was condemned, of an object that was freed, and of one of which nothing was accepted."""
    condemn(conn, ["condemned"])
    commit(conn, "freed", ids)
    free(conn, ids)
    conn.execute(
        "select tidemark.commit_batches('refused', array[2147483647, %s], array[1, 0], array[0, 0]::bigint[], "
        "array[1, 1], array[0, 0]::bigint[])",
        (ids[0],),
    )
    assert rows(conn, "select count(*) from tidemark.refused_batches") == [2]
    dead = take_dead_objects(conn, limit=10, older_than_seconds=0, new_round=True)
    assert [o.key for o in dead] == ["condemned", "freed", "refused"]
    assert forget_dead_objects(conn, [o.id for o in dead]) == 3
    for table in ("objects", "dead_objects", "deleted_batches", "refused_batches", "record_batch_events"):
        assert rows(conn, f"select count(*) from tidemark.{table}") == [0], table


def test_an_object_with_batches_left_is_not_forgotten(conn: Connection[Any], ids: list[int]) -> None:
    object_id = commit(conn, "mine", ids)
    conn.execute("insert into tidemark.dead_objects (object_id) values (%s)", (object_id,))
    assert forget_dead_objects(conn, [object_id]) == 0
    assert known(conn) == ["mine"]


# --- Taking what is dead


def test_nobody_takes_what_another_took(connect: Connect, conn: Connection[Any]) -> None:
    keys = condemn(conn, [f"{n:04}" for n in range(500)])
    taken: list[str] = []
    lock, barrier = threading.Lock(), threading.Barrier(3)

    def take(mine: Connection[Any]) -> None:
        barrier.wait()
        while found := take_dead_objects(mine, limit=7, older_than_seconds=0):
            with lock:
                taken.extend(o.key for o in found)

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(take, connect()) for _ in range(3)]:
            done.result(60)
    assert sorted(taken) == keys
    # The position is the newest row; those before it go.
    assert 1 <= rows(conn, "select count(*) from tidemark.collections")[0] <= 10


def test_a_round_goes_once_through_all_that_is_dead(conn: Connection[Any]) -> None:
    keys = condemn(conn, ["a", "b", "c", "d", "e"])

    def take(limit: int = 2, *, new_round: bool = False) -> list[str]:
        return [o.key for o in take_dead_objects(conn, limit=limit, older_than_seconds=0, new_round=new_round)]

    assert [take(), take(), take(), take()] == [["a", "b"], ["c", "d"], ["e"], []]
    condemn(conn, ["f"])
    assert [take(), take()] == [["f"], []]
    assert take(10, new_round=True) == [*keys, "f"]


def test_a_new_round_begins_after_the_grace_time(conn: Connection[Any]) -> None:
    condemn(conn, ["key"])
    conn.execute("update tidemark.dead_objects set dead_at = dead_at - interval '2 hours'")

    def take() -> list[str]:
        return [o.key for o in take_dead_objects(conn, limit=10, older_than_seconds=3600, new_round=True)]

    assert [take(), take()] == [["key"], []]
    conn.execute("update tidemark.collections set begun_at = begun_at - interval '59 minutes'")
    assert take() == []
    conn.execute("update tidemark.collections set begun_at = begun_at - interval '1 minute'")
    assert [take(), take()] == [["key"], []]


def test_what_a_long_transaction_adds_is_for_the_next_round(connect: Connect, conn: Connection[Any]) -> None:
    late = connect(autocommit=False)
    condemn(late, ["late"])
    condemn(conn, ["early"])
    assert [o.key for o in take_dead_objects(conn, limit=10, older_than_seconds=0)] == ["early"]
    late.commit()
    assert take_dead_objects(conn, limit=10, older_than_seconds=0) == []
    found = take_dead_objects(conn, limit=10, older_than_seconds=0, new_round=True)
    assert [o.key for o in found] == ["late", "early"]


def test_what_is_given_back_is_taken_next(conn: Connection[Any]) -> None:
    condemn(conn, ["a", "b", "c"])
    first = take_dead_objects(conn, limit=1, older_than_seconds=0)
    second = take_dead_objects(conn, limit=1, older_than_seconds=0)
    objects.give_back_dead_objects(conn, second)
    assert take_dead_objects(conn, limit=1, older_than_seconds=0) == second
    objects.give_back_dead_objects(conn, first)
    # Of two that give back the earlier position counts.
    objects.give_back_dead_objects(conn, second)
    assert [o.key for o in take_dead_objects(conn, limit=5, older_than_seconds=0)] == ["a", "b", "c"]


def pages_read(conn: Connection[Any], name: str, parameters: Sequence[object]) -> int:
    """Pages that a statement touches, run as the program does."""
    with pipelined(conn):
        cursor = psycopg.RawCursor(conn)
        register(cursor.adapters)
        cursor.execute(b"explain (analyze, buffers, format json) " + statements()[name], parameters)
        found = cursor.fetchone()
    assert found is not None
    plan = found[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def test_what_was_collected_is_not_passed_over_again(connect: Connect, conn: Connection[Any]) -> None:
    """While a snapshot is held, what is deleted stays in the index: to begin again would read all of it."""
    holder = connect(autocommit=False)
    holder.execute("set transaction isolation level repeatable read")
    holder.execute("select count(*) from tidemark.objects")
    for part in range(10):
        condemn(conn, [f"{part}-{n:04}" for n in range(1_000)])
    while dead := take_dead_objects(conn, limit=1_000, older_than_seconds=0):
        forget_dead_objects(conn, [o.id for o in dead])
    condemn(conn, ["new"])
    read = pages_read(conn, "take_dead_objects", (1_000, 0, False))
    # What a new round would read, which is why there is one in a grace time only.
    assert pages_read(conn, "take_dead_objects", (1_000, 0, True)) > 3 * read
    assert read < 30
    assert pages_read(conn, "read_reconciliation", ()) < 5


def test_a_page_of_objects_costs_what_it_holds(conn: Connection[Any]) -> None:
    for part in range(10):
        condemn(conn, [f"{part}-{n:04}" for n in range(5_000)])
    for statistics in ("", "analyze tidemark.objects, tidemark.dead_objects"):
        conn.execute(statistics.encode() or b"select")
        assert pages_read(conn, "find_objects", ("5", 100)) < 1_000
        assert pages_read(conn, "find_live_objects", (["1-0001", "2-0002"],)) < 30
        assert pages_read(conn, "delete_dead_objects", (Int8Array(range(1, 101)),)) < 5_000


# --- Collecting


def test_a_freed_upload_goes_and_the_others_stay(
    uploads: Uploads, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int]
) -> None:
    app = make_cleaner(uploads)
    bring(conn, uploads, ["one", "two"], ids)
    free(conn, ids)
    bring(conn, uploads, ["three"], ids)
    uploads.put("unknown")
    collect_all(app, 2)
    assert uploads.keys() == ["three", "unknown"]
    assert known(conn) == ["three"]
    assert collect(app) == {"deleted": 0, "failed": 0}


def test_a_freed_upload_waits_for_its_grace_time(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int]
) -> None:
    """And a commit that is repeated meanwhile has its answer."""
    app = make_cleaner(files, object_grace_seconds=3600)
    bring(conn, files, ["freed"], ids)
    free(conn, ids)
    assert collect(app) == {"deleted": 0, "failed": 0}
    object_id = commit(conn, "freed", ids)
    assert rows(conn, "select id from tidemark.objects") == [object_id]
    conn.execute("update tidemark.dead_objects set dead_at = dead_at - interval '3601 seconds'")
    conn.execute("update tidemark.collections set begun_at = '-infinity', dead_at = '-infinity'")
    assert files.keys() == ["freed"]
    assert collect(app) == {"deleted": 1, "failed": 0}
    assert (files.keys(), known(conn)) == ([], [])


def test_what_is_gone_already_is_no_error(uploads: Uploads, make_cleaner: MakeCleaner, conn: Connection[Any]) -> None:
    condemn(conn, ["a/b", "never", "k" * 1024])
    uploads.put("a")
    collect_all(make_cleaner(uploads), 3)
    assert (uploads.keys(), known(conn)) == (["a"], [])


def test_odd_keys(uploads: Uploads, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int]) -> None:
    app = make_cleaner(uploads)
    live, unknown = ODD[::2], ODD[1::2]
    bring(conn, uploads, live, ids)
    for key in unknown:
        uploads.put(key)
    turns(reconcile, app, "condemned", len(unknown))
    assert [u.key for u in app.once(store_of).walk("")] == sorted(ODD) == uploads.keys()
    collect_all(app, len(unknown))
    assert uploads.keys() == sorted(live) == known(conn)
    assert reconcile(app)["missing"] == 0


def test_more_than_a_page(
    uploads: Uploads, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "_PAGE", 7)
    monkeypatch.setattr(store, "_PAGE", 5)
    app = make_cleaner(uploads)
    keys = [f"{n % 4}/{n:03}" for n in range(60)]
    bring(conn, uploads, keys[::3], ids)
    for key in keys[1::3] + keys[2::3]:
        uploads.put(key)
    turns(reconcile, app, "condemned", 40)
    collect_all(app, 40)
    assert uploads.keys() == known(conn) == sorted(keys[::3])


def test_several_collectors_delete_each_object_once(
    uploads: Uploads,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cleanup, "_PAGE", 5)
    keys = condemn(conn, [f"{n:03}" for n in range(200)])
    for key in [*keys, "unknown"]:
        uploads.put(key)
    deleted: list[str] = []
    kind = type(open_store(Settings.model_validate(uploads.settings)))
    delete = kind.delete

    def counting(self: Any, keys: Sequence[str]) -> dict[str, str]:
        deleted.extend(keys)
        return delete(self, keys)

    monkeypatch.setattr(kind, "delete", counting)
    # As a worker does that finds nothing to begin anew: the round is young.
    apps = [make_cleaner(uploads) for _ in range(3)]
    conn.execute("update tidemark.collections set begun_at = 'infinity'")
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(collect, apps))
    assert sum(result["deleted"] for result in results) == 200
    assert sorted(deleted) == keys
    assert (uploads.keys(), known(conn)) == (["unknown"], [])


def test_two_that_begin_a_round_at_once_harm_nothing(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "_PAGE", 3)
    for key in condemn(conn, [f"{n:03}" for n in range(100)]):
        files.put(key)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(collect, [make_cleaner(files) for _ in range(4)]))
    left = 100 - sum(result["deleted"] for result in results)
    collect_all(make_cleaner(files), left)
    assert (files.keys(), known(conn)) == ([], [])


def test_a_turn_ends_when_its_time_is_up(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "_PAGE", 10)
    for key in condemn(conn, [f"{n:03}" for n in range(35)]):
        files.put(key)
    app = make_cleaner(files, maintenance_seconds=0.001)
    conn.execute("update tidemark.collections set begun_at = 'infinity'")
    wait_until(lambda: rows(conn, "select max(dead_at) < now() - interval '10 ms' from tidemark.dead_objects")[0])
    assert [collect(app)["deleted"] for _ in range(5)] == [10, 10, 10, 5, 0]


# --- What fails, and what dies


class DiedError(BaseException):
    """As a worker that is killed: nothing of ours catches it."""


def test_a_collector_that_dies_after_deleting_some(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = condemn(conn, ["a", "b", "c", "d"])
    for key in keys:
        files.put(key)
    delete = Directory.delete

    def dying(self: Directory, keys: Sequence[str]) -> dict[str, str]:
        delete(self, keys[:2])
        raise DiedError

    app = make_cleaner(files)
    with monkeypatch.context() as patch:
        patch.setattr(Directory, "delete", dying)
        with pytest.raises(DiedError):
            wait_until(lambda: collect(app)["deleted"])
    assert (files.keys(), known(conn)) == (["c", "d"], keys)
    collect_all(app, 4)
    assert (files.keys(), known(conn)) == ([], [])


# Runs a task in a process that is killed as soon as one of its steps is done.
KILLED = """
import os, signal, sys
from tasks import cleanup
from tasks.store import Directory
from tests.support_commands import app_for

task, step, url, root = sys.argv[1:]
where = Directory if step == "delete" else cleanup
call = getattr(where, step)

def killing(*arguments, **named):
    call(*arguments, **named)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(where, step, killing)
with app_for(url, "redis://127.0.0.1:1/0", object_store=f"file://{root}", object_grace_seconds=0.001,
             object_ttl_seconds=0.001) as app:
    getattr(cleanup, task)(app)
"""


@pytest.mark.parametrize(
    ("task", "step"),
    [
        ("collect", "take_dead_objects"),
        ("collect", "delete"),
        ("collect", "forget_dead_objects"),
        ("reconcile", "condemn"),
        ("reconcile", "save_reconciliation"),
    ],
)
def test_killed_after_each_step(
    task: str,
    step: str,
    files: Files,
    make_cleaner: MakeCleaner,
    database_url: str,
    conn: Connection[Any],
    ids: list[int],
) -> None:
    app = make_cleaner(files)
    bring(conn, files, ["freed"], ids)
    free(conn, ids)
    bring(conn, files, ["live"], ids)
    condemn(conn, ["condemned"])
    for key in ("condemned", "unknown"):
        files.put(key)
    wait_until(lambda: old(app, "unknown"))
    if task == "collect":
        reconcile(app)
    died = subprocess.run(
        [sys.executable, "-c", KILLED, task, step, database_url, str(files.root)], timeout=60, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert (files.root / "live").exists()
    # The next turns bring it to the same end, wherever that was.
    wait_until(lambda: (reconcile(app), collect(app), files.keys() == known(conn) == ["live"])[-1])
    assert reconcile(app) == asdict(Found(compared=1, complete=True))
    assert commit(conn, "live", ids) > 0


def test_a_collector_that_dies_before_it_forgets(
    uploads: Uploads, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_cleaner(uploads)
    bring(conn, uploads, ["freed"], ids)
    free(conn, ids)
    with monkeypatch.context() as patch:
        patch.setattr(cleanup, "forget_dead_objects", dies)
        with pytest.raises(DiedError):
            wait_until(lambda: collect(app)["deleted"])
    assert (uploads.keys(), known(conn)) == ([], ["freed"])
    # Its batches are gone, so nobody misses it.
    assert reconcile(app)["missing"] == 0
    collect_all(app, 1)
    assert known(conn) == []


def dies(*_: object, **__: object) -> None:
    raise DiedError


@pytest.mark.parametrize("step", ["condemn", "save_reconciliation"])
def test_a_reconciler_that_dies(
    step: str,
    files: Files,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = make_cleaner(files)
    bring(conn, files, ["live"], ids)
    files.put("unknown")
    wait_until(lambda: old(app, "unknown"))
    with monkeypatch.context() as patch:
        patch.setattr(cleanup, step, dies)
        with pytest.raises(DiedError):
            reconcile(app)
    assert known(conn) == (["live"] if step == "condemn" else ["live", "unknown"])
    reconcile(app)
    assert known(conn) == ["live", "unknown"]
    collect_all(app, 1)
    assert (files.keys(), known(conn)) == (["live"], ["live"])


def old(app: TidemarkApp, key: str) -> bool:
    return any(u.key == key and u.age > 2 * AT_ONCE for u in app.once(store_of).walk(""))


def test_an_upload_that_ends_after_it_was_collected_is_condemned_again(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int]
) -> None:
    app = make_cleaner(files)
    bring(conn, files, ["live"], ids)
    for _ in range(2):
        files.put("slow")
        turns(reconcile, app, "condemned", 1)
        collect_all(app, 1)
        assert files.keys() == ["live"]


def test_a_store_that_is_away_costs_nothing_but_time(
    make_cleaner: MakeCleaner, s3_endpoint: str, conn: Connection[Any], ids: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    uploads = S3(s3_endpoint)
    bring(conn, uploads, ["freed"], ids)
    free(conn, ids)
    options = json.loads(uploads.settings["object_store_options"]) | {"endpoint_url": "http://127.0.0.1:1"}
    away = make_cleaner(uploads, object_store_options=json.dumps(options))
    for task in (collect, reconcile):
        with pytest.raises(
            StoreError, match=r"object store s3://.*127\.0\.0\.1:1.*TIDEMARK_OBJECT_STORE_OPTIONS"
        ) as caught:
            wait_until(lambda: task(away)["deleted"])  # noqa: B023
        assert "\n" not in str(caught.value)
        assert "a-secret-key" not in str(caught.value)
    assert known(conn) == ["freed"]
    # Given back: the same round goes on with it.
    conn.execute("update tidemark.collections set begun_at = 'infinity'")
    assert collect(make_cleaner(uploads)) == {"deleted": 1, "failed": 0}
    assert uploads.keys() == []


@pytest.mark.parametrize("task", [collect, reconcile])
def test_a_directory_that_is_not_there_is_no_empty_store(
    task: Callable[[TidemarkApp], dict[str, Any]],
    tmp_path: Path,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    ids: list[int],
) -> None:
    bring(conn, Files(tmp_path / "mounted"), ["freed"], ids)
    free(conn, ids)
    bring(conn, Files(tmp_path / "mounted"), ["live"], ids)
    away = Files(tmp_path / "away")
    with pytest.raises(StoreError, match=r"file://.*/away: FileNotFoundError.*is mounted"):
        wait_until(lambda: task(make_cleaner(away))["deleted"])
    assert known(conn) == ["freed", "live"]


def test_a_bucket_that_does_not_exist(make_cleaner: MakeCleaner, s3_endpoint: str, conn: Connection[Any]) -> None:
    uploads = S3(s3_endpoint)
    app = make_cleaner(uploads, object_store="s3://there-is-none")
    condemn(conn, ["key"])
    with pytest.raises(StoreError, match="s3://there-is-none/: FileNotFoundError"):
        reconcile(app)
    with pytest.raises(StoreError, match="s3://there-is-none/"):
        wait_until(lambda: collect(app)["deleted"])
    assert known(conn) == ["key"]


def test_one_upload_that_cannot_be_deleted_holds_up_no_other(
    uploads: Uploads,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = condemn(conn, ["a", "guarded", "z"])
    for key in keys:
        uploads.put(key)
    app = make_cleaner(uploads)
    unlink, call = os.unlink, Bucket._call

    def guarded(path: Any, **options: Any) -> None:
        if os.fsdecode(path).endswith("guarded"):
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **options)

    async def denied(self: Bucket, method: str, **arguments: Any) -> Any:
        if method != "delete_objects":
            return await call(self, method, **arguments)
        named = [o for o in arguments["Delete"]["Objects"] if not o["Key"].endswith("guarded")]
        answer = await call(self, method, Delete={"Objects": named, "Quiet": True}) if named else {}
        errors = [{"Key": "the/prefix/guarded", "Code": "AccessDenied", "Message": "Operation not permitted"}]
        return {**answer, "Errors": errors}

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", guarded)
        patch.setattr(Bucket, "_call", denied)
        collect_all(app, 2)
        assert (uploads.keys(), known(conn)) == (["guarded"], ["guarded"])
        [record, *_] = [r for r in caplog.records if r.message == "uploads cannot be deleted"]
        assert (record.levelno, vars(record)["key"], vars(record)["uploads"]) == (logging.ERROR, "guarded", 1)
        assert "Operation not permitted" in vars(record)["error"]
    collect_all(app, 1)
    assert (uploads.keys(), known(conn)) == ([], [])


@pytest.mark.parametrize(
    "key", ["../outside", "/outside", "a/../../outside", "a//b", "./a/b", "a/b/", "link/outside2", "a"]
)
def test_a_key_that_is_no_plain_path_touches_no_file(
    key: str, tmp_path: Path, make_cleaner: MakeCleaner, conn: Connection[Any]
) -> None:
    files = Files(tmp_path / "root")
    files.put("a/b")
    (tmp_path / "outside").write_bytes(b"x")
    condemn(conn, [key])
    collect_all(make_cleaner(files), 1)
    assert files.keys() == ["a/b"]
    assert (tmp_path / "outside").exists()
    assert known(conn) == []


# --- Reconciling


def test_an_unknown_upload_is_condemned_and_later_deleted(
    uploads: Uploads, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int]
) -> None:
    patient = make_cleaner(uploads, object_grace_seconds=3600)
    bring(conn, uploads, ["live"], ids)
    uploads.put("lost")
    turns(reconcile, patient, "condemned", 1)
    # The grace time, in which the row refuses its commit.
    assert collect(patient) == {"deleted": 0, "failed": 0}
    assert uploads.keys() == ["live", "lost"]
    with pytest.raises(CondemnedObjectError):
        commit(conn, "lost", ids)
    assert reconcile(patient)["condemned"] == 0
    collect_all(make_cleaner(uploads), 1)
    assert (uploads.keys(), known(conn)) == (["live"], ["live"])


def test_a_young_upload_is_left_alone(
    uploads: Uploads,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where this machine's clock is a year ahead: the store's own tells the age."""
    app = make_cleaner(uploads, object_ttl_seconds=60)
    bring(conn, uploads, ["live"], ids)
    uploads.put("young")
    walk = app.once(store_of).walk
    assert all(-1 <= u.age <= 30 for u in walk(""))
    now = time.time
    if isinstance(uploads, Files):
        # S3 would refuse what such a machine signs.
        monkeypatch.setattr(time, "time", lambda: now() + 365 * 86_400)
    found = reconcile(app)
    assert (found["condemned"], found["young"], found["complete"]) == (0, 1, True)
    assert known(conn) == ["live"]


def test_a_copy_with_an_old_time_is_young(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int]
) -> None:
    bring(conn, files, ["live"], ids)
    files.put("copied")
    os.utime(files.root / "copied", (0, 0))
    assert reconcile(make_cleaner(files, object_ttl_seconds=60))["young"] == 1


def test_a_missing_object_is_reported_loudly(
    uploads: Uploads,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    ids: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    commit(conn, "freed", ids)
    free(conn, ids)
    condemn(conn, ["condemned"])
    bring(conn, uploads, ["b-live"], ids)
    for key in ("a-lost", "c-lost", "d/../lost"):
        commit(conn, key, ids)
    app = make_cleaner(uploads)
    found = reconcile(app)
    assert (found["missing"], found["first"]) == (3, ["a-lost", "c-lost", "d/../lost"])
    said = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [vars(r)["key"] for r in said] == ["a-lost", "c-lost", "d/../lost"]
    assert {r.message for r in said} == {"a committed object is missing in the store"}
    # And in every round, until it is there again.
    uploads.put("a-lost")
    assert reconcile(app)["missing"] == 2


def test_of_very_many_that_are_missing_some_are_named(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(130):
        commit(conn, f"{n:03}", ids)
    found = reconcile(make_cleaner(files))
    assert (found["missing"], len(found["first"])) == (130, 3)
    assert sum(r.message == "a committed object is missing in the store" for r in caplog.records) == 100


def test_nothing_is_condemned_in_a_store_of_somebody_else(
    tmp_path: Path,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    ids: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A wrong address must not delete what lies there."""
    right, wrong = Files(tmp_path / "right"), Files(tmp_path / "wrong")
    bring(conn, right, ["b-live"], ids)
    right.put("a-unknown")
    wrong.put("precious")
    app, mistaken = make_cleaner(right), make_cleaner(wrong)
    wait_until(lambda: old(mistaken, "precious"))
    for _ in range(2):
        found = reconcile(mistaken)
        assert (found["condemned"], found["unconfirmed"], found["missing"]) == (0, 1, 1)
    assert "none of the committed objects was found in the store" in caplog.text
    reconcile(app)
    # Once more, now that the position names an object which was seen in the right one.
    assert reconcile(mistaken)["condemned"] == 0
    assert known(conn)[-1] == "b-live"
    turns(reconcile, app, "compared", 2)
    reconcile(app)
    assert known(conn) == ["a-unknown", "b-live"]


def test_a_turn_goes_on_where_the_last_one_stopped(
    uploads: Uploads,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cleanup, "_PAGE", 10)
    app = make_cleaner(uploads, maintenance_seconds=0.001)
    live = [f"{n:02}" for n in range(0, 34, 2)]
    bring(conn, uploads, live[:-1], ids)
    commit(conn, live[-1], ids)
    for n in range(1, 34, 2):
        uploads.put(f"{n:02}")
    wait_until(lambda: all(u.age > AT_ONCE for u in app.once(store_of).walk("")))
    found = [reconcile(app) for _ in range(4)]
    assert [f["compared"] for f in found] == [10, 10, 10, 3]
    assert [f["complete"] for f in found] == [False, False, False, True]
    assert sum(f["condemned"] for f in found) == 17
    assert [f["missing"] for f in found] == [0, 0, 0, 1]
    assert read_reconciliation(conn).key == ""
    assert rows(conn, "select count(*) from tidemark.reconciliations")[0] <= 10


def test_a_turn_keeps_what_it_did_before_the_store_failed(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleanup, "_PAGE", 2)
    bring(conn, files, ["a", "b", "c", "d"], ids)
    walk = Directory.walk

    def failing(self: Directory, after: str) -> Iterator[Upload]:
        for upload in walk(self, after):
            if upload.key == "d":
                raise StoreError("away")
            yield upload

    app = make_cleaner(files)
    with monkeypatch.context() as patch:
        patch.setattr(Directory, "walk", failing)
        with pytest.raises(StoreError, match="away"):
            reconcile(app)
    assert (read_reconciliation(conn).key, read_reconciliation(conn).found_key) == ("b", "b")
    assert reconcile(app)["compared"] == 2


def test_of_two_that_reconcile_at_once_one_position_counts(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int]
) -> None:
    bring(conn, files, ["live"], ids)
    for n in range(50):
        files.put(f"{n:02}")
    wait_until(lambda: all(u.age > 2 * AT_ONCE for u in Directory(str(files.root)).walk("")))
    reconcile(make_cleaner(files))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(reconcile, [make_cleaner(files) for _ in range(2)]))
    assert all(f["complete"] and f["missing"] == 0 for f in found)
    assert len(known(conn)) == 51


class Racing(Directory):
    """A store in which something happens when a page of it has been read, and before it is looked at for keys."""

    def __init__(self, root: Path, happens: Callable[[], None]) -> None:
        super().__init__(str(root))
        self._happens: Callable[[], None] | None = happens

    def walk(self, after: str) -> Iterator[Upload]:
        found = list(super().walk(after))
        if self._happens is not None:
            self._happens()
            self._happens = None
        yield from found


def test_what_is_committed_while_the_store_is_listed_is_not_missing(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int]
) -> None:
    bring(conn, files, ["b"], ids)
    app = make_cleaner(files)
    app._parts[store_of] = Racing(files.root, lambda: bring(conn, files, ["a", "c"], ids))
    found = reconcile(app)
    assert (found["missing"], found["condemned"], found["complete"]) == (0, 0, True)


def test_what_is_committed_after_it_was_listed_is_not_condemned(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older than the time to live, and committed at the last moment."""
    bring(conn, files, ["a"], ids)
    files.put("b")
    files.put("c")
    app = make_cleaner(files)
    wait_until(lambda: old(app, "c"))

    def last_moment(conn: Connection[Any], keys: Sequence[str]) -> list[str]:
        commit(conn, "b", ids)
        return condemn(conn, keys)

    monkeypatch.setattr(cleanup, "condemn", last_moment)
    assert reconcile(app)["condemned"] == 1
    assert rows(conn, "select key from tidemark.objects where content_hash = ''") == ["c"]


def test_what_is_collected_while_the_store_is_listed_is_not_missing(
    files: Files, make_cleaner: MakeCleaner, conn: Connection[Any], ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read as live, then freed, deleted and forgotten before it is looked for by its key."""
    bring(conn, files, ["a", "b"], ids)
    app, other = make_cleaner(files), make_cleaner(files)
    existing = Directory.existing

    def late(self: Directory, keys: Sequence[str]) -> set[str]:
        if "b" in keys:
            free(conn, ids)
            collect_all(other, 2)
        return existing(self, keys)

    files_without_b = Racing(files.root, lambda: None)
    monkeypatch.setattr(
        files_without_b, "walk", lambda after: (u for u in Directory.walk(files_without_b, after) if u.key != "b")
    )
    app._parts[store_of] = files_without_b
    monkeypatch.setattr(Directory, "existing", late)
    assert reconcile(app)["missing"] == 0
    assert known(conn) == []


def test_a_commit_under_way_holds_up_nobody_but_its_own_upload(
    files: Files, make_cleaner: MakeCleaner, connect: Connect, conn: Connection[Any], ids: list[int]
) -> None:
    bring(conn, files, ["a"], ids)
    for n in range(20):
        files.put(f"b{n:02}")
    app = make_cleaner(files, lock_timeout=0.05)
    wait_until(lambda: old(app, "b19"))
    broker = connect(autocommit=False)
    commit(broker, "b07", ids)
    found = reconcile(app)
    assert (found["condemned"], found["left"], found["complete"]) == (19, 1, True)
    broker.commit()
    assert reconcile(app)["condemned"] == 0
    assert rows(conn, "select count(*) from tidemark.objects where content_hash <> ''") == [2]


def test_what_no_commit_can_name_is_left_and_said(
    files: Files,
    make_cleaner: MakeCleaner,
    conn: Connection[Any],
    ids: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bring(conn, files, ["a", "z"], ids)
    (files.root / os.fsdecode(b"latin-\xe9")).write_bytes(b"x")
    deep = files.root.joinpath(*["d" * 200] * 6)
    deep.mkdir(parents=True)
    (deep / "file").write_bytes(b"x")
    app = make_cleaner(files)
    found = reconcile(app)
    assert (found["compared"], found["condemned"], found["missing"], found["complete"]) == (2, 0, 0, True)
    assert "what no commit can name" in caplog.text


# --- The order of keys


@pytest.mark.parametrize("names", [3, 100_000])
def test_files_come_in_the_order_of_their_keys_bytes(names: int, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """`a/b` and `a-b` differ in a byte on the other side of the slash; a large directory is read in parts."""
    monkeypatch.setattr(store, "_NAMES", names)
    chance = random.Random(8)
    keys = set[str]()
    letters = ["a", "b", "-", ".", "0", "é", "\U0001f980", "\uffff"]
    for number in numbers():
        depth = chance.randint(1, 4)
        parts = ["".join(chance.choices(letters, k=chance.randint(1, 3))) for _ in range(depth)]
        key = "/".join(parts)
        if {".", ".."} & set(parts) or any(k.startswith(f"{key}/") or key.startswith(f"{k}/") for k in keys):
            continue
        if key not in keys:
            files.put(key)
            keys.add(key)
        if len(keys) == 150 or number > 5_000:
            break
    ordered = sorted(keys, key=str.encode)
    listed = Directory(str(files.root))
    assert [u.key for u in listed.walk("")] == ordered
    for after in ["", "a", "a/", "a-", "zzz", "\U0001f980/", *ordered[::7], *(f"{key}/x" for key in ordered[::11])]:
        assert [u.key for u in listed.walk(after)] == [key for key in ordered if key.encode() > after.encode()], after


def test_links_are_left_alone(tmp_path: Path) -> None:
    """Behind one there may be anything, this directory itself included."""
    files = Files(tmp_path / "root")
    files.put("a/b")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_bytes(b"x")
    (files.root / "loop").symlink_to(files.root)
    (files.root / "out").symlink_to(tmp_path / "elsewhere")
    (files.root / "file").symlink_to(tmp_path / "elsewhere" / "precious")
    (files.root / "gone").symlink_to(tmp_path / "nowhere")
    listed = Directory(str(files.root))
    assert [u.key for u in listed.walk("")] == ["a/b"]
    assert listed.delete(["file", "gone", "loop"]) == {}
    assert (tmp_path / "elsewhere" / "precious").exists()
    assert (files.root / "file").is_symlink()


def test_a_bucket_in_another_order_is_refused(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As directory buckets of S3 list theirs: what is merged by order would be reported missing."""
    uploads = S3(s3_endpoint)
    for key in ("a", "b"):
        uploads.put(key)
    call = Bucket._call

    async def backwards(self: Bucket, method: str, **arguments: Any) -> Any:
        answer = await call(self, method, **arguments)
        return {**answer, "Contents": answer["Contents"][::-1]}

    monkeypatch.setattr(Bucket, "_call", backwards)
    with pytest.raises(StoreError, match="lists 'a' after 'b', which is not the order of their bytes"):
        list(open_store(Settings.model_validate(uploads.settings)).walk(""))


# --- Settings


def test_beat_schedules_both_where_a_store_is_set(files: Files) -> None:
    def schedule(**settings: Any) -> dict[str, Any]:
        return dict(celery_config(Settings.model_validate(settings), NOBODY, None)["beat_schedule"])

    with_store = schedule(**files.settings, collect_interval=7, reconcile_interval=8)
    assert with_store.keys() - schedule().keys() == {"collect", "reconcile"}
    assert (with_store["collect"]["task"], with_store["collect"]["schedule"]) == ("tasks.collect", 7)
    assert (with_store["reconcile"]["task"], with_store["reconcile"]["schedule"]) == ("tasks.reconcile", 8)
    assert {collect_job.name, reconcile_job.name} == {"tasks.collect", "tasks.reconcile"}


def test_no_option_that_is_secret_is_printed(make_app: MakeApp) -> None:
    options = {
        "key": "an-access-key",
        "client_kwargs": {"aws_session_token": "a-session-token"},
        "endpoint_url": "u://r",
    }
    app = make_app(broker_url=NOBODY, object_store_options=json.dumps(options))
    assert {"an-access-key", "a-session-token"} <= secrets_of(app)
    assert "u://r" not in secrets_of(app)
    assert "an-access-key" not in repr(app.settings)


@pytest.mark.parametrize("task", [collect, reconcile])
def test_nothing_is_done_without_a_store(task: Callable[[TidemarkApp], dict[str, Any]], make_app: MakeApp) -> None:
    with pytest.raises(SettingsError, match="TIDEMARK_OBJECT_STORE is not set here"):
        task(make_app(broker_url=NOBODY))


def test_options_that_s3fs_does_not_take(s3_endpoint: str) -> None:
    settings = S3(s3_endpoint).settings | {"object_store_options": '{"secrets": "a-secret-key"}'}
    with pytest.raises(SettingsError, match="TIDEMARK_OBJECT_STORE_OPTIONS") as caught:
        open_store(Settings.model_validate(settings))
    assert "a-secret-key" not in str(caught.value)


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(SettingsError, match=r"s3fs is not installed.*extra store"):
        open_store(Settings.model_validate({"object_store": "s3://bucket"}))
