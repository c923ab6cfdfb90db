"""A console that says nothing."""

import io

import pytest
from rich.console import Console


@pytest.fixture
def console():
    """What a sweep prints; a test reads it with `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=200)
