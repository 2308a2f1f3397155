"""The everyday commands as a new user tries them: right, wrong, with long names, through the real program."""

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import Connection, sql

from config.queues import all_queues
from db.commit import Batch, commit_batches, commit_object
from db.materialize import materialize
from db.topics import create_topic, partition_ids
from tasks.commands.batches import commit, fetch
from tasks.commands.compare import compare
from tasks.commands.exporter import exporter
from tasks.commands.local import health
from tasks.commands.status import status, top
from tasks.commands.topics import topics
from tasks.commands.upkeep import audit, migrate, rebase
from tasks.commands.upkeep import materialize as materialize_command
from tasks.commands.workers import workers
from tests.integration.conftest import MakeApp, make_topic
from tests.servers import PostgresServer, RedisServer
from tests.support import frozen, wait_until
from tests.support_commands import COLUMNS, Cli, app_for

LONG = "n" * 249
PROGRAM = [str(Path(sys.executable).with_name("celery")), "-A", "tasks"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def unchanged(
    postgres_server: PostgresServer, redis_server: RedisServer, template_database: str
) -> Iterator[tuple[Cli, Connection[Any]]]:
    """One database for all that must not change it: topic `orders`, with two partitions."""
    name = f"test_{uuid4().hex[:12]}"
    url = postgres_server.url(name)
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(
            sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(template_database))
        )
    with psycopg.connect(url, autocommit=True) as conn, app_for(url, redis_server.url) as app:
        create_topic(conn, "orders", 2)
        yield Cli(app), conn
        assert conn.execute("select count(*) from tidemark.objects").fetchone() == (0,)
        assert conn.execute("select name, retention_ms from tidemark.topics").fetchall() == [("orders", None)]


def line(**changes: Any) -> str:
    batch = {
        "topic": "orders",
        "partition": 1,
        "n_records": 10,
        "byte_offset": 0,
        "byte_length": 1200,
        "max_timestamp": 1_700_000_000_000,
    }
    return json.dumps({**batch, **changes}) + "\n"


# --- topics


def test_create_list_and_show(cli: Cli, conn: Connection[Any]) -> None:
    out = cli(topics, "create", "orders", "-p", "3", "--retention-time", "7d").out
    assert out.strip() == "orders: created with 3 partitions"
    assert cli(topics, "create", LONG, "--json").json["partitions"] == 1
    ids = partition_ids(conn, "orders")
    commit_object(conn, "a", [ids[0]], [5], [0], [10], [0])
    materialize(conn, ids)
    commit_object(conn, "b", [ids[2]], [5], [0], [10], [0])
    listed = cli(topics, "list").out
    assert re.search(r"^orders +3 +5 +10 B +7 d *$", listed, re.MULTILINE)
    # A program may read this: a long name is neither folded nor cut.
    assert re.search(rf"^{LONG} +1 +0 +0 B +- *$", listed, re.MULTILINE)
    assert {topic["topic"] for topic in cli(topics, "list", "--json").json} == {"orders", LONG}
    shown = cli(topics, "show", "orders")
    assert "7 d (604,800,000 ms)" in shown.out
    assert re.search(rf"^ +2 +{ids[2]} +{ids[2] % 8} +0 +0 +0 B +1 +\d", shown.out, re.MULTILINE)
    partitions = cli(topics, "show", "orders", "--json").json["partitions"]
    assert [p["queue"] for p in partitions] == [f"materialize.{i % 8}" for i in ids]
    assert [(p["end_offset"], p["byte_size"], p["backlog"]) for p in partitions] == [(5, 10, 0), (0, 0, 0), (0, 0, 1)]
    assert [p["partition"] for p in cli(topics, "show", "orders", "--pending", "--json").json["partitions"]] == [2]
    cli(topics, "show", LONG)


def test_no_topics_says_what_to_do(cli: Cli) -> None:
    assert "celery -A tasks topics create NAME" in cli(topics, "list").out
    assert "celery -A tasks topics create NAME" in cli(status, "--interval", "0").out
    assert cli(topics, "list", "--json").json == []


