"""All benchmarks: `python -m tests.benchmarks [--quick] [--only NAME]`; results in build/bench."""

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from tests.benchmarks.bench import Bench
from tests.benchmarks.entry import Entry
from tests.benchmarks.parts import PARTS
from tests.benchmarks.progress import Display
from tests.benchmarks.report import draw, markdown, write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes; under three minutes")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--rounds", type=int, help="measurements of each kind (default: 5, or 1 with --quick)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="default: %(default)s")
    arguments = parser.parse_args()
    # An end by SIGTERM stops the servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    names = [arguments.only] if arguments.only else list(PARTS)
    entries: list[Entry] = []
    with Bench() as bench:
        plans = {name: PARTS[name](bench, rounds, quick=arguments.quick) for name in names}
        with Display(Console(stderr=True), plans) as display:
            for name, plan in plans.items():
                before = len(entries)
                with bench.part():
                    for measurement in plan:
                        display.begin(name, measurement)
                        found = measurement.take(display.tick)
                        display.end(found)
                        entries += found
                # After each part, so that one which is stopped leaves those before it.
                write(entries, arguments.output)
                draw(entries[before:], arguments.output)
    print(markdown(entries))  # noqa: T201 -- what this program is for


if __name__ == "__main__":
    main()
