"""The celery program with Tidemark installed: what it loads, what other apps see of us, and errors in one line."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import click
import pytest

from tasks.commands.entry import SUMMARIES, LazyCommand, load
from tests.integration.conftest import CELERY, ENTRY_POINTS
from tests.support import wait_until

SECRET = "s3cr3t-pa55"

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(installed: str, tmp_path: Path) -> Run:
    def run(*arguments: str, app: str = "tasks", **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [CELERY, *(["-A", app] if app else []), *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": installed, "TIDEMARK_DATA_DIR": str(tmp_path), **variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


# --- What is loaded

WATCH = """
import sys
sys.argv[0] = "celery"
try:
    from celery.bin.celery import main
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


def loaded(installed: str, *arguments: str, **variables: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *arguments],
        env={**os.environ, "PYTHONPATH": installed, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return set(done.stderr.splitlines()[-1].split())


HEAVY = {"alembic", "sqlalchemy", "structlog", "tenacity"}


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        (["--help"], {}),
        (["-A", "tasks", "--help"], {}),
        ([], {"_CELERY_COMPLETE": "bash_complete", "COMP_WORDS": "celery -A tasks ", "COMP_CWORD": "3"}),
    ],
    ids=["help", "our help", "completion"],
)
def test_the_program_starts_without_what_commands_need(
    arguments: list[str], variables: dict[str, str], installed: str
) -> None:
    """Help and completion load none of our commands, no driver and no table printer."""
    modules = loaded(installed, *arguments, **variables)
    assert {m for m in modules if m.startswith("tasks.commands.")} == {"tasks.commands.entry"}
    roots = {m.partition(".")[0] for m in modules}
    assert roots & (HEAVY | {"db", "psycopg", "pydantic", "rich"}) == set()


def test_a_command_loads_what_it_needs(installed: str, database_url: str, redis_url: str) -> None:
    """A command that reads the database loads no migrations, no SQLAlchemy and no progress bars."""
    urls = {"TIDEMARK_DATABASE_URL": database_url, "TIDEMARK_BROKER_URL": redis_url}
    modules = loaded(installed, "-A", "tasks", "topics", "list", **urls)
    assert "tasks.commands.topics" in modules
    assert {m.partition(".")[0] for m in modules} & HEAVY == set()
    assert modules & {"rich.progress", "tasks.commands.upkeep"} == set()


