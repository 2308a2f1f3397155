"""What the servers and their keeper write: private, and whole or not at all."""

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from config.embedded.account import Account

_TAIL_LINES = 12
_TAIL_BYTES = 8192


def write_private(path: Path, text: str, *, owner: Account | None = None) -> None:
    """Replace `path` by a file only its owner can read.

    `path` may lie in a directory the servers' account can write, so nothing there is followed or truncated:
    a new file (mkstemp: O_EXCL, 0600) takes the name over.
    """
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            if owner is not None:
                owner.take(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise


def open_log(path: Path) -> int:
    """Open a fresh log file and keep the one before it, which may say why the last run ended."""
    with suppress(FileNotFoundError):
        path.replace(path.with_name(f"{path.name}.1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def tail(path: Path) -> str:
    """Return the end of a log, for an error message."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").strip().splitlines()
    except FileNotFoundError:
        lines = []
    return "\n".join(lines[-_TAIL_LINES:]) or f"({path} is empty)"
