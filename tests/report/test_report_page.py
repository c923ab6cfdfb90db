import json
import re
import subprocess
import sys

import pytest
from fake_run import ROLES, alarm, as_first_version, edit, fake_run, read_lines, write_lines

from himoe.errors import MissingExtraError, RunFolderError
from himoe.report import write_report
from himoe.report.numbers import count, duration, saved, show, size


@pytest.fixture(scope="module")
def plotly_js():
    offline = pytest.importorskip("plotly.offline")
    return offline.get_plotlyjs()


@pytest.fixture
def page(plotly_js):
    """Return a function that writes a run's report and returns its HTML without the library."""

    def read(run):
        html = write_report(run).read_text(encoding="utf-8")
        assert html.count(plotly_js) == 1
        return html.replace(plotly_js, "")

    return read


def figures(html):
    return json.loads(re.search(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)[1])


def titled(html, title):
    """Return the figure in the card with this heading."""
    key = re.search(rf"<h3>{re.escape(title)}</h3>.*?id=(chart-\d+)", html, re.S)[1]
    return figures(html)[key]


def test_it_is_one_file_and_nothing_is_left_beside_it(run, tmp_path):
    before = {path.name for path in run.iterdir()}
    assert write_report(run) == run / "report.html"
    assert write_report(run, tmp_path / "new" / "page.html").is_file()
    assert {path.name for path in run.iterdir()} - before == {"report.html"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_it_can_ask_nobody_for_anything(run, page):
    html = page(run)
    assert "default-src 'none'" in html
    assert re.findall(r"url\(|@import|(?:https?:)?//[\w.-]+\.\w|<(?:iframe|img|object|embed|form)\b", html) == []
    assert re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"' >]*)", html) == ["data:,"]


def test_it_shows_the_key_numbers(run, page):
    html = page(run)
    summary = json.loads((run / "summary.json").read_text())
    env = json.loads((run / "env.json").read_text())
    pairs = [(one["held_out_bytes"], env["baselines"][name]["bigram"]) for name, one in env["data"]["domains"].items()]
    bigram = sum(a * b for a, b in pairs) / sum(a for a, _ in pairs)
    for text in (
        "3.54M parameters",
        "1.57M active",
        "1.23M tokens",
        "finished",
        f"{summary['bits_per_byte']:.3f}",
        f"{100 * (1 - summary['bits_per_byte'] / bigram):.1f} %",
        f"{summary['max_vio_window']:.3f}",
        f"{summary['cv_window']:.3f}",
        "7,123",
        "himoe train lm_demo --set train.steps=300",
        env["data"]["hash"],
    ):
        assert text in html


def test_every_layer_has_a_heat_map_on_the_same_scale_with_named_groups(run, page):
    html = page(run)
    maps = [titled(html, f"Layer {i}") for i in range(4)]
    for figure in maps:
        (trace,) = figure["traces"]
        assert (trace["zmin"], trace["zmax"]) == (0, 2)
        assert trace["colorscale"][2] == [0.5, "--load-fair"]
        assert (len(trace["z"]), len(trace["z"][0]), len(trace["x"])) == (16, 30, 31)
        assert [line["y0"] for line in figure["layout"]["shapes"]] == [3.5, 7.5, 11.5]
        assert figure["layout"]["yaxis"]["ticktext"][1] == "group 1<br>4–7"
    load = read_lines(run / "load.jsonl")[4]["layers"][2]["load"]
    shown = [row[4] for row in maps[2]["traces"][0]["z"]]
    assert shown == pytest.approx([one * 16 / sum(load) for one in load], rel=0.01)


def test_unequal_groups_stand_together(run, page):
    groups = [[3, 0], [1, 2, *range(4, 16)]]
    edit(run / "config.json", lambda config: config["moe"].update(groups=groups, num_groups=2))
    html = page(run)
    figure = titled(html, "Layer 0")
    load = read_lines(run / "load.jsonl")[0]["layers"][0]["load"]
    assert figure["traces"][0]["z"][0][0] == pytest.approx(load[3] * 16 / sum(load), rel=0.01)
    assert figure["traces"][0]["text"][0][0] == "3"
    assert [line["y0"] for line in figure["layout"]["shapes"]] == [1.5]
    assert figure["layout"]["yaxis"]["ticktext"] == ["group 0<br>3, 0", "group 1<br>1, 2, 4, 5 …"]
    levels = [line["y0"] for line in titled(html, "C: inside a group")["layout"]["shapes"]]
    assert levels == pytest.approx([(1 / 2 + 1 / 14) / 2, 1])


