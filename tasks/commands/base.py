"""What all of Tidemark's subcommands share: the app, its servers, and errors in one line.

Standard output has results only. Errors go to standard error, as `Error: …`, or with --json as one document
`{"error": …, "code": …}`; the code is what the SQL functions raise for the same (`TM004`), else a name (`UsageError`).
The exit code is 1, and 2 for wrong arguments.
"""

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from csv import DictWriter
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

import click

from config.errors import TidemarkError
from tasks.commands.parameters import Seconds

if TYPE_CHECKING:
    import psycopg
    from rich.console import RenderableType

    from tasks.app import TidemarkApp

_Declare = Callable[[Callable[..., None]], click.Command]

# With the start of the program that is an answer within 5 s.
ANSWER_SECONDS = 2.5
_AS_JSON = f"{__name__}.as_json"
_TIMEOUT = f"{__name__}.timeout"
# `json`, `csv` or nothing: what a command prints.
OUTPUT = f"{__name__}.output"


class Server(Enum):
    """What a command talks to, the setting that says where it is, and the libraries that talk to it."""

    POSTGRES = "Postgres", "database_url", {"psycopg", "psycopg_pool", "sqlalchemy"}
    REDIS = "Redis", "redis_url", {"redis"}
    BROKER = "the broker", "broker_url", {"kombu", "amqp"}

    def describe(self, app: "TidemarkApp") -> str:
        """Its name, its place and the variable to look at, without the password."""
        name, setting, _ = self.value
        url = getattr(app.settings, setting)
        if self is Server.REDIS and url is None:
            # It is the broker's.
            setting, url = Server.BROKER.value[1], app.settings.broker_url
        if url is None:
            return f"{name} (embedded, in {app.settings.data_dir})"
        where = url.partition("://")[2].rpartition("@")[2].partition("?")[0]
        return f"{name} at {where} (TIDEMARK_{setting.upper()})"


class UnreachableError(click.ClickException):
    """A server does not answer."""


class JsonError(click.ClickException):
    """An error of a command with --json: how it is explained, and what it was."""

    def __init__(self, explained: click.ClickException, error: Exception) -> None:
        super().__init__(explained.format_message())
        self.exit_code = explained.exit_code  # type: ignore[misc]  # click reads the instance's
        kind = explained if isinstance(explained, UnreachableError) else error
        self._code = getattr(error, "code", None) or type(kind).__name__

    def show(self, file: Any = None) -> None:
        """One document on standard error."""
        click.echo(json.dumps({"error": self.message, "code": self._code}), file=file or sys.stderr)


def explain(error: Exception, app: "TidemarkApp") -> click.ClickException | None:
    """What a user or an outage caused, in one line; None for everything else, which keeps its traceback."""
    if isinstance(error, click.ClickException):
        return error
    # A KeyError's own text has quotes around it.
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(said).strip().partition("\n\n")[0].split())
    if isinstance(error, TidemarkError):
        return click.ClickException(text)
    # By name: nothing is imported for an error that did not happen.
    origins = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    for server in Server:
        if origins & server.value[2]:
            return UnreachableError(f"{server.describe(app)}: {type(error).__name__}: {text}")
    return click.ClickException(text) if "celery" in origins else None


class Command(click.Command):
    """Reports errors as this module says."""

    def make_context(self, info_name: str | None, args: list[str], *others: Any, **extra: Any) -> click.Context:
        # Parsing takes them away, and an error of parsing is reported, too.
        as_json = "--json" in args
        try:
            ctx = super().make_context(info_name, args, *others, show_default=True, **extra)
        except click.UsageError as error:
            if as_json:
                raise JsonError(error, error) from error
            raise
        # Also where it belongs to a subcommand that is not there.
        ctx.meta[_AS_JSON] = as_json
        return ctx

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            explained = explain(error, ctx.obj.app)
            if explained is None or isinstance(error, JsonError):
                raise
            if ctx.meta[_AS_JSON]:
                raise JsonError(explained, error) from error
            if explained is error:
                raise
            raise explained from error


class Group(Command, click.Group):
    """One with subcommands of its own: `celery -A tasks topics create`."""

    command_class = Command


def command(name: str, *options: click.Option, within: Group | None = None) -> _Declare:
    """Declare a subcommand of `celery -A tasks`, or of a group; the function gets the click context first."""
    declare = click.command(name, cls=Command) if within is None else within.command(name)

    def finish(function: Callable[..., None]) -> click.Command:
        made = declare(click.pass_context(function))
        made.params += options
        return made

    return finish


def app_of(ctx: click.Context) -> "TidemarkApp":
    """The app that `-A` named."""
    return cast("TidemarkApp", ctx.obj.app)


# --- Servers

# For commands that wait for nothing but a server's first answer: `reaching` looks it up.
TIMEOUT = click.Option(
    ["--timeout"],
    type=Seconds(0.1, 3600),
    default=ANSWER_SECONDS,
    expose_value=False,
    callback=lambda ctx, _, seconds: ctx.meta.update({_TIMEOUT: seconds}),
    help="Give up on a server that does not answer within this time.",
)


@contextmanager
def reaching(ctx: click.Context, server: Server, *, more: float = 0.0) -> Iterator[None]:
    """Raise UnreachableError when this takes longer. A frozen server accepts connections and never says a word.

    By a signal, so that it holds whatever library waits, and however often that tries again. Around nothing but the
    first words to a server: what follows may take its time.
    """
    seconds = ctx.meta.get(_TIMEOUT, ANSWER_SECONDS) + more

    def give_up(*_: object) -> None:
        raise UnreachableError(f"{server.describe(app_of(ctx))} does not answer within {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, give_up)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def database(ctx: click.Context) -> "Iterator[psycopg.Connection[Any]]":
    """A connection of the command's own."""
    from db.pool import connect  # noqa: PLC0415 - not for --help

    app = app_of(ctx)
    # Starting embedded servers may take longer.
    url = app.database_url
    with ExitStack() as stack:
        with reaching(ctx, Server.POSTGRES):
            conn = stack.enter_context(connect(url, app.settings, timeout=ctx.meta.get(_TIMEOUT, ANSWER_SECONDS)))
        yield conn


# --- Output


def _output(name: str) -> click.Option:
    return click.Option(
        [f"--{name}"],
        is_flag=True,
        expose_value=False,
        callback=lambda ctx, _, given: given and ctx.meta.update({OUTPUT: name}),
        help=f"Print {name.upper()}, for programs.",
    )


JSON, CSV = _output("json"), _output("csv")


def answer(
    ctx: click.Context,
    document: Any,
    words: "RenderableType",
    *,
    csv: tuple[Iterable[str], Iterable[Mapping[str, Any]]] = ((), ()),
    err: bool = False,
) -> None:
    """Print the result of a command: as --json or --csv (columns and rows), else in words, with `err` as an error."""
    output = ctx.meta.get(OUTPUT)
    if output == "json":
        click.echo(json.dumps(document, indent=2, default=str))
    elif output == "csv":
        echo_csv(*csv)
    elif isinstance(words, str):
        click.echo(words, err=err)
    else:
        from tasks.commands.display import console  # noqa: PLC0415 - slow to import, and few words need it

        console(ctx).print(words)


def echo_csv(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Print these columns of the rows under a header, which is there without rows as well."""
    writer = DictWriter(sys.stdout, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