def test_retention_changes_one_limit_and_keeps_the_other(cli: Cli) -> None:
    cli(topics, "create", "orders", "--retention-time", "1s", "--retention-size", "2kB")
    assert cli(topics, "set", "orders", "--retention-time", "none", "--json").json["retention_bytes"] == 2000
    assert cli(topics, "set", "orders", "--retention-size", "5").out.strip() == "orders: retention 5 B"
    assert cli(topics, "set", "orders", "--retention-size", "none").out.strip() == "orders: retention -"


def test_a_topic_is_created_with_its_retention_or_not_at_all(cli: Cli, conn: Connection[Any]) -> None:
    cli(topics, "create", "orders")
    error = cli(topics, "create", "orders", "-p", "2", code=1).err
    assert "exists already" in error
    cli(topics, "create", "a b", "--retention-time", "5ms", code=1)
    assert conn.execute("select count(*) from tidemark.topics").fetchone() == (1,)


# --- commit and fetch


def test_a_topic_is_created_by_the_defaults(make_app: MakeApp) -> None:
    app = make_app(default_partitions=3, default_retention_seconds=86_400, default_retention_bytes=5_000)
    cli = Cli(app)
    cli(topics, "create", "orders")
    cli(topics, "create", "payments", "-p", "1", "--retention-time", "none", "--retention-size", "0B")
    found = {t["topic"]: t for t in cli(topics, "list", "--json").json}
    limits = {name: (t["partition_count"], t["retention_ms"], t["retention_bytes"]) for name, t in found.items()}
    assert limits == {"orders": (3, 86_400_000, 5_000), "payments": (1, None, 0)}


def test_a_topic_grows_and_is_deleted(cli: Cli, conn: Connection[Any]) -> None:
    make_topic(conn, partitions=2)
    assert cli(topics, "grow", "orders", "5").out == "orders: has 5 partitions\n"
    assert "has 5 partitions, not fewer than 3" in cli(topics, "grow", "orders", "3", code=1).err
    asked = cli(topics, "delete", "orders", stdin="n\n", code=1)
    assert "Delete orders, 5 partitions with 0 records? [y/N]" in asked.err
    assert len(partition_ids(conn, "orders")) == 5
    topic_id = cli(topics, "delete", "orders", "--yes", "--json").json["id"]
    assert conn.execute("select distinct topic_id::text from tidemark.deleted_partitions").fetchone() == (topic_id,)
    assert json.loads(cli(topics, "delete", "orders", "--yes", "--json", code=1).err)["code"] == "TM004"


def test_records_are_deleted_and_offsets_found_by_time(cli: Cli, conn: Connection[Any]) -> None:
    ids = make_topic(conn, partitions=2)
    for n in range(3):
        commit_object(conn, f"o{n}", ids[:1], [10], [0], [1], [1_700_000_000_000 + n * 86_400_000])
    materialize(conn, ids)
    found = cli(topics, "offsets", "orders", "2023-11-15", "--json").json
    assert [(o["partition"], o["offset"], o["max_timestamp"]) for o in found] == [
        (0, 10, 1_700_086_400_000),
        (1, None, None),
    ]
    assert "2023-11-15 22:13:20.000" in cli(topics, "offsets", "orders", "2023-11-15T12:00").out
    assert cli(topics, "truncate", "orders", "0", "15").out == "orders/0: starts at offset 15\n"
    assert cli(topics, "truncate", "orders", "0", "latest", "--json").json["start_offset"] == 30
    assert "nothing lies before earliest" in cli(topics, "truncate", "orders", "0", "earliest", code=2).err


def test_the_producers_of_a_partition(cli: Cli, conn: Connection[Any]) -> None:
    (partition_id,) = make_topic(conn)
    assert cli(topics, "producers", "orders", "0").out == "no idempotent producer is known\n"
    sent = Batch(partition_id=partition_id, n_records=5, byte_offset=0, byte_length=1, max_timestamp=0)
    commit_batches(conn, "o", [replace(sent, producer_id=7, producer_epoch=2, base_sequence=0)])
    [told] = cli(topics, "producers", "orders", "0", "--json").json
    assert (told["producer_id"], told["producer_epoch"], told["last_sequence"], told["batches"]) == (7, 2, 4, 1)
    assert rows(cli(topics, "producers", "orders", "0", "--csv").out)[0]["last_sequence"] == "4"


