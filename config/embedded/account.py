"""The account the servers run as, and their directories.

Postgres refuses to run as root, and Redis has no need to. So root's servers run as `nobody`; everyone else's
run as themselves.
"""

import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from config.errors import EmbeddedServerError

_ROOT = 0


@dataclass(frozen=True, kw_only=True)
class Account:
    """`uid` and `gid` are None where the servers run as who we are already."""

    name: str
    uid: int | None = None
    gid: int | None = None

    @classmethod
    def for_servers(cls) -> Self:
        if os.geteuid() != _ROOT:
            return cls(name=f"uid {os.geteuid()}")
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            raise EmbeddedServerError(
                "Embedded servers do not run as root, and this system has no user `nobody` to run them as: "
                "start Tidemark as another user, or set TIDEMARK_DATABASE_URL and TIDEMARK_BROKER_URL"
            ) from None
        return cls(name=nobody.pw_name, uid=nobody.pw_uid, gid=nobody.pw_gid)

    def spawn(self, argv: Sequence[str | Path], *, directory: Path, log: int) -> subprocess.Popen[bytes]:
        """Start a server in a session of its own: a Ctrl-C in our terminal must not stop it before we do."""
        return subprocess.Popen(
            argv,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=self.uid,
            group=self.gid,
            extra_groups=None if self.uid is None else [],
        )

    def run(self, argv: Sequence[str | Path], *, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv,
            check=False,
            cwd="/",
            env=_environment(),
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            user=self.uid,
            group=self.gid,
            extra_groups=None if self.uid is None else [],
        )

    def take(self, path: Path | int) -> None:
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def owns(self, path: Path) -> bool:
        uid = os.geteuid() if self.uid is None else self.uid
        return path.lstat().st_uid == uid

    def can_enter(self, directory: Path) -> bool:
        """Try it: mode bits tell neither about access lists nor about the mount or the security module."""
        return self.run(["/bin/sh", "-c", 'cd -- "$1"', "sh", directory]).returncode == 0


def claim(directory: Path) -> Path:
    """Create a directory of ours, or take an existing one.

    Root lets others pass through, because its servers are others; what lies inside is private by itself. The
    mode of a directory that somebody has filled is left alone: it could be a home.
    """
    directory = directory.expanduser().absolute()
    mode = 0o711 if os.geteuid() == _ROOT else 0o700
    try:
        directory.mkdir(parents=True, exist_ok=True)
        owner = directory.stat().st_uid
        if owner == os.geteuid() and not any(directory.iterdir()):
            directory.chmod(mode)
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
    return directory.resolve()


def claim_for(account: Account, directory: Path) -> Path:
    """Claim a directory that the servers' account has to get into as well."""
    directory = claim(directory)
    if not account.can_enter(directory):
        raise EmbeddedServerError(
            f"The embedded servers run as {account.name}, who cannot enter {directory}: open it and its parents for "
            f"searching (chmod o+x), or choose another TIDEMARK_DATA_DIR, such as /var/lib/tidemark"
        )
    return directory


def _environment() -> dict[str, str]:
    """Nothing of ours: PGDATA, PGPORT, PGOPTIONS, LANG or root's HOME would bend the servers."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC", **kept}
