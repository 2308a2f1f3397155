"""Runs subcommands in this process: what the celery program does, less its start."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import click
from celery.bin.base import CLIContext
from click.testing import CliRunner

from config.settings import Settings
from db.materialize import MaterializationMetrics
from tasks.app import TidemarkApp
from tasks.dispatch import enqueue, fan_out
from tasks.drain import drain as drain_sides
from tasks.drain import serve, together
from tasks.jobs import Job

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
        outcome = self.run(command, arguments, stdin)
        assert outcome.code == code, outcome.out + outcome.err
        return outcome

    def run(self, command: click.Command, arguments: Sequence[str], stdin: str | bytes = "") -> Outcome:
        """Run it, whatever its exit code is."""
        result = CliRunner(env={"COLUMNS": str(COLUMNS)}).invoke(
            command, arguments, input=stdin, obj=CLIContext(app=self.app, no_color=False, workdir=None)
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert "\x1b" not in result.stdout
        return Outcome(code=result.exit_code, out=result.stdout, err=result.stderr)


def new_app(**settings: Any) -> TidemarkApp:
    """An app with settings of its own: the one in `tasks` reads its environment once."""
    app = TidemarkApp("tidemark-test")
    app.settings = Settings.model_validate(settings)
    return app


@contextmanager
def app_for(database_url: str, broker_url: str, **changes: Any) -> Iterator[TidemarkApp]:
    app = new_app(database_url=database_url, broker_url=broker_url, **changes)
    yield app
    app.database.close()
    app.close()


def drain(app: TidemarkApp, ids: Sequence[int]) -> MaterializationMetrics:
    """As a task does, with all its observers."""
    return together(drain_sides(app, ids))


def declare_jobs(app: TidemarkApp) -> None:
    """Some of the jobs as tasks of this app: those of `tasks.jobs` belong to the one in `tasks`."""
    job = partial(app.task, base=Job, shared=False)

    @job(name="tasks.materialize")
    def materialize(partition_ids: list[int]) -> dict[str, Any]:
        return serve(app, partition_ids)

    @job(name="tasks.materialize_topic")
    def materialize_topic(topic: str) -> list[str]:
        return enqueue(app, topic, None)

    @job(name="tasks.fan_out")
    def find() -> dict[str, int]:
        return fan_out(app)
