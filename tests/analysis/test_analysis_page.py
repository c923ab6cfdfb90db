"""The page and the verbs: what a reader gets of a mixed sweep, also where much of it is missing."""

import json
import sys

import pyarrow.parquet as pq
import pytest

from himoe.analysis import read_sweep, study, write_page
from himoe.analysis.page import build_page
from himoe.analysis.runs import from_rows
from himoe.analysis.synthetic import curve, rows, tables
from himoe.cli import main
from himoe.errors import MissingExtraError

EVIL = "<script>alert(1)</script>"


def mixed():
    """A sweep with two presets, a dense model, a grid of α and u, a failed run, and names that are HTML."""
    some = [row | {"moe.preset": "switch", "moe.options.u": None, "moe.options.alpha": None} for row in rows(seeds=2)]
    empty = dict.fromkeys(("num_experts", "top_k", "expert_dim", "granularity", "sparsity", "cv", "max_vio"))
    plain = {"run": "dense", "moe.preset": None, "moe.num_experts": None, "total_parameters": 835_584}
    some.append(some[0] | empty | plain | {"cross_entropy": 4.1})
    for i in range(4):
        alpha, u = ((1e-2, 1e-4)[i % 2], (0.0, 1e-3)[i // 2])
        some.append(some[0] | {"run": f"alpha{i}", "moe.preset": EVIL, "moe.options.alpha": alpha, "moe.options.u": u})
    some[3] |= {"status": "failed", "error": EVIL, "cross_entropy": None}
    return some


def curves(some):
    return [line for row in some if row["status"] == "done" for line in curve(row)]


@pytest.fixture
def folder(tmp_path):
    for name, table in zip(("runs", "curves"), tables(rows(seeds=2)), strict=True):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    return tmp_path


def test_the_page_of_a_mixed_sweep():
    some = mixed()
    page = build_page(study(from_rows("mixed", some, curves(some)), replicates=60))
    text = "".join(page.parts)
    assert EVIL not in text and "&lt;script&gt;" in text
    assert "In no mean" in text or "in no mean" in text
    titles = [part.partition("</h3>")[0] for part in text.split("<h3>")[1:]]
    assert {"Loss against granularity", "Loss against expert count", "Loss against total parameters", "Residuals",
            "Along granularity", "Along sparsity", "Learning curves", "moe.options.alpha × moe.options.u",
            "moe.preset", "Loss beside MaxVio"} <= {title.replace("moe.options.u × moe.options.alpha",
            "moe.options.alpha × moe.options.u") for title in titles}  # fmt: skip
    by_title = dict(zip(titles, page.figures.values(), strict=True))
    against = by_title["Loss against granularity"]
    assert [trace["name"] for trace in against["traces"]] == ["s = 4", "s = 16", "s = 64"]  # the largest variant alone
    assert against["layout"]["annotations"][0]["text"] == "dense"
    heat = next(figure for title, figure in by_title.items() if "alpha × " in title or "× moe.options.alpha" in title)
    assert sum(value is not None for row in heat["traces"][0]["z"] for value in row) == 4


def test_a_sweep_without_a_law_or_sizes_still_has_a_page():
    bare = [{"run": str(i), "status": "done", "seed": 0, "tokens": 10, "cross_entropy": 3.0 + i, "moe.preset": "ab"[i]}
            for i in range(2)]  # fmt: skip
    text = "".join(build_page(study(from_rows("bare", bare))).parts)
    assert "No law was fitted" in text and "preset\N{NO-BREAK SPACE}a" in text


def test_the_page_opens_without_a_request_an_error_or_a_sideways_scroll(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path.__class__(__file__).parents[1] / "report"))
    browser = pytest.importorskip("report_browser")
    if browser.CHROMIUM is None:
        pytest.skip("no Chromium here")
    some = mixed()
    out = write_page(study(from_rows("mixed", some, curves(some))), tmp_path / "a.html")
    with browser.Browser() as window:
        window.open(out, width=390, dark=True)
        assert window.evaluate("document.documentElement.scrollWidth") == 390
        assert {url.split(":")[0] for url in window.requests} <= {"file", "data"} and window.problems == []


def test_the_verbs_print_and_write(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "118")
    assert main(["analyze", str(folder), "--replicates", "60"]) == 0
    printed = capsys.readouterr().out
    assert "18 runs in 9 settings" in printed and "Law of 9 settings, 4 more than its parameters" in printed
    assert "not fitted: alpha, active parameters: active parameters do not vary" in printed
    assert (folder / "analysis.html").read_text().startswith("<!doctype html>")
    assert main(["analyze", str(folder), "--tokens", "5M", "--json", "--out", str(folder / "half.html")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["at"] == "5,000,000 tokens" and len(said["settings"]) == 9 and said["report"].endswith("half.html")
    assert said["law"]["parameters"]["kappa"]["interval"][0] < said["law"]["parameters"]["kappa"]["value"]
    assert main(["recommend", str(folder), "--total", "12M", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["granularity"]["low"] <= said["granularity"]["value"] <= said["granularity"]["high"]
    assert said["spec"].startswith('recipe = "lm_small_switch"') and said["total"] <= 12.01e6
    assert main(["recommend", str(folder)]) == 0 and "To run next" in capsys.readouterr().out
    assert main(["recommend", "--active", "50M"]) == 0
    assert "not your data, model or tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["analyze"], "name the folder of a sweep"),
        (["analyze", "nowhere"], "there is no runs.parquet of a sweep"),
        (["analyze", "DIR", "--tokens", "many"], "--tokens is 'many'; it must be a number above 0"),
        (["analyze", "DIR", "--tokens", "1M", "--flops", "1e9"], "give one of them"),
        (["recommend"], "name a budget"),
        (["recommend", "DIR", "--where", "moe.top_k=4"], "no recommendation, since a law needs at least 5"),
    ],
)
def test_bad_input_is_one_line(folder, arguments, message, capsys):
    words = [str(folder) if word == "DIR" else word for word in arguments]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_missing_package_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"pyarrow is not installed.*himoe\[analysis\]"):
        read_sweep(folder)
    monkeypatch.undo()
    found = study(read_sweep(folder), replicates=60)
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"plotly is not installed.*himoe\[analysis\]"):
        write_page(found, folder / "page.html")
