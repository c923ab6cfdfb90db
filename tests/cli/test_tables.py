"""What the closing tables and the lists of names say, line by line."""

import io
import json

import pytest
from rich.console import Console

from himoe.cli.catalogue import Entry, entries
from himoe.cli.folders import newest_unfinished
from himoe.cli.tables import print_entries, print_summary
from himoe.errors import RunFolderError

LAYER = {"max_vio_window": 0.1, "max_vio_batch": 0.5, "cv_window": 0.25, "group_mass": 0.26, "concentration": 0.75}
SUMMARY = {
    "status": "finished",
    "step": 400,
    "tokens": 10_240,
    "seconds": 4.0,
    "tokens_per_second": 2560.0,
    "loss": 2.0,
    "bits_per_byte": 1.5,
    "domains": {name: {"bits_per_byte": 1.75, "perplexity": 12.5} for name in ("code", "prose")},
    "layers": [{"layer": 0, **LAYER, "dead_experts": []}, {"layer": 3, **LAYER, "dead_experts": [2, 5]}],
    "best": {"step": 300, "bits_per_byte": 1.375, "evaluations_since": 1},
    "peak_memory_mib": 321.0,
}


def printed(function, *arguments):
    console = Console(file=io.StringIO(), width=80)
    function(console, *arguments)
    return console.file.getvalue().splitlines()


def facts(summary, run):
    return {line.split()[0]: line for line in printed(print_summary, summary, run) if line}


def test_the_best_evaluation_is_named_with_the_way_to_its_checkpoint(tmp_path):
    line = facts(SUMMARY, tmp_path)["best"]
    assert line == "best         step 300, 1.375 bits per byte on the text scored then"
    (tmp_path / "checkpoints" / "step-00000300").mkdir(parents=True)
    assert facts(SUMMARY, tmp_path)["best"].endswith("then (himoe eval … --checkpoint best)")
    for best in (None, {"step": 400, "bits_per_byte": 1.375}):
        assert "best" not in facts({**SUMMARY, "best": best}, tmp_path)


def test_text_without_bytes_has_no_bits_per_byte(tmp_path):
    domains = {"code": {"bits_per_byte": None, "perplexity": 12.5, "unigram": 4.5, "bigram": 3.0}}
    domains["prose"] = {"bits_per_byte": 1.5, "perplexity": 12.5, "unigram": 4.5, "bigram": 3.0}
    lines = facts({**SUMMARY, "bits_per_byte": None, "domains": domains}, tmp_path)
    assert lines["code"].split()[1:] == ["–", "4.500", "3.000", "–", "12.50"]
    assert lines["prose"].split()[1:] == ["1.500", "4.500", "3.000", "50.0", "%", "12.50"]
    assert lines["all"].split()[2:] == ["–", "–", "–", "–", "7.39"]


@pytest.mark.parametrize(("count", "shown", "more"), [(0, 0, False), (1, 1, False), (3, 3, False), (5, 3, True)])
def test_alarms_are_told_again_at_the_end(tmp_path, count, shown, more):
    lines = [{"kind": "train", "step": 1, "text": "no alarm"}]
    lines += [{"kind": "alarm", "step": i, "alarm": "loss_spike", "text": f"[{i}] lower it"} for i in range(count)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = printed(print_summary, SUMMARY, tmp_path)
    assert [line for line in found if line.startswith("alarm")] == [
        f"alarm        [{i}] lower it" for i in range(shown)
    ]
    assert any(f"{count - 3} more alarms" in line for line in found) is more


def test_dead_experts_get_a_column_only_where_there_are_some(tmp_path):
    found = facts(SUMMARY, tmp_path)
    assert found["layer"].endswith("dead") and (found["0"].split()[-1], found["3"].split()[-1]) == ("0", "2")
    assert not facts({**SUMMARY, "layers": SUMMARY["layers"][:1]}, tmp_path)["layer"].endswith("dead")


def test_several_domains_have_a_line_for_all_text(tmp_path):
    assert facts(SUMMARY, tmp_path)["all"].split() == ["all", "text", "1.500", "7.39"]
    one = {"code": SUMMARY["domains"]["code"]}
    assert "all" not in facts({**SUMMARY, "domains": one}, tmp_path)


def test_a_long_status_keeps_the_facts_in_one_column(tmp_path):
    found = facts({**SUMMARY, "status": "stopped by an alarm"}, tmp_path)
    assert found["stopped"].index("step 400") == found["speed"].index("2,560") == found["run"].index(str(tmp_path))


def test_recipes_stand_under_the_one_that_they_lie_over():
    found = entries("recipes")
    places = {entry.name: i for i, entry in enumerate(found)}
    assert {entry.base for entry in found} >= {None, "lm_small", "olmoe_7b"}
    for entry in found:
        if entry.base:
            assert places[entry.base] < places[entry.name]
            between = found[places[entry.base] + 1 : places[entry.name]]
            assert all(other.base for other in between)
    bases = {"a": ("first", None), "a_b": ("over it", "a"), "a_b_c": ("over both", "a_b")}
    table = [Entry(name, text, "", base=base) for name, (text, base) in bases.items()]
    lines = printed(print_entries, {"recipes": table})
    assert [line.rstrip() for line in lines[1:4]] == [
        "  a          first",
        "    a_b      over it",
        "      a_b_c  over both",
    ]
    assert "--dry-run" in lines[-1]


def test_a_run_that_stopped_early_is_not_unfinished(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "a"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    (run / "summary.json").write_text(json.dumps({"status": "stopped early"}))
    with pytest.raises(RunFolderError, match="no unfinished run"):
        newest_unfinished()
    (run / "summary.json").write_text(json.dumps({"status": "stopped by an alarm"}))
    assert newest_unfinished().name == "a"
