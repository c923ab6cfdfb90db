import json

import pytest
from fake_run import edit, read_lines, write_lines

from himoe.errors import RunFolderError
from himoe.report import RunFolder, write_report


def test_reads_what_the_files_say(run):
    folder = RunFolder.open(run)
    assert folder.name == "lm_demo"
    assert folder.domains == ["code", "tests", "prose"]
    assert (len(folder.train), len(folder.evals), len(list(folder.load_lines()))) == (30, 6, 30)
    assert folder.outcome == json.loads((run / "summary.json").read_text())
    assert folder.notes == []


@pytest.mark.parametrize("missing", ["config.json", "env.json"])
def test_refuses_a_folder_that_no_run_made(run, missing):
    (run / missing).unlink()
    with pytest.raises(RunFolderError, match=f"holds no {missing}, so it is no run folder"):
        RunFolder.open(run)


@pytest.mark.parametrize("content", ["{", "[1]", "\x00\x01"])
def test_names_a_damaged_document_in_one_line(run, content):
    (run / "config.json").write_text(content)
    with pytest.raises(RunFolderError, match=r"config\.json") as caught:
        RunFolder.open(run)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "why"), [("nowhere", "does not exist"), ("lm_demo/config.json", "holds no config.json")]
)
def test_refuses_what_is_not_a_folder(run, name, why):
    with pytest.raises(RunFolderError, match=f"run folder .*{name} {why}"):
        RunFolder.open(run.parent / name)


@pytest.mark.parametrize("log", ["metrics.jsonl", "load.jsonl"])
def test_skips_a_torn_last_line_without_a_word(run, log):
    path = run / log
    path.write_bytes(path.read_bytes()[:-40])
    folder = RunFolder.open(run)
    loads = list(folder.load_lines())
    expected = (30, 5, 30) if log == "metrics.jsonl" else (30, 6, 29)
    assert (len(folder.train), len(folder.evals), len(loads)) == expected
    assert folder.notes == []


def test_says_so_when_a_line_in_the_middle_is_damaged(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:20]
    lines[7] = "null"
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    folder = RunFolder.open(run)
    assert len(folder.train) + len(folder.evals) == 34
    assert folder.notes == ["metrics.jsonl: 2 damaged lines were skipped."]


def test_without_a_summary_the_last_lines_count(run):
    (run / "summary.json").unlink()
    folder = RunFolder.open(run)
    train, last = folder.train[-1], folder.evals[-1]
    assert folder.outcome["status"] == "unfinished"
    assert folder.outcome["tokens"] == train["tokens"] == 300 * 4096
    assert folder.outcome["bits_per_byte"] == last["bits_per_byte"]
    assert folder.outcome["layers"] == read_lines(run / "load.jsonl")[-1]["layers"]
    assert folder.outcome["parameters"]["total"] == 3_540_000
    assert "has not ended" in folder.notes[0]


def test_a_summary_older_than_the_log_is_not_believed(run):
    edit(run / "summary.json", lambda summary: summary.update(step=100, status="interrupted"))
    assert RunFolder.open(run).outcome["status"] == "unfinished"


def test_a_fresh_run_has_nothing_to_tell(run):
    for name in ("metrics.jsonl", "load.jsonl", "summary.json"):
        (run / name).unlink()
    folder = RunFolder.open(run)
    assert (folder.train, folder.evals, folder.outcome["layers"]) == ([], [], [])
    assert folder.outcome["step"] is None


def test_overall_baseline_weighs_domains_by_bytes(run):
    sizes = {"code": {"held_out_bytes": 100}, "prose": {"held_out_bytes": 300}}
    bits = {"code": {"unigram": 5, "bigram": 3}, "prose": {"unigram": 5, "bigram": 4}}
    scores = {name: {"bytes": size["held_out_bytes"]} for name, size in sizes.items()}
    edit(run / "env.json", lambda env: env.update(baselines=bits, data={"domains": sizes}))
    edit(run / "summary.json", lambda summary: summary.update(domains=scores))
    folder = RunFolder.open(run)
    assert folder.baseline("bigram") == pytest.approx(3.75)
    edit(run / "env.json", lambda env: env["baselines"].pop("prose"))
    assert RunFolder.open(run).baseline("bigram") is None


def test_no_baseline_stands_beside_the_score_of_a_part_of_the_text(run):
    assert set(RunFolder.open(run).baselines) == {"code", "tests", "prose"}
    assert "the bigram model needs" in write_report(run).read_text()
    (run / "summary.json").unlink()
    write_lines(run / "metrics.jsonl", read_lines(run / "metrics.jsonl")[:-1])  # the last evaluation read all of it
    folder = RunFolder.open(run)
    assert (folder.baselines, folder.baseline("bigram")) == ({}, None)
    assert "the bigram model needs" not in write_report(run).read_text()


def test_groups_are_contiguous_unless_listed(run):
    assert RunFolder.open(run).groups(8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    edit(run / "config.json", lambda config: config["moe"].update(groups=[[2, 0], [1, 3, 4]]))
    assert RunFolder.open(run).groups(5) == [[2, 0], [1, 3, 4]]
    edit(run / "config.json", lambda config: config.update(moe={}))
    assert RunFolder.open(run).groups(3) == [[0, 1, 2]]


def test_lines_that_are_no_load_are_left_out(run):
    write_lines(run / "load.jsonl", [{"step": 1}, {"step": 2, "layers": [{"layer": 0}]}, {"step": 3, "layers": []}])
    assert [line["step"] for line in RunFolder.open(run).load_lines()] == [3]
