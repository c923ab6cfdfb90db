"""Run folders for the report's tests."""

from pathlib import Path

import pytest
from fake_run import fake_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fake_run(tmp_path / "lm_demo")
