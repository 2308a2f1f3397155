"""What all of Tidemark's subcommands share: the app, exit codes, and errors without tracebacks."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
import kombu.exceptions
import psycopg
import redis
from celery.bin.base import CeleryCommand, handle_preload_options
from psycopg_pool import PoolTimeout

from config.errors import TidemarkError
from tasks.app import TidemarkApp

_Function = TypeVar("_Function", bound=Callable[..., Any])

# What a server that is away or refuses us raises; the message says which and why.
_SERVER_ERRORS = (psycopg.Error, PoolTimeout, redis.RedisError, kombu.exceptions.OperationalError)


class TidemarkCommand(CeleryCommand):
    """Ends with exit code 1 and one line for Tidemark's errors and servers that do not answer."""

    def invoke(self, ctx: click.Context) -> Any:
        if not isinstance(ctx.obj.app, TidemarkApp):
            raise click.ClickException(f"start it as: celery -A tasks {ctx.info_name}")
        try:
            return super().invoke(ctx)
        except TidemarkError as error:
            raise click.ClickException(str(error)) from error
        except _SERVER_ERRORS as error:
            raise click.ClickException(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def app_of(ctx: click.Context) -> TidemarkApp:
    """The app that `-A` named."""
    app = ctx.obj.app
    assert isinstance(app, TidemarkApp)  # noqa: S101 - TidemarkCommand looked
    return app


def command(name: str) -> Callable[[_Function], click.Command]:
    """Declare a subcommand of `celery -A tasks`; the function gets the click context first."""

    def decorate(function: _Function) -> click.Command:
        made: click.Command = click.command(name, cls=TidemarkCommand)(
            click.pass_context(handle_preload_options(function))
        )
        return made

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, one document, for programs.")


def echo_json(value: Any) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2, default=str))
