"""Text for small runs, and one that has finished."""

import os

import pytest
from run_case import config, train


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two small domains, and a cache of prepared data that no other test sees."""
    folder = tmp_path_factory.mktemp("text")
    os.environ["HIMOE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    for domain, words in {"verse": "roses are red", "prose": "it was a dark night; it rained"}.items():
        (folder / domain).mkdir()
        for i in range(30):
            lines = "\n".join(f"{i * k} {words} {k % 7}" for k in range(30))
            (folder / domain / f"{i}.txt").write_text(lines)
    yield folder
    del os.environ["HIMOE_CACHE"]


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """One uninterrupted run, its summary and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    return out, *train(config(text), out, command=["himoe", "train"])
