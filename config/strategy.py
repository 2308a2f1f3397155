"""The ways to calculate offsets. All give the same ones; they differ in speed."""

from typing import Literal, get_args

# `window`: a running sum over each partition's pending events. `incremental`: one event after the other, by recursion.
# Each is a statement of its own, db/sql/place_<name>.sql, with the same parameters and the same result.
Strategy = Literal["window", "incremental"]

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)

# The faster one on deep and on thin backlogs: `python -m tests.benchmarks --only claims`.
DEFAULT_STRATEGY: Strategy = "incremental"
