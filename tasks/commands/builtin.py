"""Puts our commands in the place of Celery's own of the same name.

Celery adds its built-in commands after the plug-ins, so a plug-in called `migrate` or `status` is lost: Celery's own
copy messages from broker to broker and list workers (`celery -A tasks inspect ping` does that, too). When `-A tasks` is
loaded, Celery has chosen its command object but not parsed for it yet; that object takes over ours.
"""

import sys
from importlib import import_module

import click

# Celery's command object, and ours.
_REPLACED = {
    ("celery.bin.migrate", "migrate"): ("tasks.commands.migrate", "migrate"),
}


def replace_builtin_commands() -> None:
    """Do so when the celery program is what loads us; elsewhere there is nothing to replace."""
    if "celery.bin.celery" not in sys.modules:
        return
    for (their_module, their_name), (our_module, our_name) in _REPLACED.items():
        theirs: click.Command = getattr(import_module(their_module), their_name)
        ours: click.Command = getattr(import_module(our_module), our_name)
        theirs.__class__ = ours.__class__
        theirs.__dict__.update(ours.__dict__)
