"""Executes the shell, SQL and Python blocks of a page, in order, in one fresh shell.

- `bash` and `sh` blocks run as they stand. In a `console` block the lines behind `$ ` are run one by one; the others
  are what they print, where `…` stands for anything.
- `sql` blocks run in psql on TIDEMARK_DATABASE_URL, `python` blocks in Python. A `text` block behind a block is what
  that one prints.
- `<!-- not run: REASON -->` before a block leaves it out; REASONS are the only ones there are.
- Background programs (`&`) run on, and are stopped at the end.
"""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from config.embedded.host import postgres_bin
from tests.demo.programs import Process
from tests.support import wait_until

REASONS = ("an example for other servers", "needs Docker", "another test runs it")
_BLOCK = re.compile(r"(?ms)^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$")
_RUN_BY = {
    "bash": "source {}",
    "sh": "source {}",
    "console": "source {}",
    "python": "python {}",
    "sql": 'psql -X -v ON_ERROR_STOP=1 -f {} "$TIDEMARK_DATABASE_URL"',
}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is run at once: a block, or a command of one. `printed` are lines that it prints, in this order."""

    line: int
    kind: str
    text: str
    printed: tuple[str, ...] = ()


def steps_of(page: str) -> list[Step]:
    """Raises ValueError for a reason that is none of REASONS."""
    steps: list[Step] = []
    end = 0
    for block in _BLOCK.finditer(page):
        kind, text, reason = block["kind"], block["text"], block["reason"]
        line = page.count("\n", 0, block.start("text")) + 1
        follows = not page[end : block.start()].strip()
        end = block.end()
        if reason is not None:
            if reason not in REASONS:
                raise ValueError(f"line {line}: {reason!r} is no reason to leave a block out; there are {REASONS}")
        elif kind == "console":
            steps += _commands(line, text)
        elif kind == "text" and follows and steps:
            steps[-1] = replace(steps[-1], printed=tuple(text.splitlines()))
        elif kind in _RUN_BY:
            steps.append(Step(line=line, kind=kind, text=text))
    return steps


def _commands(line: int, text: str) -> Iterator[Step]:
    """A command for each `$ `, with the lines that continue it."""
    command: Step | None = None
    for number, shown in enumerate(text.splitlines(), line):
        if shown.startswith("$ "):
            if command:
                yield command
            command = Step(line=number, kind="console", text=f"{shown[2:]}\n")
        elif command and not command.printed and command.text.endswith("\\\n"):
            command = replace(command, text=f"{command.text}{shown.removeprefix('> ')}\n")
        elif command and shown:
            command = replace(command, printed=(*command.printed, shown))
    if command:
        yield command


class Shell:
    """A bash with nothing of the tests' environment but the way to programs, in a home of its own."""

    def __init__(self, directory: Path, timeout: float, **variables: str) -> None:
        self._directory = directory
        self._timeout = timeout
        self._count = 0
        # `make setup` must not make the environment again that we run in.
        installed = directory / "installed"
        installed.touch()
        kept = {name: os.environ[name] for name in ("PYTHONPATH", "COVERAGE_PROCESS_CONFIG") if name in os.environ}
        env = {
            **kept,
            "PATH": f"{os.environ['PATH']}:{postgres_bin()}",
            "HOME": str(directory),
            "TIDEMARK_DATA_DIR": str(directory / "data"),
            "MAKEFLAGS": "e",
            "INSTALLED": str(installed),
            **variables,
        }
        argv = ["env", "-i", *(f"{name}={value}" for name, value in env.items()), "bash", "--noprofile", "--norc"]
        self.process = Process(argv, {}, directory / "shell.log")

    def run(self, step: Step) -> str | None:
        """Run it; returns what was wrong."""
        self._count += 1
        script, done = self._directory / f"step-{self._count}", f"step {self._count} done:"
        script.write_text(step.text)
        running, before = set(self.process.children()), len(self.process.output())
        # Any command of a block may fail, not only its last.
        command = f"{_RUN_BY[step.kind].format(shlex.quote(str(script)))} </dev/null"
        self.process.tell(f"failed=0; trap 'failed=$?' ERR; {command}; trap - ERR; echo; echo '{done}' $failed")

        def the_command_ends() -> "re.Match[str] | None":
            return re.search(rf"^{done} (\d+)$", self.process.output()[before:], re.MULTILINE)

        try:
            ended = wait_until(the_command_ends, timeout=self._timeout)
        except AssertionError:
            for pid in set(self.process.children()) - running:
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).terminate()
            wait_until(the_command_ends)
            return f"still runs after {self._timeout:g} s"
        assert ended
        printed = self.process.output()[before:].split(done)[0]
        if ended[1] != "0":
            return f"exit code {ended[1]}: {printed.strip()[-300:]}"
        return _missing(step.printed, printed.splitlines())

    def close(self) -> None:
        """Stop the background programs in order, and what they have started."""
        self.process.tell("kill $(jobs -p) 2>/dev/null; wait; exit")
        with suppress(Exception):
            self.process.wait()
        self.process.close()
        # The embedded servers are daemons: they stop after the last program that used them.
        wait_until(lambda: not self._leftovers(), timeout=60)

    def _leftovers(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if Path(process.cwd()).is_relative_to(self._directory):
                    found.append(process.pid)
        return found


def _missing(expected: tuple[str, ...], printed: list[str]) -> str | None:
    rest = iter(printed)
    for wanted in expected:
        pattern = ".*".join(map(re.escape, wanted.rstrip().split("…")))
        if not any(re.fullmatch(pattern, line.rstrip()) for line in rest):
            return f"{wanted!r} is not printed, but {printed}"
    return None


def execute(page: str, directory: Path, *, timeout: float = 60, **variables: str) -> list[str]:
    """Run all of a page; returns a line for each step that went wrong."""
    wrong = []
    shell = Shell(directory, timeout, **variables)
    try:
        for step in steps_of(page):
            if problem := shell.run(step):
                wrong.append(f"line {step.line}: {step.text.strip()}: {problem}")
            if not shell.process.running:
                wrong.append(f"line {step.line}: the shell has ended")
                break
    finally:
        shell.close()
    return wrong