def test_completion(installed: str) -> None:
    """The shell completes our commands, their subcommands and options."""
    for words, expected in (
        ("celery -A tasks mater", "materialize"),
        ("celery -A tasks topics s", "show"),
        ("celery -A tasks fetch --max-b", "--max-bytes"),
    ):
        done = subprocess.run(
            [CELERY],
            env={
                **os.environ,
                "PYTHONPATH": installed,
                "_CELERY_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(words.count(" ")),
            },
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        assert f"plain,{expected}" in done.stdout.splitlines()


def test_entry_points() -> None:
    """Every command has an entry point, but for those that Celery has a command of the same name for."""
    assert {*ENTRY_POINTS, "migrate", "status"} == set(SUMMARIES)
    for name, target in ENTRY_POINTS.items():
        command = EntryPoint(name, target, "celery.commands").load()
        assert (type(command), command.name) == (LazyCommand, name)
    for name in SUMMARIES:
        assert load(name).name == name


@pytest.mark.parametrize("name", sorted(SUMMARIES))
def test_help(name: str) -> None:
    """Usage says how to start it, 80 columns suffice, and no mark of Click's is left in the text."""
    root = click.Context(click.Group("celery"), info_name="celery")
    command = load(name)
    contexts = [command.make_context(f"-A tasks {name}", [], parent=root, resilient_parsing=True)]
    for sub in getattr(command, "commands", {}).values():
        contexts.append(sub.make_context(sub.name, [], parent=contexts[0], resilient_parsing=True))
    for ctx in contexts:
        text = ctx.get_help()
        assert text.startswith(f"Usage: celery -A tasks {name} ")
        assert "\\b" not in text
        assert max(map(len, text.splitlines())) <= 80


# --- Other apps


@pytest.fixture
def other(tmp_path: Path) -> str:
    (tmp_path / "other_app.py").write_text("from celery import Celery\napp = Celery('other', broker='memory://')\n")
    return "other_app"


def test_another_app_keeps_its_own_commands(run: Run, other: str) -> None:
    """In an environment with Tidemark, another project's status, migrate and Flower are Celery's and Flower's own."""
    assert "No nodes replied" in run("status", app=other).stderr
    assert "SOURCE DESTINATION" in run("migrate", "--help", app=other).stdout


def test_our_app_has_ours(run: Run) -> None:
    assert run("status", "--help").stdout.startswith("Usage: celery -A tasks status [OPTIONS] [TOPIC]...")
    assert run("migrate", "--help").stdout.startswith("Usage: celery -A tasks migrate [OPTIONS]\n")


def test_our_commands_with_another_app(run: Run, other: str) -> None:
    """They say how to start them, whatever their arguments are, and tell in the list of commands whose they are."""
    for arguments in (["topics"], ["fetch", "--nope"]):
        done = run(*arguments, app=other)
        expected = (1, "", f"Error: start it as: celery -A tasks {arguments[0]}\n")
        assert (done.returncode, done.stdout, done.stderr) == expected
    listed = run("--help", app=other).stdout
    for name in ENTRY_POINTS:
        assert f"  {name:<12} Tidemark: {SUMMARIES[name]}\n" in listed
    assert max(map(len, listed.splitlines())) <= 80


def test_flower_of_another_app(installed: str, other: str, tmp_path: Path) -> None:
    """It gets none of our defaults: no password of ours is made, and none is asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = tmp_path / "data"
    with subprocess.Popen(
        [CELERY, "-A", other, "flower", f"--port={port}", "--address=127.0.0.1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": installed, "TIDEMARK_DATA_DIR": str(data)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as flower:
        try:
            wait_until(lambda: _healthy(port), timeout=60)
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.sendall(b"GET /workers HTTP/1.0\r\n\r\n")
                assert client.recv(64).startswith(b"HTTP/1.1 200")
            assert not data.exists()
        finally:
            flower.kill()


def _healthy(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


# --- Wrong input to programs of Celery's and Flower's


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


UNREACHABLE = {
    "TIDEMARK_DATABASE_URL": f"postgresql://me:{SECRET}@127.0.0.1:1/log",
    "TIDEMARK_BROKER_URL": f"redis://:{SECRET}@127.0.0.1:1/0",
}


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["worker", "-P", "solo", "-Q", "nope"], {}, "queue 'nope' isn't defined"),
        (["worker"], {"TIDEMARK_SHARDS": "x"}, "TIDEMARK_SHARDS: "),
        (["beat", "-S", "nope"], {}, "No module named 'nope'"),
        (["flower", "--port={taken}"], {}, "127.0.0.1:{taken}: [Errno 98] Address already in use"),
        (["flower", "--port=many"], {}, "'many'"),
        (["flower", "--port=99999"], {}, "not 99999"),
        (["flower"], {"FLOWER_PORT": "many"}, "'many'"),
        (["exporter", "--port", "{taken}"], {}, "127.0.0.1 port {taken}: [Errno 98] Address already in use"),
        (["call", "tasks.materialize", "-a", '["orders"]'], {}, "use tasks.materialize_topic(topic)"),
        (["call", "tasks.fan_out", "--queue", "nope"], {}, "Queue 'nope' missing"),
        (["topics", "list"], {"TIDEMARK_DATABASE_URL": "mysql://x"}, "TIDEMARK_DATABASE_URL: must start with"),
        (["status", "nope"], {}, "TIDEMARK_DATABASE_URL"),
    ],
)
def test_wrong_input_is_answered_in_one_line(
    arguments: list[str], variables: dict[str, str], message: str, run: Run, taken: int
) -> None:
    """Programs that do not start say why, without a traceback and without a password."""
    given = [argument.format(taken=taken) if "{taken}" in argument else argument for argument in arguments]
    done = run(*given, **{**UNREACHABLE, "C_FORCE_ROOT": "1", "PYTHONWARNINGS": "ignore", **variables})
    assert done.returncode not in {0, None}
    # Beat greets before it looks.
    assert done.stdout == "" or arguments[0] == "beat"
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr
    # Flower says how to log in before; Click shows the usage.
    assert len(done.stderr.splitlines()) <= 4
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Error: ")
    assert message.format(taken=taken) in last


def test_a_wrong_password_is_not_repeated(run: Run, postgres_server: Any, redis_server: Any) -> None:
    """A login that the server refuses names the variable, not the password."""
    port = redis_server.url.rpartition(":")[2]
    done = run("workers", **{**UNREACHABLE, "TIDEMARK_BROKER_URL": f"redis://:{SECRET}@127.0.0.1:{port}"})
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "TIDEMARK_BROKER_URL" in done.stderr
    assert SECRET not in done.stderr
