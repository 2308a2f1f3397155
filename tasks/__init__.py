"""Tidemark's Celery app and tasks: `celery -A tasks worker`, `celery -A tasks beat`, `celery -A tasks flower`.

From Python: `tasks.materialize_topic("orders")` asks for a materialization now, as
`tasks.materialize_topic.delay("orders")` does through a worker. The tasks are loaded when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tasks.app import app
from tasks.commands.entry import OurCommands

if TYPE_CHECKING:
    from tasks.jobs import fan_out, materialize, materialize_partition, materialize_topic, sweep

# The celery program asks the app that `-A` names for them, and finds our commands.
app.user_options = OurCommands()

__all__ = ["app", "fan_out", "materialize", "materialize_partition", "materialize_topic", "sweep"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("tasks.jobs"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
