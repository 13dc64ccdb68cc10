"""docs/configuration.md is what the table of options says."""

from __future__ import annotations

from pathlib import Path

import pytest

from coding_agent_exporter import config

FILE = Path(__file__).parent.parent / "docs" / "configuration.md"


def test_up_to_date() -> None:
    """The file is the generated text: `make docs` writes it."""
    assert FILE.read_text(encoding="utf-8") == config.markdown()


@pytest.mark.parametrize("option", config.OPTIONS, ids=lambda option: option.name)
def test_complete(option: config.Option) -> None:
    """Every option is there with its flag, its variable and what it does."""
    text = FILE.read_text(encoding="utf-8")
    assert f"### `{option.flag}`\n\n{option.help}\n" in text
    assert f"- Variable: `{option.env}`\n" in text
    assert (f"- TOML: `{option.toml}`\n" in text) == option.in_file
