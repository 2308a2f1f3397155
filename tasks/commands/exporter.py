"""`celery -A tasks exporter`: Prometheus metrics of the whole installation."""

import signal
import threading

import click

from config.heartbeat import EXPORTER_SILENCE, INTERVAL, Heartbeat, heartbeat_file
from tasks.commands.base import app_of, command
from tasks.exporter import DEFAULT_PORT, Exporter


@command("exporter")
@click.option("--address", default="127.0.0.1", metavar="ADDRESS", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=DEFAULT_PORT, metavar="PORT", help="0: any free one.")
def exporter(ctx: click.Context, address: str, port: int) -> None:
    """Serve metrics for Prometheus at /metrics until Ctrl-C.

    One for the whole installation. Needs no broker and no database to be up: it says which of them answers.
    """
    app = app_of(ctx)
    app.log.setup(loglevel="INFO")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Exporter(app, address, port) as serving:
        click.echo(f"metrics at {serving.url}metrics; Ctrl-C ends", err=True)
        heartbeat = Heartbeat(heartbeat_file(app.settings, "exporter"), "exporter", stale_after=EXPORTER_SILENCE)
        heartbeat.set_ready(ready=True)
        while not stop.wait(INTERVAL):
            if serving.answers():
                heartbeat.tick()
        heartbeat.end()
