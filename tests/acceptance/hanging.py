"""A remote control command that hangs a worker's main loop: what liveness is for. Loaded with `-I`."""

import time
from typing import Any

from celery.worker.control import control_command


@control_command(name="hang", args=[("seconds", float)], signature="SECONDS")  # type: ignore[untyped-decorator,unused-ignore]
def hang(_state: Any, seconds: float) -> dict[str, str]:
    time.sleep(seconds)
    return {"ok": "awake again"}
