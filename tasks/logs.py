"""Logging: one event a line, for people or as JSON, with the task it belongs to.

Takes the place of Celery's own set-up. Events of a materialize task carry topics, partitions and shard.
"""

import logging
import sys
from typing import Any, Protocol

import structlog
from celery import signals
from structlog.typing import EventDict, Processor, WrappedLogger

from config.settings import Settings

# Said by Celery for each message, each task and each tick; ours say it once, with figures.
_CHATTER = ("celery.worker.strategy", "celery.app.trace", "celery.beat")


def connect(settings: "SettingsSource") -> None:
    """Make Celery's programs log our way; settings are read when logging is set up."""

    def setup_logging(loglevel: int | str | None = None, logfile: str | None = None, **_: Any) -> None:
        configure(settings.settings, level=loglevel or logging.INFO, file=logfile)

    def task_prerun(task_id: str, task: Any, **_: Any) -> None:
        structlog.contextvars.bind_contextvars(task=task.name, task_id=task_id)

    def task_postrun(**_: Any) -> None:
        structlog.contextvars.clear_contextvars()

    # Strong references: the functions live nowhere else.
    signals.setup_logging.connect(setup_logging, weak=False)
    signals.task_prerun.connect(task_prerun, weak=False)
    signals.task_postrun.connect(task_postrun, weak=False)


class SettingsSource(Protocol):
    """What `connect` needs of the app."""

    @property
    def settings(self) -> Settings: ...


def configure(settings: Settings, *, level: int | str, file: str | None = None) -> None:
    """Send everything logged to one handler; what is passed as `extra` becomes fields of the event."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderers: list[Processor]
    if settings.log_format == "json":
        renderers = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(default=str)]
    else:
        renderers = [structlog.dev.ConsoleRenderer(colors=file is None and sys.stderr.isatty(), pad_event_to=0)]
    handler = logging.FileHandler(file) if file else logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared],
            processors=[_without_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in _CHATTER:
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def _without_meta(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    return structlog.stdlib.ProcessorFormatter.remove_processors_meta(logger, name, event)
