"""Odd values for whatever takes some: tasks and their messages, commands, settings. Each works, or fails by name.

What is fuzzed is read from the tasks, the commands and the settings themselves: a new one needs nothing here.
`make test-model` looks for longer, and elsewhere each time.
"""

import inspect
import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any
from uuid import uuid4

import click
import psycopg
import pytest
from celery.exceptions import InvalidTaskError, NotRegistered
from celery.worker.request import Request
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import KombuError
from kombu.message import Message
from psycopg import Connection, sql

from config.errors import SettingsError, TidemarkError
from config.settings import Settings, load_settings
from db.audit import audit
from db.topics import create_topic, list_topics, partition_ids
from tasks import jobs
from tasks.app import TidemarkApp
from tasks.app import app as our_app
from tasks.commands.entry import SUMMARIES, load
from tasks.commands.parameters import NAME, OFFSET, PARTITION, Seconds
from tasks.messages import reason_of, vet
from tests.integration.conftest import commit, examples
from tests.servers import PostgresServer, RedisServer
from tests.support_commands import Cli, app_for, drain


@pytest.fixture(scope="module")
def fuzzed_app(
    postgres_server: PostgresServer, redis_server: RedisServer, template_database: str
) -> Iterator[TidemarkApp]:
    """An app on a database of its own, which all examples share: topic `orders`, with two partitions."""
    name = sql.Identifier(f"test_{uuid4().hex[:12]}")
    url = postgres_server.url(name.as_string().strip('"'))
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {} template {}").format(name, sql.Identifier(template_database)))
        with psycopg.connect(url, autocommit=True) as conn:
            create_topic(conn, "orders", 2)
        with app_for(url, redis_server.url, task_seconds=0.2, maintenance_seconds=0.2, retries=1) as app:
            yield app
        admin.execute(sql.SQL("drop database {} with (force)").format(name))


@pytest.fixture
def conn(fuzzed_app: TidemarkApp) -> Iterator[Connection[Any]]:
    with psycopg.connect(fuzzed_app.database_url, autocommit=True) as conn:
        yield conn


# --- Tasks and their messages

TASKS = {name: task for name, task in our_app.tasks.items() if name.startswith("tasks.")}
# Lone surrogates come in JSON's escapes, NULs as well.
texts = st.one_of(st.sampled_from(["orders", "", "\0", "\ud800", "o" * 300]), st.text(st.characters(), max_size=6))
numbers = st.one_of(st.sampled_from([0, 1, 2, -1, 2**31, 2**63, 10**40]), st.integers())
plain = st.one_of(st.none(), st.booleans(), numbers, st.floats(), texts)
values = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=6)


@st.composite
def calls(draw: st.DrawFn) -> tuple[str, list[Any], dict[str, Any]]:
    """A task, and arguments that are about as many as it takes, now and then of their kinds."""
    name = draw(st.sampled_from(sorted(TASKS)))
    declared = inspect.signature(TASKS[name].run).parameters.values()
    kinds: dict[Any, Any] = {int: numbers, str: texts, list[int]: st.lists(numbers, max_size=3)}
    args = [draw(st.one_of(kinds[p.annotation], values)) for p in declared]
    if draw(st.integers(0, 3)) == 0:
        args += draw(st.lists(values, max_size=2))
    return name, args, draw(st.one_of(st.just({}), st.dictionaries(texts, values, max_size=2)))


def message_of(name: str, body: Any, headers: dict[str, Any]) -> Message:
    return Message(
        body=json.dumps(body).encode(),
        headers={"id": "1", "task": name, **headers},
        content_type="application/json",
        content_encoding="utf-8",
        accept={"application/json"},
    )


HEADERS = [
    "id",
    "task",
    "eta",
    "expires",
    "retries",
    "timelimit",
    "group",
    "group_index",
    "root_id",
    "parent_id",
    "shadow",
    "argsrepr",
    "kwargsrepr",
    "origin",
    "ignore_result",
    "stamps",
    "stamped_headers",
    "replaced_task_nesting",
    "lang",
    "compression",
    "priority",
    "x-death",
]


REASONS = {"arguments", "body", "content", "headers", "size", "task", "workflow"}


