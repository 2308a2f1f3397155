"""Commands of commands: `celery -A tasks topics create`."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from celery.bin.base import handle_preload_options

from tasks.commands.base import TidemarkCommand

_Function = TypeVar("_Function", bound=Callable[..., Any])


class TidemarkGroup(click.Group):
    """A subcommand of `celery` with subcommands of its own, which report errors as the others do."""

    command_class = TidemarkCommand

    def subcommand(self, name: str) -> Callable[[_Function], click.Command]:
        """Declare a subcommand; the function gets the click context first."""

        def decorate(function: _Function) -> click.Command:
            made: click.Command = self.command(name)(click.pass_context(handle_preload_options(function)))
            return made

        return decorate


def group(name: str) -> Callable[[_Function], TidemarkGroup]:
    """Declare a group; the function's docstring is its help."""

    def decorate(function: _Function) -> TidemarkGroup:
        made: TidemarkGroup = click.group(name, cls=TidemarkGroup)(click.pass_context(handle_preload_options(function)))
        return made

    return decorate
