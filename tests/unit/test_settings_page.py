"""The page of settings says what the program reads."""

from pathlib import Path

from config.settings import Settings
from tests.settings_page import descriptions, settings_page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_page_is_the_one_generated_from_the_settings() -> None:
    assert settings_page() == PAGE.read_text("utf-8"), "run: make docs"


def test_every_setting_is_described() -> None:
    assert [*descriptions()] == [*Settings.model_fields]