def test_commit_then_fetch(cli: Cli, conn: Connection[Any]) -> None:
    cli(topics, "create", "orders", "-p", "2")
    batches = line(n_records=3) + "\n" + line(n_records=4, byte_offset=1200)
    first = cli(commit, "some/key", stdin=batches).out
    assert re.fullmatch(r"\d+\n", first)
    # Repeating is safe.
    again = cli(commit, "some/key", "--json", stdin=batches).json
    assert again == {"object_id": int(first), "key": "some/key", "batches": 2, "records": 7}
    materialize(conn, partition_ids(conn, "orders"))
    out = cli(fetch, "orders", "1").out
    assert re.search(r"^ +3 +4 +2023-11-14 22:13:20\.000 +1,200 +1,200 +some/key *$", out, re.MULTILINE)
    assert "2 batches, 7 records, 2.3 KiB; the log holds 0 to 7" in out
    assert [b["start_offset"] for b in cli(fetch, "orders", "1", "5", "--json").json["batches"]] == [3]
    assert cli(fetch, "orders", "1", "latest", "--json").json["batches"] == []
    assert len(cli(fetch, "orders", "1", "--max-batches", "1", "--json").json["batches"]) == 1
    assert len(cli(fetch, "orders", "1", "earliest", "--max-bytes", "1", "--json").json["batches"]) == 1


def test_follow_goes_on_until_ctrl_c(cli: Cli, conn: Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ids = make_topic(conn, partitions=1)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) > 2:
            raise KeyboardInterrupt
        commit_object(conn, f"k{len(pauses)}", ids, [2], [0], [1], [0])
        materialize(conn, ids)

    monkeypatch.setattr("tasks.commands.batches.time.sleep", pause)
    lines = cli(fetch, "orders", "0", "--follow", "--json").out.splitlines()
    assert [json.loads(batch)["start_offset"] for batch in lines] == [0, 2]
    assert cli(fetch, "orders", "0", "2", "-f").out.startswith("2 2 1970-01-01 00:00:00.000 0+1 k2")


def test_commit_reads_a_file(cli: Cli, tmp_path: Path) -> None:
    cli(topics, "create", "orders", "-p", "2")
    file = tmp_path / "batches.jsonl"
    file.write_text(line() * 5)
    assert cli(commit, "k", str(file), "--json").json["batches"] == 5


@pytest.mark.parametrize(
    ("stdin", "problems"),
    [
        ("", ["there is no batch in the input"]),
        ("\n \n", ["there is no batch in the input"]),
        (line() + "{", ["line 2: Invalid JSON"]),
        (line() + "[1]\n", ["line 2: "]),
        (line() + "null\n", ["line 2: "]),
        (line(n_records=0) + line(byte_length=-1), ["line 1: n_records: ", "line 2: byte_length: "]),
        (line(n_records="3"), ["line 1: n_records: "]),
        (line(n_records=True), ["line 1: n_records: "]),
        (line(n_records=1.5), ["line 1: n_records: "]),
        (line(n_records=2**31), ["line 1: n_records: "]),
        (line(byte_offset=2**63), ["line 1: byte_offset: "]),
        (line(max_timestamp=10**30), ["line 1: max_timestamp: "]),
        (line(max_timestamp=None), ["line 1: max_timestamp: "]),
        (line(records=3), ["line 1: records: "]),
        (line() + line(topic="nope"), ["line 2: topic 'nope' does not exist"]),
        (line() + line(topic="\x00"), ["line 2: topic: "]),
        (line() + line(topic="\ud800"), ["line 2: "]),
        ("\n" + line(partition=2), ["line 2: topic 'orders' has no partition 2, only 0 to 1"]),
        (b"\xff\xfe\n", ["line 1: "]),
        (line(topic="\x1b[2J"), ["line 1: topic: "]),
    ],
)
def test_commit_names_the_line_and_commits_nothing(
    stdin: str | bytes, problems: list[str], unchanged: tuple[Cli, Connection[Any]]
) -> None:
    cli, conn = unchanged
    error = cli(commit, "key", stdin=stdin, code=1).err
    assert error.startswith("Error: nothing was committed")
    assert [problem for problem in problems if problem not in error] == []
    assert "\x1b" not in error
    assert conn.execute("select count(*) from tidemark.objects").fetchone() == (0,)


