"""Tidemark is an application; `tidemark` on the public index is somebody else's."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_distribution_has_a_name_of_its_own_and_stays_private() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == "tidemark-sequencer"
    assert "Private :: Do Not Upload" in project["classifiers"]  # the index refuses such a one


def test_no_message_has_anybody_install_the_other_program() -> None:
    files = [path for top in ("config", "db", "tasks") for path in (ROOT / top).rglob("*") if path.is_file()]
    says = [path for path in files if b"pip install tidemark" in path.read_bytes()]
    assert [path for path in says if path.suffix != ".pyc"] == []
