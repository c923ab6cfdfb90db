import os
import random
from functools import partial
from pathlib import Path

import pytest

from himoe.data.preparation import prepare as preparation
from himoe.data.text import read_source

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "grey", "élan", "猫"]


def make_text(size: int, seed: int = 0) -> str:
    """Lines of random words, about `size` characters; another seed gives another text."""
    choose, lines, length = random.Random(seed), [], 0
    while length < size:
        lines.append(" ".join(choose.choices(WORDS, k=10)))
        length += len(lines[-1]) + 1
    return "\n".join(lines) + "\n"


@pytest.fixture
def text():
    return make_text


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """Every test has a cache of its own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HIMOE_CACHE", str(folder))
    return folder


@pytest.fixture
def two_domains(tmp_path) -> Path:
    """A folder with the domain `verse`, ten files, and the domain `letters`, one file."""
    folder = tmp_path / "text"
    (folder / "verse").mkdir(parents=True)
    for i in range(10):
        (folder / "verse" / f"{i}.txt").write_text(make_text(2000, seed=i), encoding="utf-8")
    (folder / "letters.md").write_text(make_text(30_000, seed=99), encoding="utf-8")
    for file in folder.rglob("*.*"):
        os.utime(file, (10**9, 10**9))  # files that were changed a moment ago are read each time
    return folder


@pytest.fixture
def small_units(monkeypatch):
    """Let units be of about 4 kB, so that a short text is work for several processes; by default one does it."""
    monkeypatch.setattr(preparation, "available_cores", lambda: 1)
    monkeypatch.setattr(preparation, "read_source", partial(read_source, unit_size=4000))


@pytest.fixture(params=["byte", "bpe"])
def spec(request) -> dict:
    return {"tokenizer": request.param, "vocab_size": 300, "held_out": 0.2}
