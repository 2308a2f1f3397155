"""`make audit`: asks a public database of vulnerabilities (OSV) about every package of the lock files.

It exits with 1 where there is one, and with 2 where the database gave no answer: then nothing is known.
"""

import re
import subprocess
import sys
from pathlib import Path

from tests.demo.programs import ROOT

LOCKS = ("requirements", "requirements-dev")
_FOUND, _UNKNOWN = 1, 2
_NEEDS = "It needs the package index that pip uses, and the service OSV by https (see: uv audit --help)."


def locked(lock: str) -> list[tuple[str, str]]:
    """Name and requirement of each package in a lock file: `name==version`, with its marker where it has one."""
    text = (ROOT / "config" / f"{lock}.lock").read_text()
    lines = re.findall(r"^([a-z0-9][a-z0-9._-]*)(==[^\\\n]+)", text, re.MULTILINE)
    return [(name, f"{name}{version}".strip()) for name, version in lines]


def audit(lock: str, directory: Path) -> int:
    """Ask about one file; returns 0, 1 or 2 as the program does."""
    # uv audits projects and scripts: a script that requires what is locked.
    script = directory / f"{lock.replace('-', '_')}.py"
    requirements = "".join(f"#   {requirement!r},\n" for _, requirement in locked(lock))
    script.write_text(f'# /// script\n# requires-python = ">=3.11"\n# dependencies = [\n{requirements}# ]\n# ///\n')
    uv = Path(sys.executable).with_name("uv")
    options = ("--quiet", "--preview-features", "audit-command", "--script", str(script))
    done = subprocess.run([uv, "audit", *options], check=False, cwd=ROOT, text=True, capture_output=True)
    if done.returncode == 0:
        said = f"OSV knows of nothing in its {len(locked(lock))} packages"
    elif done.returncode == _FOUND:
        said = f"\n{done.stdout}{done.stderr}"
    else:
        said = f"NOT AUDITED, so nothing is known. uv audit said:\n{done.stderr.strip()}\n{_NEEDS}"
    print(f"config/{lock}.lock: {said}", flush=True)  # noqa: T201 - what it is for
    return min(done.returncode, _UNKNOWN)


def main() -> int:
    directory = ROOT / "build" / "audit"
    directory.mkdir(parents=True, exist_ok=True)
    return max(audit(lock, directory) for lock in LOCKS)


if __name__ == "__main__":
    sys.exit(main())
