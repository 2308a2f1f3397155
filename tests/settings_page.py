"""Prints `docs/settings.md` from the source of the settings: `python -m tests.settings_page > docs/settings.md`."""

import ast
import inspect
import sys
from itertools import pairwise

from config import settings
from config.settings import Settings

_HEAD = """# Settings

Environment variables, read once at start. Generated from `config/settings.py` by `make docs`.

Durations are seconds, and may be fractions.

| variable | default | |
|---|---|---|
"""


def descriptions() -> dict[str, str]:
    """The text below each field. The program itself does without: to find it at run time costs 50 ms."""
    [kind] = [node for node in ast.parse(inspect.getsource(settings)).body if getattr(node, "name", "") == "Settings"]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(ast.iter_child_nodes(kind))
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def settings_page() -> str:
    """The page as Markdown."""
    rows = (f"| `TIDEMARK_{name.upper()}` | {_default(name)} | {text} |\n" for name, text in descriptions().items())
    return _HEAD + "".join(rows)


def _default(name: str) -> str:
    if name == "data_dir":
        return "`~/.local/state/tidemark`; as root `/var/lib/tidemark`"
    value = Settings.model_fields[name].default
    if value is None:
        return "none"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


if __name__ == "__main__":
    sys.stdout.write(settings_page())