def test_commit_lists_ten_errors_and_counts_the_rest(cli: Cli) -> None:
    cli(topics, "create", "orders", "-p", "2")
    error = cli(commit, "key", stdin=line(n_records=0) * 13, code=1).err
    assert "line 10: " in error
    assert "line 11: " not in error
    assert "… and 3 more" in error


def test_commit_with_other_content_is_a_conflict(cli: Cli) -> None:
    cli(topics, "create", "orders", "-p", "2")
    cli(commit, "key", stdin=line())
    assert "is committed already" in cli(commit, "key", stdin=line(n_records=2), code=1).err


def test_keys_and_names_cannot_move_the_cursor(cli: Cli, conn: Connection[Any]) -> None:
    ids = make_topic(conn, partitions=1)
    commit_object(conn, "a\x1b[2Jb\nc", ids, [1], [0], [1], [0])
    conn.execute("update tidemark.record_batch_events set max_timestamp = %s", (2**62,))
    materialize(conn, ids)
    out = cli(fetch, "orders", "0").out
    assert "a\\x1b[2Jb\\nc" in out
    # Beyond what dates reach.
    assert str(2**62) in out


@pytest.mark.parametrize(
    ("timestamp", "warning"),
    [
        (1_700_000_000, "is 1970-01-20 16:13:20.000 in milliseconds; was it meant in seconds?"),
        (1_700_000_000_000, None),
        (-1, None),
        (0, None),
    ],
)
def test_a_time_in_the_wrong_unit_is_noticed(
    timestamp: int, warning: str | None, cli: Cli, conn: Connection[Any]
) -> None:
    """It is committed all the same: only who commits knows."""
    create_topic(conn, "orders", 2)
    done = cli(commit, "key", stdin=line() + line(max_timestamp=timestamp) * 2)
    assert done.out == "1\n"
    if warning is None:
        assert done.err == ""
    else:
        assert done.err.startswith(f"warning: max_timestamp {timestamp} (line 2, and 1 more) ")
        assert done.err.endswith(f"{warning}\n")


def test_nothing_to_say_is_said(cli: Cli) -> None:
    """A program that asks gets an object with a reason, never null or an empty list."""
    assert cli(rebase, "--json").json == {"rebased": False, "message": cli(rebase).out.strip()}
    assert cli(compare, "--json").json == {"comparisons": [], "message": cli(compare).out.strip()}
    assert "nothing to audit" in cli(audit).out
    assert cli(audit, "--json").json["complete"] is False


def test_csv(cli: Cli, conn: Connection[Any]) -> None:
    """Lists have a header and a line for each row, with names as they are."""
    assert cli(topics, "list", "--csv").out.count("\n") == 1
    create_topic(conn, LONG, 2)
    ids = partition_ids(conn, LONG)
    commit_object(conn, 'a,"b"\n', ids, [5, 6], [0, 1], [10, 20], [0, 0])
    materialize(conn, ids)
    [topic] = rows(cli(topics, "list", "--csv").out)
    assert (topic["topic"], topic["partition_count"], topic["records"], topic["retention_ms"]) == (LONG, "2", "11", "")
    assert [p["end_offset"] for p in rows(cli(topics, "show", LONG, "--csv").out)] == ["5", "6"]
    [batch] = rows(cli(fetch, LONG, "1", "--csv").out)
    assert (batch["object_key"], batch["n_records"]) == ('a,"b"\n', "6")
    assert cli(workers, "--timeout", "0.2", "--csv", code=1).out.startswith("worker,pid,slots,shards,")


def rows(output: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(output)))


# --- wrong arguments


