"""The licences of what is locked, as the installed packages state them: the list of those we admit is in pyproject."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import pytest

from tests.audit import LOCKS, locked
from tests.demo.programs import ROOT

LICENCES: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["tidemark"]["licences"]
EXCEPTIONS: dict[str, str] = LICENCES["exceptions"]
ADMITTED = {"requirements": set(LICENCES["runtime"])}
ADMITTED["requirements-dev"] = ADMITTED["requirements"] | set(LICENCES["development"])


def licences_of(name: str) -> set[str]:
    """SPDX's names, or those of the classifiers; older packages have a line only."""
    metadata = distribution(name).metadata
    for expression in metadata.get_all("License-Expression", []):
        return set(re.split(r" (?:AND|OR) ", re.sub(r"[()]", "", expression)))
    classifiers = {c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier", []) if c.startswith("License ::")}
    return classifiers or {text.partition("\n")[0] for text in metadata.get_all("License", ["none"])}


@pytest.mark.parametrize("lock", LOCKS)
def test_licences_of_the_locked_packages(lock: str) -> None:
    refused, seen = {}, 0
    for name, requirement in locked(lock):
        try:
            licences = licences_of(name)
        except PackageNotFoundError:
            assert ";" in requirement, f"{name} is locked and not installed: make setup"
            continue
        seen += 1
        if name not in EXCEPTIONS and not licences <= ADMITTED[lock]:
            refused[name] = licences
    assert refused == {}
    assert seen > 50


def test_no_exception_is_left_over() -> None:
    """An exception is for a package that is locked, and that would be refused without it."""
    names = {name for lock in LOCKS for name, _ in locked(lock)}
    assert set(EXCEPTIONS) <= names
    assert [name for name in EXCEPTIONS if licences_of(name) <= ADMITTED["requirements-dev"]] == []
