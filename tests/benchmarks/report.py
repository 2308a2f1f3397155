"""Writes results.json, results.md and the charts."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import matplotlib as mpl

from tests.benchmarks.entry import Entry

mpl.use("svg")
# The same results give the same file.
mpl.rcParams["svg.hashsalt"] = "tidemark"

from matplotlib import pyplot as plt  # noqa: E402 -- the backend is chosen before
from matplotlib.figure import Figure  # noqa: E402 -- sorted after pyplot

_LABELS = {"backlog": "events in the backlog", "partitions": "partitions", "history": "batches of history"}


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def markdown(entries: Sequence[Entry]) -> str:
    lines: list[str] = []
    for group, members in groupby(entries, key=lambda entry: entry.group):
        lines += [
            f"## {group}",
            "",
            "| scenario | ours | baseline | limit | vs baseline | vs limit | |",
            "|---|--:|--:|--:|--:|--:|---|",
            *(
                f"| {e.scenario} | {_number(e.ours)} | {_number(e.baseline)} | {_number(e.limit)} "
                f"| {_ratio(e.vs_baseline)} | {_ratio(e.vs_limit)} | {e.note or e.unit} |"
                for e in members
            ),
            "",
        ]
    return "\n".join(lines)


def _ours(entries: Sequence[Entry]) -> list[float | None]:
    return [entry.ours for entry in entries]


def _bars(entries: Sequence[Entry], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.38 * len(entries) + 1.2))
    names = [entry.scenario for entry in entries]
    for offset, (label, rates) in enumerate(
        (
            ("limit", [e.limit for e in entries]),
            ("Tidemark", _ours(entries)),
            ("baseline", [e.baseline for e in entries]),
        )
    ):
        if any(rate is not None for rate in rates):
            places = [place + (offset - 1) * 0.27 for place in range(len(entries))]
            axes.barh(places, [rate or 0 for rate in rates], height=0.25, label=label)
    axes.set_yticks(range(len(entries)), names)
    axes.invert_yaxis()
    axes.set_xlabel("events/s")
    axes.legend()
    _save(figure, path)


def _curve(entries: Sequence[Entry], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.5))
    x = [max(entry.x or 0, 1) for entry in entries]
    axes.plot(x, [entry.ours for entry in entries], marker="o", label="Tidemark")
    limits = [entry.limit for entry in entries if entry.limit is not None]
    if len(limits) == len(x):
        axes.plot(x, limits, marker="o", label="limit")
    group = entries[0].group
    if group != "workers":
        axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel(_LABELS.get(group, group))
    axes.set_ylabel(entries[0].unit)
    axes.legend()
    _save(figure, path)


def draw_backlogs(charts: Mapping[str, Mapping[str, Sequence[tuple[float, int]]]], directory: Path) -> None:
    """By what is charted and edition: how many events waited for their offsets, and when."""
    figure, panels = plt.subplots(1, len(charts), figsize=(6 * len(charts), 3.5), squeeze=False)
    for axes, (title, lines) in zip(panels[0], charts.items(), strict=True):
        for name, backlog in lines.items():
            label = {"ours": "Tidemark", "first": "first edition"}[name]
            axes.plot([at for at, _ in backlog], [waiting for _, waiting in backlog], label=label)
        axes.set_title(title, fontsize="medium")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        axes.set_ylabel("events without an offset")
        axes.legend()
    directory.mkdir(parents=True, exist_ok=True)
    _save(figure, directory / "sustained-backlog.svg")


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write(entries: Sequence[Entry], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps([entry.as_dict() for entry in entries], indent=1) + "\n")
    (directory / "results.md").write_text(markdown(entries))


def draw(entries: Sequence[Entry], directory: Path) -> None:
    """A chart for each group."""
    for group, members in groupby(entries, key=lambda entry: entry.group):
        found = list(members)
        form = _curve if all(entry.x is not None for entry in found) else _bars
        form(found, directory / f"{group.replace(' ', '-')}.svg")