@pytest.mark.parametrize(
    ("command", "arguments", "code", "message"),
    [
        (topics, ["creat"], 2, "No such command 'creat'"),
        (topics, ["create"], 2, "Missing argument 'NAME'"),
        (topics, ["create", "a", "b"], 2, "unexpected extra argument"),
        (topics, ["create", "a", "-p", "0"], 2, "0 is not in the range"),
        (topics, ["create", "a", "-p", "many"], 2, "not a valid integer"),
        (topics, ["create", "a", "-p", "100001"], 2, "not in the range"),
        (topics, ["create", "a", "--retention-time", "0"], 2, "is not a time"),
        (topics, ["create", "a", "--retention-time", "-1s"], 2, "is not a time"),
        (topics, ["create", "a", "--retention-size", "9" * 5000], 2, "is not a size"),
        (topics, ["create", "a", "--retention-size", "²"], 2, "is not a size"),
        (topics, ["create", ""], 1, "is not legal"),
        (topics, ["create", "x" * 250], 1, "is not legal"),
        (topics, ["create", ".."], 1, "is not legal"),
        (topics, ["create", "ü"], 1, "is not legal"),
        (topics, ["create", "\udcff"], 2, "is no UTF-8"),
        (topics, ["show"], 2, "Missing argument"),
        (topics, ["show", "nope"], 1, "topic 'nope' does not exist"),
        (topics, ["show", "orders", "--wat"], 2, "No such option"),
        (topics, ["set", "orders"], 2, "nothing to set"),
        (topics, ["set", "nope", "--retention-time", "1s"], 1, "topic 'nope' does not exist"),
        (fetch, [], 2, "Missing argument 'TOPIC'"),
        (fetch, ["orders"], 2, "Missing argument 'PARTITION'"),
        (fetch, ["orders", "x"], 2, "not a valid integer"),
        (fetch, ["orders", "2"], 1, "has no partition 2; it has partitions 0 to 1"),
        (fetch, ["orders", "99999999999"], 2, "not in the range"),
        (fetch, ["nope", "0"], 1, "topic 'nope' does not exist"),
        (fetch, ["orders", "0", "1"], 1, "out of range"),
        (fetch, ["orders", "0", "newest"], 2, "neither earliest nor latest"),
        (fetch, ["orders", "0", "9" * 30], 2, "neither earliest nor latest"),
        (fetch, ["orders", "0", "--max-bytes", "0"], 2, "is not a size"),
        (fetch, ["orders", "0", "--max-batches", str(2**31)], 2, "not in the range"),
        (commit, [], 2, "Missing argument 'KEY'"),
        (commit, ["k", "/does/not/exist"], 2, "No such file"),
        (commit, ["k", "/"], 2, "Is a directory"),
        (commit, ["\udc80"], 2, "is no UTF-8"),
        (status, ["nope"], 1, "topic 'nope' does not exist"),
        (status, ["orders", "nope"], 1, "topic 'nope' does not exist"),
        (status, ["--interval", "-1"], 2, "not in the range"),
        (status, ["--interval", "x"], 2, "not a valid float"),
        (status, ["--interval", "nan"], 2, "nan is not a number of seconds"),
        (top, ["--count", "0"], 2, "not in the range"),
        (top, ["--count", "1", "nope"], 1, "topic 'nope' does not exist"),
        (audit, ["nope"], 1, "topic 'nope' does not exist"),
        (audit, ["a", "b"], 2, "unexpected extra argument"),
        (workers, ["--timeout", "0"], 2, "not in the range"),
        (workers, ["x"], 2, "unexpected extra argument"),
        (materialize_command, ["nope"], 1, "topic 'nope' does not exist"),
        (materialize_command, [], 2, "Missing argument 'TOPIC'"),
        (materialize_command, ["orders", "-p", "2"], 1, "has no partition 2; it has partitions 0 to 1"),
        (materialize_command, ["orders", "-p", "-1"], 2, "not in the range"),
        (materialize_command, ["orders", "--timeout", "nan"], 2, "nan is not a number of seconds"),
        (topics, ["create", "a", "--retention-time", "7"], 2, "'7' is not a time such as 7d, 12h or none"),
        (topics, ["create", "a", "--retention-time", "7 parsecs"], 2, "units: ms, s, min, h, d, w"),
        (topics, ["create", "a", "--retention-size", "1EB"], 2, "units: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"),
        (topics, ["create", "a", "--retention-size", "1e3B"], 2, "'1e3B' is not a size"),
        (topics, ["list", "--timeout", "0"], 2, "not in the range"),
        (fetch, ["orders", "0", "--max-bytes", "none"], 2, "'none' is not a size such as 1GB, 500MiB; units"),
        (fetch, ["orders", "-1"], 2, "No such option"),
        (health, [], 2, "Missing argument"),
        (health, ["flower"], 2, "'flower' is not one of"),
        (exporter, ["--port", "65536"], 2, "not in the range"),
        (exporter, ["--port", "many"], 2, "not a valid integer"),
        (compare, ["--confidence", "1"], 2, "not in the range"),
        (compare, ["orders"], 2, "unexpected extra argument"),
        (migrate, ["0002"], 2, "unexpected extra argument"),
        (rebase, ["--force"], 2, "No such option"),
    ],
)
def test_wrong_arguments(
    command: Any, arguments: list[str], code: int, message: str, unchanged: tuple[Cli, Any]
) -> None:
    """A wrong command line is answered with what was wrong, in few words and on standard error alone."""
    cli, _ = unchanged
    done = cli(command, *arguments, code=code)
    assert message in " ".join(done.err.split())
    assert done.out == ""
    # Usage, where to get help, and the error: one line, or one more for each value that there is to choose from.
    assert len(done.err.splitlines()) <= 7
    assert max(map(len, done.err.splitlines())) <= 400
    # For programs the same words, and a code.
    if "--json" in {option for param in command.params for option in param.opts} or command is topics:
        error = json.loads(cli(command, *arguments, "--json", code=code).err)
        assert message in error["error"]
        assert re.fullmatch(r"TM\d{3}|[A-Z][A-Za-z]+", error["code"])


