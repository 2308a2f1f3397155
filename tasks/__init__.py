"""Tidemark's Celery app and tasks: `celery -A tasks worker`, `celery -A tasks beat`, `celery -A tasks flower`.

From Python: `tasks.materialize_topic("orders")` asks for a materialization now, as
`tasks.materialize_topic.delay("orders")` does through a worker.
"""

from celery import signals

from tasks import discovery, health, leases, logs, maintenance, materialization, metrics
from tasks.app import TidemarkApp
from tasks.commands.entry import OurCommands
from tasks.recovery import treat_torn_down_channels_as_lost_connections

treat_torn_down_channels_as_lost_connections()

app = TidemarkApp("tidemark", set_as_current=True)
materialize, materialize_partition, materialize_topic = materialization.register(app)
fan_out, sweep = discovery.register(app)
maintenance.register(app)
logs.connect(app)
metrics.connect(app)
health.connect(app)
leases.connect(app)
app.user_options = OurCommands()

__all__ = ["app", "fan_out", "materialize", "materialize_partition", "materialize_topic", "sweep"]


@signals.worker_process_shutdown.connect
@signals.worker_shutdown.connect
def _close_connections(**_: object) -> None:
    app.database.close()
