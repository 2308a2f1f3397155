"""Puts our commands in the place of Celery's own of the same name, and our defaults before Flower's.

Celery adds its built-in commands after the plug-ins, so a plug-in called `migrate` or `status` is lost. Celery's own
copy messages from broker to broker and list workers (`celery -A tasks inspect ping` does that, too). When this is
called the program has chosen its command object, but has not parsed for it yet; that object takes over ours.

The other commands of Celery's stay. They report in one line what a user or an outage caused, as ours do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import click

from tasks.commands.entry import LazyCommand

_REPLACED = ("migrate", "status")
_LAST_PORT = 65_535
# Celery's own commands that say a word to the broker: it would try for as long as it takes.
_BRIEF = ("call", "control", "inspect", "purge")


def adapt(program: click.Group) -> None:
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
