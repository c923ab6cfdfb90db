"""docs/run-folder.md names every key that a run folder holds."""

import json
import re
from pathlib import Path

from fake_run import read_lines

PAGE = Path(__file__).parents[2] / "docs" / "run-folder.md"


def documents(run):
    yield from (json.loads((run / name).read_text()) for name in ("env.json", "summary.json"))
    yield from (line for name in ("metrics.jsonl", "load.jsonl") for line in read_lines(run / name))


def keys(value, free=()):
    """Every key of a JSON value but those that a user chooses (domains, auxiliary losses)."""
    if isinstance(value, list):
        return {key for one in value for key in keys(one)}
    if not isinstance(value, dict):
        return set()
    inner = {key for name, one in value.items() for key in keys(one, name in ("domains", "baselines", "aux"))}
    return inner if free else inner | set(value)


def test_the_page_names_every_key(run):
    named = set(re.findall(r"[\w.]+", PAGE.read_text(encoding="utf-8")))
    named |= {word.split(".")[-1] for word in named}
    found = {key for document in documents(run) for key in keys(document)}
    assert {"grad_norm", "held_out_bytes", "concentration", "peak_memory_mib"} <= found
    assert found - named == set()


def test_the_pages_examples_are_json():
    examples = re.findall(r"```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert [sorted(json.loads(example))[:2] for example in examples] == [
        ["aux", "data_wait"],
        ["bits_per_byte", "by_context"],
        ["alarm", "kind"],
        ["layers", "step"],
    ]


def test_the_pages_python_runs(run, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[1]
    (run.parent / "runs").mkdir()
    run.rename(run.parent / "runs" / "lm_demo")
    monkeypatch.chdir(run.parent)
    exec(code, {})
    assert capsys.readouterr().out.startswith("[(50, ")
