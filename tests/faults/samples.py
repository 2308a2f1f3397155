"""What grows over time: memory of every program, sizes of the tables, lag and throughput, each second, and a chart."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.demo.evidence import backlog
from tests.demo.producer import Outage
from tests.faults.world import World

_SECONDS = 2.0
_MIB = 1 << 20

_SIZES = """
    select c.relname, pg_total_relation_size(c.oid)
    from pg_class c
    where c.relnamespace = 'tidemark'::regnamespace and c.relkind = 'r'
"""


class Sampler:
    """Looks with a world's ticks; in the end it writes a line of JSON for each sample, and draws them."""

    def __init__(self, world: World, file: Path) -> None:
        self._world = world
        self._file = file
        self._began = self._due = time.monotonic()
        self._faults: list[float] = []
        self._samples: list[dict[str, Any]] = []
        world.each_tick = self._look

    def happened(self) -> None:
        """Note that a fault is over."""
        self._faults.append(time.monotonic() - self._began)

    def _look(self) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + _SECONDS
        with Outage(), self._world.connect() as conn:
            figures = self._world.meter.read(backlog(conn, self._world.ids))
            self._samples.append(
                {
                    "at": now - self._began,
                    "memory": self._memory(),
                    "sizes": {str(name): size for name, size in conn.execute(_SIZES)},
                    "backlog": figures.backlog,
                    "committed": figures.committed_rate,
                    "materialized": figures.materialized_rate,
                    "lag": figures.lag_p99,
                }
            )

    def _memory(self) -> dict[str, int]:
        """Proportional set size of each program with its children, in MiB."""
        world = self._world
        found: dict[str, int] = {}
        programs = [*world.workers, world.beat, *world.producers]
        servers = {"postgres": world.postgres.pid, "redis": world.redis.pid}
        for name, pid in [*((p.name.split()[0], p.pid) for p in programs), *servers.items()]:
            try:
                process = psutil.Process(pid)
                size = sum(p.memory_full_info().pss for p in (process, *process.children(recursive=True)))
            except psutil.Error:
                continue
            found[name] = found.get(name, 0) + size // _MIB
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.write_text("".join(f"{json.dumps(sample)}\n" for sample in self._samples))
        draw(self._samples, self._faults, self._file.with_suffix(".png"))


def draw(samples: Sequence[Mapping[str, Any]], faults: Sequence[float], file: Path) -> None:
    """Four charts over the same time."""
    import matplotlib.pyplot as plt  # noqa: PLC0415 - of the extra `bench`, for this chart alone

    figure, axes = plt.subplots(4, 1, figsize=(11, 12), sharex=True, layout="constrained")
    minutes = [sample["at"] / 60 for sample in samples]
    last = samples[-1]["sizes"]
    largest = sorted(last, key=last.get, reverse=True)[:6]
    lines: list[tuple[int, str, list[float | None]]] = [
        *((0, name, [s["memory"].get(name) for s in samples]) for name in sorted(samples[-1]["memory"])),
        *((1, name, [s["sizes"].get(name, 0) / _MIB for s in samples]) for name in largest),
        *((2, f"{name} a second", [s[name] for s in samples]) for name in ("committed", "materialized")),
        (3, "lag of the last seconds, p99", [s["lag"] for s in samples]),
    ]
    for number, name, values in lines:
        axes[number].plot(minutes, values, label=name, linewidth=1)
    labels = ("memory, MiB (proportional)", "tables with indexes, MiB", "batches", "commit to offset, seconds")
    for axis, label in zip(axes, labels, strict=True):
        axis.set_ylabel(label)
        axis.legend(loc="upper left", fontsize=7, ncols=4)
        for at in faults:
            axis.axvline(at / 60, color="0.9", linewidth=0.8, zorder=0)
    axes[-1].set_xlabel("minutes; each grey line is the end of a fault")
    figure.savefig(file, dpi=110)
