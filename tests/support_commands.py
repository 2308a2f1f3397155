"""Runs subcommands in this process: what the celery program does, less its start."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import click
from celery.bin.base import CLIContext
from click.testing import CliRunner

from config.settings import Settings
from tasks import discovery, maintenance, materialization
from tasks.app import TidemarkApp

COLUMNS = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def words(self) -> str:
        """The output without its line breaks."""
        return " ".join(self.out.split())


class Cli:
    """Commands of one app, without a terminal."""

    def __init__(self, app: TidemarkApp) -> None:
        self.app = app

    def __call__(self, command: click.Command, *arguments: str, stdin: str | bytes = "", code: int = 0) -> Outcome:
        """Run it, and insist on the exit code, on no traceback and on no escape sequence."""
        result = CliRunner(env={"COLUMNS": str(COLUMNS)}).invoke(
            command, arguments, input=stdin, obj=CLIContext(app=self.app, no_color=False, workdir=None)
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        assert "\x1b" not in result.stdout
        return Outcome(code=result.exit_code, out=result.stdout, err=result.stderr)


@contextmanager
def app_for(database_url: str, broker_url: str, **changes: Any) -> Iterator[TidemarkApp]:
    app = TidemarkApp("tidemark-test", set_as_current=False)
    app.settings = Settings(database_url=database_url, broker_url=broker_url, **changes)
    for module in (materialization, discovery, maintenance):
        module.register(app)
    yield app
    app.database.close()
    app.close()
