"""The page on configuration says what the code does."""

import re
from pathlib import Path

import pytest

from himoe.config import Config, load_config
from himoe.config.key_tables import section_tables
from himoe.config.loading import RETIRES
from himoe.errors import ConfigError

SMALL = load_config("lm_tiny").model_dump()
PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("section", ["", "data", "model", "moe", "train"])
def test_the_page_holds_the_table_of_every_section(section):
    assert section_tables()[section] in PAGE, "run `python -m himoe.config.key_tables` and paste its tables"


ROWS = dict(re.findall(r"^\| `([a-z_.]+)` \| .*? \| (.*?) \| .* \|$", PAGE, re.M))  # what is allowed, by key
BOUND = r"([≥>≤<]) (-?[\d.]+)"


def bounds_by_trying(key: str) -> set[tuple[str, float]]:
    """Return the bounds that `Config` names when a key is given numbers of all sizes, alone, in lists and tables."""
    section, _, name = key.rpartition(".")
    found = set()
    for number in (-(10**6), -1e6, 0, 0.0, 1, 1.0, 1e6, 10**6, 2**63):
        for value in (number, [number], [number, number], [[number]], {"a": number}):
            tree = {**SMALL, section: {**SMALL[section], name: value}} if section else {**SMALL, name: value}
            try:
                Config.model_validate(tree)
            except ConfigError as error:
                lines = [line for line in str(error).splitlines() if line.strip().startswith(key)]
                found |= set(re.findall(rf": must be {BOUND}$", "\n".join(lines), re.M))
    return {(sign, float(bound)) for sign, bound in found} - {("≤", 2**31 - 1)}  # the page says that one once


@pytest.mark.parametrize("key", ROWS)
def test_the_page_tells_every_bound_and_no_other(key):
    told = re.findall(BOUND, ROWS[key].replace("2⁶³", str(2**63)))
    assert bounds_by_trying(key) == {(sign, float(bound)) for sign, bound in told}


def test_the_rows_of_keys_that_may_be_none_or_hold_numbers():
    assert len(ROWS) > 60
    assert ROWS["train.ema_decay"] == "number or none, > 0, < 1"
    assert ROWS["train.betas"] == "list of 2 numbers, ≥ 0, < 1"
    assert ROWS["data.weights"] == "table of numbers or none, ≥ 0"


@pytest.mark.parametrize("example", re.findall(r"```toml\n(.*?)```", PAGE, re.S))
def test_the_examples_on_the_page_load(tmp_path, example):
    file = tmp_path / "example.toml"
    file.write_text(example, encoding="utf-8")
    load_config(file)


def test_the_page_lists_the_keys_that_go_together():
    for key in RETIRES:
        row = f"| `{key}` | {', '.join(f'`{other}`' for other in RETIRES[key])} |"
        assert row in PAGE
