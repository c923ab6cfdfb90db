"""The page on configuration says what the code does."""

import re
from pathlib import Path

import pytest

from himoe.config import load_config
from himoe.config.key_tables import section_tables
from himoe.config.loading import RETIRES

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("section", ["", "data", "model", "moe", "train"])
def test_the_page_holds_the_table_of_every_section(section):
    assert section_tables()[section] in PAGE, "run `python -m himoe.config.key_tables` and paste its tables"


@pytest.mark.parametrize("example", re.findall(r"```toml\n(.*?)```", PAGE, re.S))
def test_the_examples_on_the_page_load(tmp_path, example):
    file = tmp_path / "example.toml"
    file.write_text(example, encoding="utf-8")
    load_config(file)


def test_the_page_lists_the_keys_that_go_together():
    for key in RETIRES:
        row = f"| `{key}` | {', '.join(f'`{other}`' for other in RETIRES[key])} |"
        assert row in PAGE
