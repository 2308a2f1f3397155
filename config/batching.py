"""The ways to cut a backlog into transactions. The offsets are the same; speed, latency and lock times are not."""

from typing import Literal, get_args

# `adaptive`: as many events as fit into a target time. `complete`: partitions to their end, one after the other.
# `fixed`: so many events of each partition. `window`: as fixed, after collecting commits for a time.
Batching = Literal["adaptive", "complete", "fixed", "window"]

BATCHINGS: tuple[Batching, ...] = get_args(Batching)

# Holds its time where `fixed` is only right for one machine: `python -m tests.benchmarks.batching`.
DEFAULT_BATCHING: Batching = "adaptive"
