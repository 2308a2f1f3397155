"""Puts our commands in the place of Celery's own of the same name, and our defaults before Flower's.

Celery adds its built-in commands after the plug-ins, so a plug-in called `migrate` or `status` is lost: Celery's own
copy messages from broker to broker and list workers (`celery -A tasks inspect ping` does that, too). When `-A tasks` is
loaded, Celery has chosen its command object but not parsed for it yet; that object takes over ours.
"""

import sys
from importlib import import_module
from typing import Any

import click

from tasks import flower
from tasks.app import TidemarkApp

# Celery's command object, and ours.
_REPLACED = {
    ("celery.bin.migrate", "migrate"): ("tasks.commands.migrate", "migrate"),
    ("celery.bin.control", "status"): ("tasks.commands.status", "status"),
}


def adapt_commands(app: TidemarkApp) -> None:
    """Do so when the celery program is what loads us; elsewhere there is nothing to replace."""
    if "celery.bin.celery" not in sys.modules:
        return
    for (their_module, their_name), (our_module, our_name) in _REPLACED.items():
        theirs: click.Command = getattr(import_module(their_module), their_name)
        ours: click.Command = getattr(import_module(our_module), our_name)
        theirs.__class__ = ours.__class__
        theirs.__dict__.update(ours.__dict__)
    import_module("tasks.inspection")
    _start_flower_with_our_defaults(app)


def _start_flower_with_our_defaults(app: TidemarkApp) -> None:
    command: click.Command = import_module("flower.command").flower
    start = command.callback
    assert start is not None  # noqa: S101 - a command has one

    def callback(*args: Any, **kwargs: Any) -> Any:
        click.echo(flower.apply(app.settings), err=True)
        return start(*args, **kwargs)

    command.callback = callback