@pytest.mark.parametrize("command", [topics, fetch, commit, status, top, audit, workers])
def test_help_fits(command: Any, unchanged: tuple[Cli, Any]) -> None:
    assert "Usage:" in unchanged[0](command, "--help").out


def test_a_key_that_is_too_long(cli: Cli) -> None:
    cli(topics, "create", "orders", "-p", "2")
    assert "has 1025 bytes" in cli(commit, "k" * 1025, stdin=line(), code=1).err


# --- servers that are away

ON_POSTGRES: list[tuple[Any, list[str]]] = [
    (topics, ["list"]),
    (topics, ["show", "orders"]),
    (topics, ["set", "orders", "--retention-time", "1d"]),
    (topics, ["create", "new"]),
    (fetch, ["orders", "0"]),
    (commit, ["k"]),
    (audit, []),
    (rebase, []),
    (migrate, []),
    (materialize_command, ["orders"]),
]
ON_REDIS: list[tuple[Any, list[str]]] = [
    (workers, []),
    (compare, []),
    (materialize_command, ["orders"]),
    (materialize_command, ["orders", "--wait"]),
]


def assert_names(error: str, variable: str) -> None:
    """One line that says which server and which setting, and no password."""
    assert variable in error
    assert "secret" not in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("command", "arguments"), [*ON_POSTGRES, (status, []), (top, ["--count", "1"])])
def test_postgres_is_away(command: Any, arguments: list[str], redis_url: str) -> None:
    with app_for("postgresql://u:secret@127.0.0.1:1/d", redis_url) as app:
        error = Cli(app)(command, *arguments, stdin=line(), code=1).err
    assert "Connection refused" in error
    assert_names(error, "TIDEMARK_DATABASE_URL")


