"""The names of our commands, for the celery program: it loads this whenever it starts, whichever app it starts for.

So this imports nothing heavy. A command's own module is imported when the command runs or is asked for its help.

Celery adds its built-in commands after the plug-ins, so a plug-in called `migrate` or `status` is lost. Celery's own
copy messages from broker to broker and list workers (`celery -A tasks inspect ping` does that, too). So `adapt` puts
ours in their place, and our defaults before Flower's. When it is called the program has chosen its command object, but
has not parsed for it yet; that object takes over ours.

The other commands of Celery's stay. They report in one line what a user or an outage caused, as ours do.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

# Short: `celery --help` shows them on one line each.
SUMMARIES: Mapping[str, str] = {
    "adopt": "take over the log of the seed's system",
    "audit": "check the invariants of the log",
    "commit": "commit an object, its batches as JSON lines",
    "compare": "a candidate strategy beside the current one",
    "doctor": "check servers, settings, schema, environment",
    "exporter": "serve metrics for Prometheus",
    "fetch": "list the batches of a partition",
    "health": "tell whether a program on this machine lives",
    "materialize": "materialize a topic's backlog now",
    "migrate": "create or upgrade the schema",
    "rebase": "go on after a restore into another cluster",
    "servers": "run the embedded Postgres and Redis",
    "status": "show backlog, lag, rate and what waits for what",
    "top": "show status, live",
    "topics": "create, list, change and delete topics",
    "workers": "list workers, their shards and what they do",
}
# Of those that share a module; the others have one of their own name.
_MODULES = {
    **dict.fromkeys(("audit", "materialize", "migrate", "rebase"), "upkeep"),
    **dict.fromkeys(("commit", "fetch"), "batches"),
    **dict.fromkeys(("health", "servers"), "local"),
    "top": "status",
}

_REPLACED = ("migrate", "status")
_LAST_PORT = 65_535
# Celery's own commands that say a word to the broker: it would try for as long as it takes.
_BRIEF = ("call", "control", "inspect", "purge")


def load(name: str) -> click.Command:
    """The command itself, for which its module is imported."""
    found: click.Command = getattr(import_module(f"tasks.commands.{_MODULES.get(name, name)}"), name)
    return found


class LazyCommand(click.Command):
    """Stands for a command until it is needed."""

    def __init__(self, name: str) -> None:
        super().__init__(name, short_help=f"Tidemark: {SUMMARIES[name]}")

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:  # noqa: ARG002 - click's
        """The context of the command itself, which click goes on with."""
        app = None if parent is None or parent.obj is None else parent.obj.app
        asks = extra.get("resilient_parsing") or "--help" in args
        if not asks and not isinstance(getattr(app, "user_options", None), OurCommands):
            raise click.ClickException(f"start it as: celery -A tasks {self.name}")
        # Usage lines begin with `celery` and this.
        return load(str(self.name)).make_context(f"-A tasks {self.name}", args, parent=parent, **extra)


class OurCommands(defaultdict[str, set[Any]]):
    """The `user_options` of our app, which give its `status`, `migrate` and Flower the place of the usual ones.

    The celery program asks for them when it has loaded the app that -A names, and before it parses the arguments of
    the command. Nobody else's app comes by here, so all others keep their commands as they are.
    """

    def __init__(self) -> None:
        super().__init__(set)

    def get(self, key: str, default: Any = None) -> Any:
        ctx = click.get_current_context(silent=True)
        program = sys.modules.get("celery.bin.celery")
        if ctx is not None and program is not None and ctx.command is program.celery:
            adapt(program.celery)
        return super().get(key, default)


def adapt(program: Any) -> None:
    """Change the celery program's commands, once."""
    commands = program.commands
    if isinstance(commands[_REPLACED[0]], LazyCommand):
        return
    # `inspect shards`, which our workers answer.
    import_module("tasks.inspection")
    for name in _REPLACED:
        theirs = commands[name]
        theirs.__class__ = LazyCommand
        theirs.__dict__.update(vars(LazyCommand(name)))
    for name, command in commands.items():
        if command.callback is not None:
            callback = command.callback
            if name == "flower":
                callback = _flower()(callback)
            elif name in _BRIEF:
                callback = _soon()(callback)
            command.callback = _in_one_line()(callback)


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        # What an option names, such as beat's -S.
        raise click.ClickException(str(error)) from error
    except Exception as error:
        explained = import_module("tasks.commands.base").explain(error, click.get_current_context().obj.app)
        if explained is None:
            raise
        raise explained from error


@contextmanager
def _soon() -> Iterator[None]:
    base, ctx = import_module("tasks.commands.base"), click.get_current_context()
    # `inspect` and `control` wait for their answers as long as they are told to.
    with base.reaching(ctx, base.Server.BROKER, more=float(ctx.params.get("timeout") or 0)):
        yield


@contextmanager
def _flower() -> Iterator[None]:
    ours, options, ctx = import_module("tasks.flower"), import_module("tornado.options"), click.get_current_context()
    click.echo(ours.apply(ctx.obj.app.settings), err=True)
    for option in ctx.params["tornado_argv"]:
        name, _, value = option.lstrip("-").partition("=")
        if name == "port" and value.isdecimal() and int(value) > _LAST_PORT:
            # It would take a port nobody asked for.
            raise click.ClickException(f"Flower's --port is a number up to {_LAST_PORT}, not {value}")
    try:
        yield
    # What its options may raise, and a port or a file that another Flower has.
    except (OSError, OverflowError, ValueError, options.Error) as error:
        where = f"{options.options.address}:{options.options.port}"
        raise click.ClickException(f"Flower does not start at {where}: {error}; see its --port and --db") from error


def __getattr__(name: str) -> LazyCommand:
    """What the entry points name."""
    if name not in SUMMARIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return LazyCommand(name)