def test_group_mass_and_concentration_have_their_bounds(run, page):
    html = page(run)
    for title in ("Σm²: between the groups", "C: inside a group"):
        figure = titled(html, title)
        assert [line["y0"] for line in figure["layout"]["shapes"]] == [0.25, 1.0]
        assert [trace["name"] for trace in figure["traces"]] == [f"layer {i}" for i in range(4)]


def test_dropped_pairs_are_shown_where_there_are_some(run, page):
    assert "Dropped" not in page(run)
    lines = read_lines(run / "load.jsonl")
    lines[3]["layers"][1]["drop_rate"] = 0.375
    write_lines(run / "load.jsonl", lines)
    edit(run / "summary.json", lambda summary: summary["layers"][2].update(drop_rate=0.625))
    html = page(run)
    assert titled(html, "Dropped pairs")["traces"][1]["y"][2:5] == [0, 0.375, 0]
    assert "<th scope=col>Dropped</th>" in html and "<td>0.625</td></tr>" in html


def test_a_varying_number_of_experts_is_shown_and_what_a_limit_cuts_off(run, page):
    html = page(run)
    assert "Experts per token" not in html and "Cut off" not in html and "top 4" in html
    lines = read_lines(run / "load.jsonl")
    lines[2]["layers"][0]["experts_per_token"] = 3.25
    lines[3]["layers"][1]["truncated_mass"] = 0.125
    write_lines(run / "load.jsonl", lines)
    edit(run / "summary.json", lambda summary: summary["layers"][2].update(experts_per_token=3.625))
    html = page(run)
    assert titled(html, "Experts per token")["traces"][0]["y"][1:4] == [4, 3.25, 4]
    assert titled(html, "Cut off by max_k")["traces"][1]["y"][2:5] == [0, 0.125, 0]
    assert "<th scope=col>Experts per token</th>" in html and "<td>3.625</td>" in html
    assert "16 experts in 4 groups, a varying number per token" in html


@pytest.mark.parametrize(
    ("moe", "text"),
    [
        ({"preset": "moge"}, "16 experts in 4 groups, top 4"),
        ({"preset": None, "selector": "top_k_per_group"}, "16 experts in 4 groups, top 4"),
        ({"preset": "switch"}, "16 experts (measured in 4 groups), top 4"),
        ({"preset": "switch", "num_groups": 1}, "16 experts, top 4"),
    ],
)
def test_groups_are_the_routers_only_where_it_chooses_by_group(run, page, moe, text):
    edit(run / "config.json", lambda config: config["moe"].update(moe))
    assert text in page(run)


def test_scores_of_more_text_stand_apart_from_the_curve(run, page):
    names = [trace["name"] for trace in titled(page(run), "Cross-entropy")["traces"]]
    assert names[:4] == ["training", "code", "tests", "prose"]
    assert names[4:] == ["code, all text", "tests, all text", "prose, all text"]


def test_alarms_stand_at_the_top_with_their_step_and_what_to_do(run, page):
    html = page(run)
    box = html.split('<div class="alarms">')[1].split("</div>")[0]
    assert (
        "An alarm went off" in box and "<b>Step 20: dead experts</b>" in box and "raise the weight of the loss" in box
    )
    assert html.index('class="alarms"') < html.index('class="tiles"')
    lines = read_lines(run / "metrics.jsonl")
    write_lines(run / "metrics.jsonl", [*lines, *(alarm(280 + i, "loss_spike", None, f"<i>{i}") for i in range(7))])
    html = page(run)
    assert "8 alarms went off" in html and "<summary>3 more</summary>" in html
    assert html.count("loss spike") == 7 and "&lt;i&gt;6" in html
    write_lines(run / "metrics.jsonl", [line for line in lines if line["kind"] != "alarm"])
    assert 'class="alarms"' not in page(run)


