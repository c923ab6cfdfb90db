import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from himoe.data import Corpus, TokenStream, prepare
from himoe.data.text.embedded import BREAK, HELD_OUT, SHORTEST, docstrings, documents, embedded_source
from himoe.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    return prepare(tokenizer="byte", cache=tmp_path_factory.mktemp("embedded"))


@pytest.fixture(scope="module")
def train(corpus) -> str:
    return "\n".join(text for domain in corpus.domains for text in texts(corpus.train[domain]))


def held_out(corpus: Corpus, domain: str) -> list[str]:
    return texts(corpus.held_out[domain])


def texts(stream: TokenStream) -> list[str]:
    """The documents of bytes, by the ends that follow each."""
    tokens = stream[0 : len(stream)]
    ends = np.flatnonzero(tokens == stream.end_of_document) + 1
    return [part[:-1].astype(np.uint8).tobytes().decode() for part in np.split(tokens, ends[:-1])]


def occurs(text: str, train: str, train_lines: set[str]) -> bool:
    """Say whether `text` stands in `train`; looking its whole lines up first makes this quick."""
    return train_lines.issuperset(text.split("\n")[1:-1]) and text in train


def test_the_three_domains_are_large_enough(corpus):
    assert corpus.name == "embedded"
    assert corpus.domains == ["code", "tests", "prose"]
    for domain in corpus.domains:
        assert corpus.held_out[domain].num_bytes >= HELD_OUT >= 256 * 1024
    assert sum(stream.num_bytes for stream in corpus.train.values()) > 10 * 2**20


def test_the_domains_are_what_their_names_say(corpus):
    code, tests, prose = ("".join(held_out(corpus, domain)) for domain in corpus.domains)
    per_kb = {
        domain: text.count("assert") / len(text) * 1024
        for domain, text in zip(corpus.domains, (code, tests, prose), strict=True)
    }
    assert per_kb["tests"] > 5 * max(per_kb["code"], per_kb["prose"])
    assert code.count("def ") > 500
    assert prose.count("def ") < 100


def test_nothing_held_out_stands_in_the_training_part(corpus, train):
    lines = set(train.split("\n"))
    for domain in corpus.domains:
        texts = held_out(corpus, domain)
        assert [text[:60] for text in texts if occurs(text.strip(), train, lines)] == []
    parts = [part for text in held_out(corpus, "prose") for part in text.split(BREAK) if len(part) >= SHORTEST]
    assert len(parts) > 100
    assert [part[:60] for part in parts if occurs(part.strip(), train, lines)] == []


def test_it_is_the_same_each_time_and_opened_at_once_the_second(corpus, monkeypatch):
    def refuse(_files):
        raise AssertionError("read anew")

    monkeypatch.setattr("himoe.data.text.embedded._read", refuse)
    again = prepare(tokenizer="byte", cache=corpus.folder.parents[1])
    assert again.hash == corpus.hash


def test_its_files_are_found_without_importing_them():
    program = (
        "import sys; from himoe.data.text import embedded_source; embedded_source(); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True).strip() == "False"


def test_a_python_without_tests_of_its_own_takes_those_of_packages(tmp_path, monkeypatch):
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    shutil.copytree(stdlib / "pydoc_data", tmp_path / "pydoc_data")
    for file in stdlib.glob("*.py"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert embedded_source().signature


def test_a_python_without_source_files_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setattr("himoe.data.text.embedded.CODE_PACKAGES", ("no_such_package",))
    with pytest.raises(DataError, match=r"the embedded corpus lacks text for 'code'.*--data PATH"):
        embedded_source()


def test_docstrings_and_attached_documentation_are_found():
    module = '''
"""Module."""
class A:
    """Class."""
    async def f(self):
        """
        Method.

            indented


        end
        """
        return "no documentation"
g = _add_docstr(h, r"""attached {x}""".format(x="argument") + "more")
add_newdoc("numpy", "ndarray", "third")
topics = {"assert": "topic"}
other = {"key": "no documentation"}
'''
    found = list(docstrings(module))
    assert found[:3] == ["Module.", "Class.", "Method.\n\n    indented\n\nend"]
    assert {"attached {x}", "more", "third", "topic"} < set(found)
    assert "no documentation" not in found
    assert list(docstrings("def broken(")) == []


def lines(name: str, count: int) -> str:
    return "".join(f"{name}: line number {name}{i} of a text all its own\n" for i in range(count))


def test_copies_parts_and_tables_are_left_out():
    table = "".join(f"value_{i} = {i * 7919 % 100003}, {i}, {i * i}, 0x{i:08x}, {i**3}\n" for i in range(100))
    texts = {
        "code": [lines("a", 40), lines("a", 10), lines("b", 20), table, "x = 1\n"],
        "tests": [lines("c", 30) + lines("b", 12), lines("a", 40)],
        "prose": [f'"""{lines("a", 30)}"""', f'"""{lines("d", 30)}"""', f'"""{lines("d", 30)}"""'],
    }
    found = documents(texts)
    assert found == {
        "code": [lines("a", 40)],
        "tests": [lines("c", 30) + lines("b", 12)],
        "prose": [lines("d", 30).strip()],
    }
