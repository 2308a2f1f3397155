"""`python -m tests.faults`: faults against the running system, again and again, and the history check in the end."""

import json
import logging
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click
import psycopg

from config.errors import TidemarkError
from tests.demo.check import Finding
from tests.demo.interrupts import Interrupted, Interrupts
from tests.faults.faults import FAULTS, disk_is_full
from tests.faults.samples import Sampler
from tests.faults.world import World

_DISK = "700m"


@dataclass(slots=True)
class Row:
    """What was seen of one fault: `at_stake` are batches committed or placed between it and the recovery."""

    injections: int = 0
    at_stake: int = 0
    recoveries: list[float] = field(default_factory=list)


@contextmanager
def small_disk(directory: Path) -> Iterator[Path | None]:
    """A file system that can be filled without harm to others; None where nobody may mount one."""
    disk = directory / "disk"
    disk.mkdir(mode=0o711)
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={_DISK},mode=0711", "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(mounting, check=False, capture_output=True).returncode == 0
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


def schedule(world: World, names: Sequence[str], rounds: int | None, until: float) -> Iterator[str]:
    """All faults in a random order, and again in another one, so many times or until that monotonic time."""
    done = 0
    while (rounds is None or done < rounds) and time.monotonic() < until:
        for name in world.chance.sample(names, len(names)):
            if time.monotonic() >= until:
                return
            yield name
        done += 1


def run(
    seed: int,
    names: Sequence[str],
    *,
    rounds: int | None = None,
    seconds: float = float("inf"),
    calm: float = 0.0,
    long: float = 8.0,
    samples: Path | None = None,
) -> tuple[dict[str, Row], list[Finding], list[str]]:
    """Do these faults, `calm` seconds apart; what was seen of each, the findings, and which could not be done.

    Transactions stay open and snapshots are held for `long` seconds.
    """
    rows: defaultdict[str, Row] = defaultdict(Row)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidemark-faults-")))
        directory.chmod(0o711)
        disk = stack.enter_context(small_disk(directory))
        skipped = [] if disk else [name for name in names if FAULTS[name] is disk_is_full]
        world = World(directory, stack, seed=seed, disk=disk, long=long)
        world.recover()
        sampler = stack.enter_context(Sampler(world, samples)) if samples else None
        until = time.monotonic() + seconds
        failure = None
        try:
            for name in schedule(world, [name for name in names if name not in skipped], rounds, until):
                before = len(world.ledger.sent)
                injections = FAULTS[name](world)
                recovery = world.recover()
                row = rows[name]
                row.injections += injections
                row.at_stake += len(world.ledger.sent) - before
                row.recoveries.append(recovery)
                click.echo(f"{name:<44} {injections:>5} injections, recovered in {recovery:6.2f} s")
                if sampler is not None:
                    sampler.happened()
                world.pause(calm)
        except (TidemarkError, psycopg.Error, AssertionError) as error:
            # What was written down until then is checked all the same.
            failure = f"{name}: {error}"
        findings = world.finish()
    done = sum(len(row.recoveries) for row in rows.values())
    findings.append(Finding(number=len(findings) + 1, name="recovered", counted=f"{done:,} times", violation=failure))
    return rows, findings, skipped


@click.command("faults")
@click.option("--seed", type=int, help="Repeats a schedule, as far as the scheduler lets it. Default: a random one.")
@click.option("--rounds", type=click.IntRange(min=1), help="All faults so many times. Default: once.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="In place of rounds: so long.")
@click.option("--calm", default=0.0, show_default=True, type=click.FloatRange(min=0), help="Seconds between faults.")
@click.option("--long", default=8.0, show_default=True, type=click.FloatRange(min=0), help="Seconds of what is held.")
@click.option("--only", multiple=True, type=click.Choice(list(FAULTS)), help="This fault; may be repeated.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write what was seen there.")
@click.option("--samples", type=click.Path(path_type=Path, dir_okay=False), help="Sample memory, sizes, lag; a chart.")
def faults(
    *,
    seed: int | None,
    rounds: int | None,
    minutes: float | None,
    calm: float,
    long: float,
    only: Sequence[str],
    file: Path | None,
    samples: Path | None,
) -> None:
    """Do faults to the running system, and check in the end that nothing was lost, doubled or out of order.

    Exit code 1 where something was, or where it did not recover.
    """
    # That servers come and go is what this is about.
    logging.getLogger("psycopg").setLevel(logging.CRITICAL)
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    click.echo(f"seed {seed}")
    if minutes is None:
        rounds = rounds or 1
    seconds = float("inf") if minutes is None else minutes * 60
    try:
        # A signal ends it as Ctrl-C does: servers, programs and the small disk go with it.
        with Interrupts():
            rows, findings, skipped = run(
                seed, only or list(FAULTS), rounds=rounds, seconds=seconds, calm=calm, long=long, samples=samples
            )
    except Interrupted as interrupted:
        raise click.exceptions.Exit(interrupted.exit_code) from None
    except (TidemarkError, psycopg.Error, AssertionError) as error:
        raise click.ClickException(f"{error} (seed {seed})") from error
    click.echo(table(rows, findings))
    for name in skipped:
        click.echo(f"skipped: {name}: no file system can be mounted here, which takes root")
    if file is not None:
        file.write_text(json.dumps({name: [r.injections, r.at_stake, r.recoveries] for name, r in rows.items()}))
    if any(finding.violation for finding in findings):
        raise click.ClickException(f"violated with seed {seed}")


def table(rows: dict[str, Row], findings: Sequence[Finding]) -> str:
    """What was seen, as the table of docs/reliability.md."""
    lines = [
        "| fault | injected | batches at stake | lost | doubled | reordered | recovery, median | worst |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    # Which fault did it is not known.
    wrong = "?" if any(finding.violation for finding in findings) else "0"
    for name, row in sorted(rows.items(), key=lambda item: list(FAULTS).index(item[0])):
        median, worst = statistics.median(row.recoveries), max(row.recoveries)
        counted = f"{row.injections:,} | {row.at_stake:,} | {wrong} | {wrong} | {wrong}"
        lines.append(f"| {name} | {counted} | {median:.1f} s | {worst:.1f} s |")
    total = sum(row.injections for row in rows.values())
    lines += ["", f"{total:,} injections", ""]
    lines += [f"{f.number} {f.name:<16} {f.counted:<60} {f.violation or 'ok'}" for f in findings]
    return "\n".join(lines)


if __name__ == "__main__":
    faults(prog_name="python -m tests.faults")