def test_what_training_measured_beside_the_loss_is_drawn(run, page):
    html = page(run)
    for which in ("Gradient", "Weight"):
        assert [trace["name"] for trace in titled(html, f"{which} norm by role")["traces"]] == list(ROLES)
    assert titled(html, "Gradient norm by role")["traces"][3]["y"][0] == 0.5
    noise = titled(html, "Gradient noise scale")
    assert noise["traces"][0]["y"][:4] == [None, None, None, 28]
    assert noise["layout"]["shapes"][0]["y0"] == 16
    assert titled(html, "Waiting for data")["layout"]["yaxis"]["tickformat"] == ".1%"
    assert "0.2\N{NO-BREAK SPACE}% of the time waiting for data" in html


def test_the_best_evaluation_is_named_unless_the_run_ended_with_it(run, page):
    html = page(run)
    assert "Best along the way" in html and "bits per byte at step 150" in html and "1.875" in html
    (mark,) = titled(html, "Bits per byte on held-out text")["layout"]["shapes"]
    assert mark["x0"] == 150 * 4096
    edit(run / "summary.json", lambda summary: summary["best"].update(step=300))
    html = page(run)
    assert "Best along the way" not in html
    assert "shapes" not in titled(html, "Bits per byte on held-out text")["layout"]


def test_scores_by_context_and_by_length_are_bars(run, page):
    html = page(run)
    (trace,) = titled(html, "By context")["traces"]
    bits = read_lines(run / "metrics.jsonl")[-1]["bits_per_byte"]
    assert (trace["type"], trace["x"]) == ("bar", ["16", "64", "256"])
    assert trace["y"] == pytest.approx([bits, bits - 0.1, bits - 0.2], rel=1e-4)
    assert titled(html, "By length of the document")["traces"][0]["x"][-1] == "16,384"
    lines = read_lines(run / "metrics.jsonl")
    lines[-1]["by_context"] = lines[-1]["by_context"][:1]
    write_lines(run / "metrics.jsonl", lines)
    assert "<h3>By context</h3>" not in page(run)


def test_dead_experts_are_named_by_layer(run, page):
    assert "Dead experts" not in page(run)
    edit(run / "summary.json", lambda summary: summary["layers"][1].update(dead_experts=[3, 5]))
    assert "<th scope=col>Dead experts</th>" in (html := page(run))
    assert "<td>3, 5</td></tr>" in html and "<td>–</td></tr>" in html


def test_a_folder_of_the_first_version_is_still_read(run, page):
    html = page(as_first_version(run))
    assert "Cross-entropy" in html and "Tokens per second" in html and "Balance by layer" in html
    for title in ("alarm", "by role", "noise", "Waiting", "waiting", "Best along", "by length", "Effective"):
        assert title not in html.split("<body>")[1].split("<script")[0]


@pytest.mark.parametrize(
    ("status", "note"),
    [("stopped early", "no longer became better"), ("stopped by an alarm", "An alarm stopped this run")],
)
def test_why_a_run_ended_is_said(run, page, status, note):
    edit(run / "summary.json", lambda summary: summary.update(status=status))
    html = page(run)
    assert note in html and f">{status}</span>" in html


def test_user_text_is_escaped_everywhere(tmp_path, page):
    domains = ("<script>alert(1)</script>", 'a" onload="x', "<b>&")
    run = fake_run(tmp_path / "run", domains=domains)
    edit(run / "config.json", lambda config: config.update(name="</title><script>x"))
    edit(run / "env.json", lambda env: env.update(command=["<i>"], cpu="<script>", resumed=[{"step": "<s>"}]))
    html = page(run)
    assert len(re.findall(r"<script\b", html)) == 3  # data, library, page.js
    assert not re.search(r"<(?:b>&|i>'|s>)|onload=\"x", html.split("<body>")[1].split("<script")[0])
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert titled(html, "Cross-entropy")["traces"][1]["name"] == "&lt;script&gt;alert(1)&lt;/script&gt;"


