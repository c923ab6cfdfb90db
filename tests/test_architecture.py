"""The house: who may import whom, what answers without torch, that every public name and table entry exists."""

import doctest
import importlib.util
import json
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import himoe
from himoe import registry
from himoe.errors import ConfigError

ROOT = Path(__file__).parent.parent
TORCH_FREE = [
    "himoe",
    "himoe.analysis",
    "himoe.plan",
    "himoe.config",
    "himoe.data",
    "himoe.report",
    "himoe.run_folder",
    "himoe.registry",
    "himoe.errors",
]


def modules():
    names = [info.name for info in pkgutil.walk_packages(himoe.__path__, "himoe.")]
    if importlib.util.find_spec("triton") is None:  # an extra, and for Linux alone
        names = [name for name in names if not name.startswith("himoe.kernels.triton.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def test_rooms_import_only_rooms_below_them():
    command = shutil.which("lint-imports", path=Path(sys.executable).parent) or shutil.which("lint-imports")
    if command is None:
        pytest.skip("import-linter is not installed")
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout


def test_what_must_answer_at_once_imports_no_torch():
    code = "import sys, json, {}; print(json.dumps('torch' in sys.modules))".format(", ".join(TORCH_FREE))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) is False


def test_public_names_resolve():
    assert sorted(himoe.__all__) == dir(himoe) == sorted(set(himoe.__all__))
    for name in himoe.__all__:
        assert getattr(himoe, name) is not None
    with pytest.raises(AttributeError, match="module 'himoe' has no attribute 'MoEE'"):
        _ = himoe.MoEE


def test_every_module_says_what_it_is_and_has_what_it_names():
    assert [m.__name__ for m in modules() if not (m.__doc__ or "").strip()] == []
    missing = [f"{m.__name__}.{n}" for m in modules() for n in getattr(m, "__all__", []) if not hasattr(m, n)]
    assert missing == []


def test_examples_in_docstrings_run():
    results = {m.__name__: doctest.testmod(m, optionflags=doctest.NORMALIZE_WHITESPACE) for m in modules()}
    assert {name: result for name, result in results.items() if result.failed} == {}
    assert sum(result.attempted for result in results.values()) >= 5


@pytest.mark.parametrize(("table", "name"), [(t, n) for t, entries in registry.TABLES.items() for n in entries])
def test_every_table_entry_loads(table, name):
    entry = registry.load(table, name)
    assert callable(entry) and entry.__doc__


def test_a_readers_own_class_loads_by_its_path():
    assert registry.load("balancers", "collections:Counter") is __import__("collections").Counter


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("swich", r"no entry 'swich' in balancers; known: .*; did you mean 'switch'\?"),
        ("nothing_like_it", "no entry 'nothing_like_it' in balancers; known: logit_correction, "),
        ("no_such_package:Mine", "cannot load 'no_such_package:Mine' for balancers: No module named"),
        ("himoe.balance:Mine", "cannot load 'himoe.balance:Mine' for balancers: .* no attribute 'Mine'"),
        ("himoe.balance:", "cannot load 'himoe.balance:'"),
    ],
)
def test_names_that_are_in_no_table_are_named(name, message):
    with pytest.raises(ConfigError, match=message):
        registry.load("balancers", name)
