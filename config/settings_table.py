"""Prints `docs/settings.md` from the settings object: `python -m config.settings_table > docs/settings.md`."""

import sys

from pydantic.fields import FieldInfo

from config.settings import Settings

_HEAD = """# Settings

Environment variables, read once at start. Generated from `config/settings.py` by `make docs`.

Durations are seconds, and may be fractions.

| variable | default | |
|---|---|---|
"""


def _default(name: str, field: FieldInfo) -> str:
    if name == "data_dir":
        return "`~/.local/state/tidemark`; as root `/var/lib/tidemark`"
    if field.default is None:
        return "none"
    value = field.default
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def settings_table() -> str:
    """The page as Markdown."""
    rows = (
        f"| `TIDEMARK_{name.upper()}` | {_default(name, field)} | {field.description} |\n"
        for name, field in Settings.model_fields.items()
    )
    return _HEAD + "".join(rows)


if __name__ == "__main__":
    sys.stdout.write(settings_table())
