"""The code on the pages that teach runs as it is printed."""

import re
import shutil
import sys

import pytest
from pages import ROOT, Page

from himoe.cli import main
from himoe.cli.amounts import count
from himoe.plan import model_names, named_shape, parameters
from himoe.sweep import build_table, shipped_names

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a little text to train on, and a cache of its own."""
    monkeypatch.setenv("HIMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    (tmp_path / "text.txt").write_text("".join(f"{i} words, some others, {i * i}\n\n" for i in range(3000)))
    return tmp_path


def page(name, folder):
    """Read a page; its runs learn the little text of the folder, one at a time, and comparisons tune nothing."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = text.replace("--workers 2", "--workers 1").replace("--seeds 3", "--seeds 2 --learning-rate 3e-3")
    return Page(
        re.sub(r"^(himoe (?:train|sweep|compare) .*?)( --out)", r"\1 --data text.txt\2", text, flags=re.M), folder
    )


def test_the_python_of_the_readme_runs(folder):
    assert page("README.md", folder).run(("python",)) == ["python", "python"]


def test_the_page_of_plans_runs_and_shows_what_is_printed(folder, monkeypatch, capsys):
    ran = page("docs/plan.md", folder).run()
    assert [words.split()[1] for words in ran[:-1]] == ["plan"] * 6 and ran[-1] == "python"
    text = (ROOT / "docs/plan.md").read_text(encoding="utf-8")
    monkeypatch.setenv("COLUMNS", "118")
    assert main(["plan", "lm_demo"]) == 0
    shown = text.partition("```text\n$ himoe plan lm_demo\n")[2].partition("```")[0]
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()
    counts = {name: parameters(named_shape(name)) for name in model_names()}
    for name, of in counts.items():
        four = of.total, of.active, of.active_without_input_embedding, of.active_without_embeddings
        assert f"| `{name}` | {' | '.join(map(count, four))} |\n" in text


def test_the_page_of_sweeps_runs_and_names_every_column(folder, monkeypatch):
    monkeypatch.chdir(folder)
    ran = page("docs/sweep.md", folder).run()
    assert ran[0] == "my.toml" and [words.split()[1] for words in ran[1:-1]] == ["sweep"] * 5 and ran[-1] == "python"
    table = build_table(folder / "sweeps/mine")
    assert set(table.runs().column("status").to_pylist()) == {"done"}
    text = (ROOT / "docs/sweep.md").read_text(encoding="utf-8")
    columns = text.partition("## The table")[2]
    assert all(
        f"`{name}`" in columns for name in [*table.runs().column_names, *table.curves().column_names] if "." not in name
    )
    assert all(f"| `{name}` |" in text for name in shipped_names())


def test_the_page_of_the_analysis_runs_and_shows_what_is_printed(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    ran = page("docs/analysis.md", folder).run()
    assert [words.split()[1] for words in ran[1:-1]] == ["analyze"] * 3 + ["recommend"] * 3
    assert (folder / "sweeps/experts/analysis.html").is_file() and (folder / "k4.html").is_file()
    monkeypatch.setenv("COLUMNS", "118")
    capsys.readouterr()
    assert main(["recommend", "sweeps/experts", "--active", "3M"]) == 0
    text = (ROOT / "docs/analysis.md").read_text(encoding="utf-8")
    shown = text.partition("--active 3M\n")[2].partition("```")[0]
    words = re.compile(r"[^\W\d]{2,}")  # numbers may differ in their last digit from machine to machine
    assert [words.findall(line) for line in capsys.readouterr().out.strip().splitlines()] == [
        words.findall(line) for line in shown.strip().splitlines()
    ]


def test_the_howto_of_a_new_balancer_runs(folder):
    ran = page("docs/howto/new-balancer.md", folder).run()
    assert ran[:3] == ["overload.py", "test_overload.py", "python -m pytest -q test_overload.py"]
    assert [words.split()[1] for words in ran[-3:]] == ["list", "train", "check"]
    assert '"overload"' in (folder / "runs/overload/metrics.jsonl").read_text()  # its loss is logged by its name


def test_the_howto_names_files_and_lines_that_are_there():
    text = (ROOT / "docs/howto/new-balancer.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(balance/\w+\.py)`", text):
        assert (ROOT / "src/himoe" / name).exists(), name
    assert "BALANCERS: dict[str, str] = {" in (ROOT / "src/himoe/registry.py").read_text()


def test_the_examples_run(folder, monkeypatch):
    shutil.copytree(ROOT / "examples", folder / "examples")
    monkeypatch.syspath_prepend(str(folder / "examples"))
    ran = page("examples/README.md", folder).run()
    assert len(ran) == 4 and ran[-1] == "python"
    sys.modules.pop("third_party", None), sys.modules.pop("third_party.annealed", None)
    assert len((ROOT / "examples/README.md").read_text().splitlines()) <= 40  # one screen


def test_the_page_of_the_benchmarks_runs_and_names_every_shape(folder):
    from himoe.bench.shapes import FULL, FULL_GPU, SHAPES

    ran = page("docs/benchmarks.md", folder).run()
    assert [words.split()[1:3] for words in ran] == [["bench", "layer"], ["bench", "doctor"]]
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for name, _, _ in FULL:
        shape = SHAPES[name].record()
        assert f"| `{name}` | {', '.join(str(shape[letter]) for letter in 'TDFEK')} |" in text
    assert all(f"`{name}`" in text or name.startswith("qwen3") for name, _, _ in FULL_GPU)


def test_the_page_of_comparisons_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    ran = page("docs/comparison.md", folder).run()
    assert (
        ran[0] == "mine.toml" and [words.split()[1] for words in ran[1:-1]] == ["compare"] * 4 and ran[-1] == "python"
    )
    assert (folder / "comparisons/mine/comparison.html").is_file()
    assert set(build_table(folder / "comparisons/more").runs().column("recipe").to_pylist()) == {
        "switch",
        "quantile",
        "mine",
    }