@pytest.mark.parametrize(("command", "arguments"), ON_REDIS)
def test_redis_is_away(command: Any, arguments: list[str], unchanged: tuple[Cli, Any]) -> None:
    with app_for(unchanged[0].app.database_url, "redis://:secret@127.0.0.1:1/0") as app:
        error = Cli(app)(command, *arguments, code=1).err
    assert "Connection refused" in error
    assert_names(error, "TIDEMARK_BROKER_URL")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that have a --timeout of another meaning wait as short for a server."""
    monkeypatch.setattr("tasks.commands.base.ANSWER_SECONDS", 0.3)


@pytest.mark.parametrize(("command", "arguments"), ON_POSTGRES)
def test_postgres_is_frozen(
    command: Any, arguments: list[str], unchanged: tuple[Cli, Any], postgres_server: PostgresServer, impatient: None
) -> None:
    """A server that accepts connections and never answers is named within the time-out."""
    timeout = [] if command is materialize_command else ["--timeout", "0.3"]
    with frozen(postgres_server.pid):
        error = unchanged[0](command, *arguments, *timeout, stdin=line(), code=1).err
    assert_names(error, "TIDEMARK_DATABASE_URL) does not answer within 0.3 s")


@pytest.mark.parametrize(("command", "arguments"), ON_REDIS)
def test_redis_is_frozen(
    command: Any, arguments: list[str], unchanged: tuple[Cli, Any], redis_server: RedisServer, impatient: None
) -> None:
    with frozen(redis_server.pid):
        error = unchanged[0](command, *arguments, code=1).err
    assert_names(error, "TIDEMARK_BROKER_URL) does not answer within 0.3 s" if command is not compare else "BROKER_URL")


def test_a_frozen_server_costs_five_seconds_at_most(redis_server: RedisServer, database_url: str) -> None:
    """So does the whole program, as it is started by hand."""
    began = time.monotonic()
    with frozen(redis_server.pid):
        done = run("workers", "--json", database_url=database_url, redis_url=redis_server.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert json.loads(done.stderr)["code"] == "UnreachableError"
    # Importing takes longer where other tests run beside this one.
    assert time.monotonic() - began < 3.0 + 7.0


def test_database_was_never_migrated(postgres_server: Any, redis_url: str) -> None:
    with app_for(postgres_server.url(), redis_url) as app:
        for command, arguments in ((topics, ["list"]), (status, []), (audit, []), (fetch, ["a", "0"])):
            assert "celery -A tasks migrate" in Cli(app)(command, *arguments, code=1).err


# --- audit


def test_audit(cli: Cli, conn: Connection[Any]) -> None:
    ids = make_topic(conn, LONG, partitions=2)
    for key in range(3):
        commit_object(conn, f"k{key}", ids, [2, 3], [0, 1], [1, 1], [0, 0])
        materialize(conn, ids)
    assert "2 partitions, 6 new batches read: all invariants hold" in cli(audit).out
    assert "2 partitions, 0 new batches read" in cli(audit, LONG).out
    assert cli(audit, "--from-scratch", "--json").json["batches"] == 6
    conn.execute("delete from tidemark.runs where partition_id = %s and start_offset = 3", (ids[1],))
    found = cli(audit, "--from-scratch", "--json", code=1).json["violations"]
    assert (LONG, 1) in {(violation["topic"], violation["partition"]) for violation in found}
    assert "gap" in {violation["invariant"] for violation in found}
    assert "gap: " in cli(audit, code=1).out


# --- workers


def test_no_worker(cli: Cli) -> None:
    assert "no worker answered within 0.2 s" in cli(workers, "--timeout", "0.2", code=1).out
    found = cli(workers, "--timeout", "0.2", "--json", code=1).json
    assert found == {"workers": [], "unserved_queues": all_queues(8)}


def environment(database_url: str, redis_url: str) -> dict[str, str]:
    return {**os.environ, "TIDEMARK_DATABASE_URL": database_url, "TIDEMARK_BROKER_URL": redis_url, "COLUMNS": "80"}


def test_a_worker(cli: Cli, database_url: str, redis_url: str) -> None:
    queues = ",".join(queue for queue in all_queues(8) if queue != "materialize.3")
    with subprocess.Popen(
        [*PROGRAM, "worker", "-P", "solo", "-n", "one@here", "-Q", queues, "--without-gossip"],
        cwd=ROOT,
        env=environment(database_url, redis_url),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    ) as worker:
        try:

            def answers() -> bool:
                return bool(cli(workers, "--json", "--timeout", "0.5", code=1).json["workers"])

            wait_until(answers, timeout=60)
            found = cli(workers, "--json", code=1).json
            [one] = found["workers"]
            assert (one["name"], one["pid"], one["shards"]) == ("one@here", worker.pid, [0, 1, 2, 4, 5, 6, 7])
            assert found["unserved_queues"] == ["materialize.3"]
            out = cli(workers, code=1).words
            assert "0-2,4-7" in out
            assert "without a worker: shards 3" in out
        finally:
            worker.terminate()


# --- the real program


def run(*arguments: str | bytes, database_url: str, redis_url: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PROGRAM, *arguments],
        cwd=ROOT,
        env=environment(database_url, redis_url),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_the_program_finds_them(database_url: str, redis_url: str) -> None:
    urls = {"database_url": database_url, "redis_url": redis_url}
    assert run("topics", "create", "orders", "-p", "2", **urls).stdout.strip() == "orders: created with 2 partitions"
    assert run("commit", "k", **urls, input=line()).stdout == "1\n"
    # Ours, not Celery's of the same name.
    done = run("status", "--interval", "0", **urls)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^orders +2 +0 +1 ", done.stdout, re.MULTILINE)
    done = run("topics", "show", b"\xff\xfe", **urls)
    assert (done.returncode, done.stdout) == (2, "")
    assert "is no UTF-8" in done.stderr


def test_on_a_terminal_there_is_colour_and_q_ends_top(database_url: str, redis_url: str, conn: Connection[Any]) -> None:
    create_topic(conn, LONG, 1)
    commit_object(conn, "k", partition_ids(conn, LONG), [1], [0], [1], [0])
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    env = {**environment(database_url, redis_url), "TERM": "xterm-256color"}
    env.pop("COLUMNS")
    env.pop("NO_COLOR", None)
    with subprocess.Popen(
        [*PROGRAM, "top", "--interval", "0.2", "--after", "0"], cwd=ROOT, env=env, stdin=child, stdout=child
    ) as program:
        os.close(child)
        shown = b""
        while b"nnn" not in shown:
            shown += os.read(parent, 65536)
        os.write(parent, b"q")
        while True:
            try:
                rest = os.read(parent, 65536)
            except OSError:
                break
            if not rest:
                break
            shown += rest
        assert program.wait(30) == 0
    os.close(parent)
    assert b"\x1b[1m" in shown
    # The alternate screen is left again.
    assert b"\x1b[?1049l" in shown
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "…" in plain
    assert [text for text in re.split(r"[\r\n]+", plain) if len(text) > COLUMNS] == []


def test_names_end_in_an_ellipsis_on_a_terminal(database_url: str, redis_url: str, conn: Connection[Any]) -> None:
    """A row stays one line of 80 columns, and its figures keep their room."""
    create_topic(conn, LONG, 1)
    ids = partition_ids(conn, LONG)
    commit_object(conn, "k" * 1000, ids, [1_234_567], [0], [2**30], [0])
    materialize(conn, ids)
    for arguments, row in (
        (("topics", "list"), r"^n+… +1 +1,234,567 +1\.0 GiB +- *$"),
        (("fetch", LONG, "0"), r"^ +0 +1,234,567 +1970-01-01 00:00:00\.000 +0 +1,073,741,824 +k+… *$"),
    ):
        parent, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
        env = {**environment(database_url, redis_url), "TERM": "xterm-256color", "NO_COLOR": "1"}
        env.pop("COLUMNS")
        with subprocess.Popen([*PROGRAM, *arguments], cwd=ROOT, env=env, stdin=child, stdout=child) as program:
            os.close(child)
            shown = read_all(parent)
        assert program.returncode == 0
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).replace("\r\n", "\n")
        assert re.search(row, plain, re.MULTILINE)
        assert max(map(len, plain.splitlines())) <= COLUMNS


def read_all(terminal: int) -> str:
    shown = b""
    # It ends with an error when nobody has the other end open any longer.
    with os.fdopen(terminal, "rb", buffering=0) as stream, suppress(OSError):
        while more := stream.read(65536):
            shown += more
    return shown.decode()


def test_a_closed_pipe_is_no_error(database_url: str, redis_url: str, conn: Connection[Any]) -> None:
    create_topic(conn, "orders", 1)
    with subprocess.Popen(
        [*PROGRAM, "top", "--interval", "0.1"],
        cwd=ROOT,
        env=environment(database_url, redis_url),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:
        assert program.stdout
        assert program.stderr
        program.stdout.readline()
        program.stdout.close()
        program.wait(30)
        assert b"Traceback" not in program.stderr.read()
