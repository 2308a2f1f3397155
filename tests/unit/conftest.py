"""What unit tests share."""

import pytest

from config.settings import Settings


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting comes from this machine's environment."""
    for field in Settings.model_fields:
        monkeypatch.delenv(f"TIDEMARK_{field.upper()}", raising=False)
    return monkeypatch