def no_evaluation(run):
    write_lines(run / "metrics.jsonl", [line for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"])
    (run / "summary.json").unlink()


def no_load(run):
    (run / "load.jsonl").unlink()
    edit(run / "summary.json", lambda summary: summary.update(layers=[], max_vio_window=None, cv_window=None))


def interrupted(run):
    edit(run / "summary.json", lambda summary: summary.update(status="interrupted", bits_per_byte=None, domains={}))


def killed_at_once(run):
    for name in ("metrics.jsonl", "load.jsonl", "summary.json"):
        (run / name).unlink()


def one_group(run):
    edit(run / "config.json", lambda config: config["moe"].update(num_groups=1, preset=None))


@pytest.mark.parametrize(
    ("change", "shown", "hidden"),
    [
        (no_evaluation, "Load of the experts", "Held-out text by domain"),
        (no_load, "Held-out text by domain", "Load of the experts"),
        (interrupted, "This run was interrupted", "Held-out bits per byte"),
        (killed_at_once, "Nothing is recorded yet", "Learning"),
        (one_group, "1/16: all experts alike", "Σm²: between"),
    ],
)
def test_what_is_not_there_is_left_out(run, page, change, shown, hidden):
    change(run)
    html = page(run)
    assert shown in html
    assert hidden not in html
    assert "Run it again" in html
    assert "None" not in re.sub(r"<pre>.*?</pre>", "", html.split("<body>")[1].split("<script")[0], flags=re.S)


def test_a_single_step_is_shown_as_points(tmp_path, page):
    html = page(fake_run(tmp_path / "run", steps=1))
    assert titled(html, "MaxVio, window")["traces"][0]["mode"] == "markers"
    assert titled(html, "Layer 0")["traces"][0]["x"] == [0, 1]


def test_a_long_run_stays_small_and_keeps_the_band(tmp_path, page):
    short, long = page(fake_run(tmp_path / "short")), page(fake_run(tmp_path / "long", steps=40_000))
    assert len(long) < 600_000
    assert "The band spans" in long
    assert "The band spans" not in short


def test_many_layers_are_told_apart_by_a_ramp(run, page):
    lines = read_lines(run / "load.jsonl")
    for line in lines:
        line["layers"] = [{**line["layers"][0], "layer": i} for i in range(14)]
    write_lines(run / "load.jsonl", lines)
    figure = titled(page(run), "MaxVio, batch")
    assert figure["layout"]["showlegend"] is False
    assert [figure["traces"][i]["line"]["color"] for i in (0, 13)] == ["ramp:0.000", "ramp:1.000"]


def test_without_plotly_it_says_which_extra_brings_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtraError, match=r"himoe\[report\]"):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_place_that_cannot_be_written_is_one_line(run):
    for out in (run, run / "config.json" / "page.html"):
        with pytest.raises(RunFolderError, match="cannot write the report to") as caught:
            write_report(run, out)
        assert "\n" not in str(caught.value)
    assert not list(run.parent.glob("*.tmp"))


def test_it_needs_no_torch(run):
    code = (
        "import sys; sys.modules['torch'] = None; from pathlib import Path;"
        " from himoe.report import write_report; write_report(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (count(950), "950"),
        (count(12_345), "12.3k"),
        (count(999_960), "1,000k"),
        (count(4_100_000), "4.1M"),
        (count(1.05e9), "1.05B"),
        (count(None), "–"),
        (size(1000), "1000 bytes"),
        (size(1_024_000), "1,000 KiB"),
        (size(3 * 2**30), "3 GiB"),
        (duration(42.4), "42 s"),
        (duration(192), "3 min 12 s"),
        (duration(7500), "2 h 5 min"),
        (saved(2.0, 4.0), "50.0 %"),
        (saved(5.0, 4.0), "−25.0 %"),
        (saved(5.0, None), "–"),
        (show(float("nan")), "–"),
    ],
)
def test_numbers_read_as_people_write_them(shown, text):
    assert shown.replace("\N{NO-BREAK SPACE}", " ") == text


def test_dashed_lines_are_spoken_of_where_there_are_some(run):
    def speaks():
        return "Dashed: the byte-bigram model" in write_report(run).read_text(encoding="utf-8")

    assert speaks()
    edit(run / "env.json", lambda env: env.pop("baselines"))
    assert not speaks()
