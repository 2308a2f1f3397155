"""Logging: one event a line, for people or as JSON, with the task it belongs to, and no secret in it.

Takes the place of Celery's own set-up in Tidemark's programs. An error is its type and message, and where it was raised
as a chain of `file:line`; a traceback with its frames' variables would hold passwords, and takes a thousand lines.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import structlog
from celery.app.log import Logging as CeleryLogging
from celery.utils.nodenames import node_format
from structlog.typing import EventDict, Processor, WrappedLogger

from config.errors import TidemarkError
from config.redis import RedisAddress, is_redis
from config.settings import Settings
from db.translate import is_transient

# Said by Celery for each message, each task and each tick; ours say it once, with metrics.
_CHATTER = ("celery.worker.strategy", "celery.app.trace", "celery.beat")
_LONGEST_EVENT = 1_000
_FRAMES = 12
_PASSWORD_IN_URL = re.compile(r"(\w+://[^\s:/@]*):[^\s@]+@")
_SECRET_OPTION = re.compile("key|secret|token|password", re.IGNORECASE)
_HIDDEN = "********"


class Logging(CeleryLogging):
    def setup_logging_subsystem(
        self, loglevel: Any = None, logfile: Any = None, hostname: str | None = None, **_: Any
    ) -> Any:
        """Celery's hook; once in a process. What it returns tells Celery that standard output is left alone."""
        if CeleryLogging._setup:  # noqa: SLF001 - as Celery's own does
            return None
        CeleryLogging._setup = True  # noqa: SLF001
        if logfile and hostname:
            logfile = node_format(logfile, hostname)
        level = loglevel or logging.INFO
        configure(self.app.settings, level=level, file=logfile, secrets=secrets_of(self.app))
        # Celery's own does so for the children it forks.
        os.environ.update(_MP_FORK_LOGLEVEL_=str(level), _MP_FORK_LOGFILE_=str(logfile or ""), _MP_FORK_LOGFORMAT_="")
        return [self]


def secrets_of(app: Any) -> frozenset[str]:
    """Every password that the app's servers know."""
    found = {app.settings.flower_auth.partition(":")[2]} if app.settings.flower_auth else set()
    for url in filter(None, (app.settings.database_url, app.settings.broker_url, app.redis_url)):
        if is_redis(url):
            found.update(RedisAddress.parse(url).secrets)
        else:
            parts = urlsplit(url)
            found.update({parts.password or "", dict(parse_qsl(parts.query)).get("password", "")})
    found.update(_secret_options(app.settings.object_store_options or {}))
    # A password of a letter would hide half the log.
    return frozenset(secret for secret in found if len(secret) > 3)  # noqa: PLR2004


def _secret_options(options: dict[str, Any]) -> Iterator[str]:
    """What an option holds that is called a key, a secret or a token, however deep it stands."""
    for name, value in options.items():
        if isinstance(value, dict):
            yield from _secret_options(value)
        elif isinstance(value, str) and _SECRET_OPTION.search(name):
            yield value


def configure(settings: Settings, *, level: int | str, file: str | None = None, secrets: Iterable[str] = ()) -> None:
    """Send everything logged to one handler; what is passed as `extra` becomes fields of the event."""
    renderer: Processor = structlog.processors.JSONRenderer(default=str)
    if settings.log_format != "json":
        colors = file is None and sys.stderr.isatty()
        renderer = structlog.dev.ConsoleRenderer(colors=colors, pad_event_to=0)
    hidden = tuple(secrets)

    def hide(_: WrappedLogger, __: str, text: Any) -> Any:
        """Hide what must not be read, whoever put it into the event."""
        text = _PASSWORD_IN_URL.sub(rf"\1:{_HIDDEN}@", text)
        for secret in hidden:
            text = text.replace(secret, _HIDDEN)
        return text

    # logrotate may move the file: then it is opened again.
    handler = WatchedFileHandler(file) if file else logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                structlog.stdlib.ExtraAdder(),
                structlog.contextvars.merge_contextvars,
                structlog.stdlib.add_log_level,
                structlog.stdlib.add_logger_name,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _one_line, renderer, hide],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _CHATTER:
        logging.getLogger(name).setLevel(level if root.level <= logging.DEBUG else max(logging.WARNING, root.level))


def _one_line(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """The event without line breaks, and an error in place of its traceback."""
    error = event.pop("exc_info", None)
    event.pop("stack_info", None)
    # Celery puts the whole traceback, and a task's arguments, into a field of its own.
    event.pop("data", None)
    if isinstance(error, BaseException):
        error = (type(error), error, error.__traceback__)
    if isinstance(error, tuple) and error[1] is not None:
        event.setdefault("error", f"{error[0].__name__}: {error[1]}")
        # The message of an error of ours, or of a server that is away, says all.
        if not isinstance(error[1], TidemarkError | OSError) and not is_transient(error[1]):
            frames = traceback.extract_tb(error[2])[-_FRAMES:]
            places = (f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in frames)
            event["raised_at"] = " > ".join(places)
    for name, value in event.items():
        if isinstance(value, str) and ("\n" in value or len(value) > _LONGEST_EVENT):
            flat = " ".join(value.split())
            event[name] = flat if len(flat) <= _LONGEST_EVENT else f"{flat[:_LONGEST_EVENT]}…"
    return event