@given(call=calls(), headers=st.dictionaries(st.sampled_from(HEADERS), values, max_size=3), follows=values)
@examples(60)
def test_messages(fuzzed_app: TidemarkApp, call: Any, headers: dict[str, Any], follows: Any) -> None:
    """What is not refused, for a reason that is counted, is a task of ours that Celery can begin."""
    name, args, kwargs = call
    message = message_of(name, [args, kwargs, follows] if isinstance(follows, dict) else follows, headers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(our_app, "settings", fuzzed_app.settings, raising=False)
        try:
            vet(our_app, message)
        except (TidemarkError, KombuError, NotRegistered) as error:
            refused = reason_of(error)
            assert refused in REASONS
            return
    task = TASKS[message.headers["task"]]
    with suppress(InvalidTaskError):
        request = Request(message, app=fuzzed_app, task=task, hostname="here", headers=message.headers)
        assert request.time_limits == (None, None)


@given(call=calls())
@examples(40)
def test_tasks(fuzzed_app: TidemarkApp, conn: Connection[Any], call: Any) -> None:
    """A task that is called by hand, in another program, returns what JSON can say, or raises an error with a name."""
    name, args, kwargs = call
    # Python's own, for arguments that are too few, too many or of unknown names.
    wrong_call = pytest.raises(TypeError, match=r"argument|keywords must be strings")
    try:
        inspect.signature(TASKS[name].run).bind(*args, **kwargs)
        expected: AbstractContextManager[Any] = suppress(TidemarkError)
    except TypeError:
        expected = wrong_call
    with pytest.MonkeyPatch.context() as patch, expected:
        patch.setattr(jobs, "app", fuzzed_app)
        json.dumps(TASKS[name].run(*args, **kwargs))
    assert [t.name for t in list_topics(conn)] == ["orders"]


def test_the_app_still_works(fuzzed_app: TidemarkApp, conn: Connection[Any]) -> None:
    ids = partition_ids(conn, "orders")
    commit(conn, "bucket/after", ids)
    assert drain(fuzzed_app, ids).events_processed == 2
    assert audit(conn, from_scratch=True).violations == ()


# --- Commands

# These run until they are told to end: their arguments are only read.
ENDLESS = {"exporter", "top"}
# The same, and they are options.
NEVER = {"--follow", "--wait"}


def commands() -> Iterator[tuple[str, click.Command]]:
    for name in SUMMARIES:
        command = load(name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", command.commands[sub]) for sub in command.commands)
        else:
            yield name, command


COMMANDS = dict(commands())
# What a shell can pass: no NUL; and bytes that are no UTF-8, which come as surrogates.
words = st.one_of(
    st.sampled_from(["orders", "", " ", "-", "--", "-x", "\n", "é", "\udcff", "'", "x" * 300, "1e999", "٣", "none"]),
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5),
)


def values_of(kind: click.ParamType[Any]) -> st.SearchStrategy[str]:
    """Right ones, those beyond the limits, and words. The right ones are small: they should not take long."""
    right: list[Any] = []
    if isinstance(kind, click.IntRange | click.FloatRange):
        low = kind.min or 0
        right = [low, low - 1, *([] if kind.max is None else [kind.max + 1]), "nan", "-inf", 10**30]
        right += [] if isinstance(kind, Seconds) else [low + 1]
    elif isinstance(kind, click.Choice):
        right = list(kind.choices)
    elif isinstance(kind, click.DateTime):
        right = ["2026-01-01T00:00:00", "0001-01-01", "9999-12-31"]
    elif kind is NAME:
        right = ["orders", "new"]
    elif kind is OFFSET:
        right = ["earliest", "latest", 0, 2**63 - 1, 2**63]
    elif kind is PARTITION:
        right = [0, 1, 2]
    elif isinstance(kind, click.File):
        right = ["-", "/nowhere", "/"]
    else:
        right = ["7d", "1GB", "none", "0", "1.5h", "9" * 400 + "s"]
    return st.one_of(st.sampled_from([str(value) for value in right]), words)


@st.composite
def lines(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A command and its arguments."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    arguments: list[str] = []
    for param in COMMANDS[name].params:
        option = max(param.opts, key=len)
        if isinstance(param, click.Argument):
            wanted = draw(st.integers(0, 2)) if param.nargs == -1 else int(draw(st.integers(0, 9)) > 0)
            arguments += [draw(values_of(param.type)) for _ in range(wanted)]
        elif param.is_flag:  # type: ignore[attr-defined]  # an option's
            arguments += [option] * (option not in NEVER and draw(st.booleans()))
        elif option == "--interval":
            # Its default would wait for a second.
            arguments += [option, draw(st.sampled_from(["0", "0", "nan", "-1", "x"]))]
        elif draw(st.integers(0, 2)) == 0:
            arguments += [option, draw(values_of(param.type))]
    return name, draw(st.permutations(arguments)) if draw(st.integers(0, 4)) == 0 else arguments


@given(line=lines(), stdin=st.one_of(words, values.map(json.dumps)))
@examples(40)
def test_commands(fuzzed_app: TidemarkApp, line: tuple[str, list[str]], stdin: str) -> None:
    """Exit code 0, 1 or 2; an error is one line, with --json one document; never a traceback."""
    name, arguments = line
    if name in ENDLESS:
        with suppress(click.ClickException, click.exceptions.Exit):
            COMMANDS[name].make_context(name, list(arguments))
        return
    outcome = Cli(fuzzed_app).run(COMMANDS[name], arguments, stdin.encode(errors="surrogateescape"))
    assert outcome.code in {0, 1, 2}, outcome
    if "--json" in arguments and "--csv" not in arguments and outcome.code:
        json.loads(outcome.err or outcome.out)
    elif outcome.code:
        # With --csv as well it depends on where the error is which of them is known by then.
        error = ("Error: ", *['{"error": '] * ("--json" in arguments))
        if outcome.code == 2:
            assert any(said.startswith(error) for said in outcome.err.splitlines()), outcome
        elif not outcome.out:
            # Above it may stand what was asked, such as whether to delete a topic.
            known = (*error, "Aborted!", *(f"{program}: " for program in ("worker", "beat", "exporter")))
            assert outcome.err.splitlines()[-1].startswith(known), outcome
        assert "Traceback" not in outcome.err


# --- Settings

SECRET = "op3n-sesame-x"
ODD = [
    "", " ", "nan", "inf", "-inf", "-1", "0", "1e400", "-0.0", "٣", "1_000", "0x10", "1\n2", "\t5", "true", "null",
    "[]", "{}", '{"key": {"a": [1]}}', "None", "é" * 50, "9" * 5_000, "a:b", "user:12345678", "file:///x", "s3://b/k",
    "postgresql://", "postgresql:///", "redis://", "amqp://", "sentinel://h", "window", "json", "\udcff", "/", "..",
    *(
        f"{scheme}://{login}@{place}"
        for scheme in ("postgresql", "redis", "rediss", "amqp", "sentinel", "redis+socket", "POSTGRESQL", "")
        for login, place in (
            (f"u:{SECRET}", "h:1/0"),
            (f":{SECRET}", "h:99999/0"),
            (f"u:{SECRET}/#?", "h"),
            (f"u:{SECRET}@@[", "h:x"),
            (f"u%zz:{SECRET}%00", "[::1"),
            (f"u:{SECRET}", "h/0?master_name=m&sslmode=x\n"),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("value", ODD, ids=range(len(ODD)))
def test_settings(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variable has it: it is refused in a line that names the variable and tells no secret, or it is good."""
    names = {field: f"TIDEMARK_{field.upper()}" for field in Settings.model_fields}
    for name in names.values():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    said = str(caught.value)
    assert SECRET not in said
    assert "\n" not in said
    assert len(said) < 250 * len(names)
    # Those that are not named take it.
    good = [field for field, name in names.items() if not re.search(rf"{name}:", said)]
    for field in set(names) - set(good):
        monkeypatch.delenv(names[field])
    # One by one, for what is wrong between two of them has other words.
    for field in good:
        for other in good:
            monkeypatch.delenv(names[other], raising=False)
        monkeypatch.setenv(names[field], value)
        try:
            loaded = repr(load_settings())
            # A path is a path, whatever it looks like.
            assert SECRET not in loaded or field in {"data_dir", "heartbeat_file"}
        except SettingsError as error:
            said = str(error)
            assert said.startswith("settings: TIDEMARK_"), (field, said)
            assert SECRET not in said
