"""The names of our commands, for the celery program: it loads this whenever it starts, whichever app it starts for.

So this imports nothing heavy. A command's own module is imported when the command runs or is asked for its help.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

import click

# Short: `celery --help` shows them on one line each.
SUMMARIES: Mapping[str, str] = MappingProxyType(
    {
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
        "topics": "create, list and show topics, set retention",
        "workers": "list workers, their shards and what they do",
    }
)

# Of those that share a module; the others have one of their own name.
_MODULES = {
    **dict.fromkeys(("audit", "materialize", "migrate", "rebase"), "upkeep"),
    **dict.fromkeys(("commit", "fetch"), "batches"),
    **dict.fromkeys(("health", "servers"), "local"),
    "top": "status",
}


def load(name: str) -> click.Command:
    """The command itself, for which its module is imported."""
    found: click.Command = getattr(import_module(f"tasks.commands.{_MODULES.get(name, name)}"), name)
    return found


class LazyCommand(click.Command):
    """Stands for a command until it is needed."""

    def __init__(self, name: str) -> None:
        super().__init__(name, short_help=f"Tidemark: {SUMMARIES[name]}")

    def make_context(
        self,
        info_name: str | None,  # noqa: ARG002 - click's signature
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
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
            import_module("tasks.commands.builtin").adapt(program.celery)
        return super().get(key, default)


def __getattr__(name: str) -> LazyCommand:
    """What the entry points name."""
    if name not in SUMMARIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return LazyCommand(name)
