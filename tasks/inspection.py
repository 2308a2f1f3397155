"""`celery -A tasks inspect shards`: both the program that asks and the worker that answers load this."""

from typing import Any

from celery.worker.control import inspect_command


@inspect_command()
def shards(state: Any, **_: Any) -> dict[str, Any]:
    """Shards this worker consumes, and whether it leases them."""
    report: dict[str, Any] = state.consumer.shard_leases.report()
    return report
