"""What `himoe eval` hands on, and what it prints of the result; the evaluation itself is a stand-in."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from himoe.cli import main
from himoe.config import load_config


def bucket(first, last, bits, tokens):
    return {"from": first, "to": last, "loss": bits, "bits_per_byte": bits, "tokens": tokens, "bytes": tokens}


def layer(index, vio, **more):
    record = {"layer": index, "load": [3, 1, 0, 0], "drop_rate": 0.0, "max_vio_global": vio, "cv_global": 0.25}
    return {**record, "effective_experts": 1.75, "normalized_entropy": 0.5, "dead_experts": [2, 3], **more}


INFORMATION = {"domain_information": 0.5, "domain_information_maximum": 1.0, "domain_information_floor": 0.125}
RESULT = {
    "run": "runs/a",
    "checkpoint": "step-00000020",
    "step": 20,
    "weights": "averaged",
    "seq_len": 256,
    "domains": {
        "code": {"bits_per_byte": 1.75, "perplexity": 12.0, "loss": 2.48, "layers": [layer(1, 0.5)]},
        "[prose]": {"bits_per_byte": 2.0, "perplexity": 14.0, "loss": 2.6, "layers": [layer(1, 2.0)]},
    },
    "loss": 2.5,
    "bits_per_byte": 1.8,
    "by_context": [bucket(0, 16, 2.5, 25), bucket(17, 64, 1.5, 75)],
    "by_length": [bucket(65, 256, 1.875, 100)],
    "layers": [layer(1, 1.0, **INFORMATION)],
}


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Put a stand-in for the evaluation in place, in a folder with one run; return what it is called with."""
    made = SimpleNamespace(result=dict(RESULT), given=None)

    def evaluate(run, **given):
        made.given = {"run": run, **given}
        given["console"].print("progress")
        return made.result

    monkeypatch.setitem(sys.modules, "himoe.trained", SimpleNamespace(evaluate=evaluate))
    monkeypatch.chdir(tmp_path)
    run = Path("runs/a")
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(load_config("lm_tiny").model_dump(mode="json")), encoding="utf-8")
    return made


def test_everything_is_handed_on(calls):
    options = ["--data", "chats.parquet", "--text-column", "body", "--domain-column", "topic", "--seq-len", "512"]
    assert main(["eval", "runs/a", *options, "--checkpoint", "best", "--no-ema"]) == 0
    del calls.given["console"]
    assert calls.given == {
        "run": Path("runs/a"),
        "data": Path("chats.parquet"),
        "text_column": "body",
        "domain_column": "topic",
        "checkpoint": "best",
        "ema": False,
        "seq_len": 512,
    }


def test_nothing_given_is_the_runs_own_text_with_the_averaged_weights(calls):
    assert main(["eval", "runs/a"]) == 0
    assert (calls.given["data"], calls.given["checkpoint"], calls.given["seq_len"]) == (None, None, None)
    assert calls.given["ema"] is True


def test_several_texts_are_domains(calls):
    assert main(["eval", "runs/a", "--data", "de=german.txt", "--data", "fr=b=c.jsonl"]) == 0
    assert calls.given["data"] == {"de": Path("german.txt"), "fr": Path("b=c.jsonl")}
    assert main(["eval", "runs/a", "--data", "de=german.txt"]) == 0
    assert calls.given["data"] == {"de": Path("german.txt")}


def test_a_file_with_an_equals_sign_in_its_name_is_a_file(calls):
    Path("a=b.txt").touch()
    assert main(["eval", "runs/a", "--data", "a=b.txt"]) == 0
    assert calls.given["data"] == Path("a=b.txt")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "a.txt", "--data", "b.txt"], "several --data need names"),
        (["--data", "a=a.txt", "--data", "b.txt"], "several --data need names"),
        (["--data", "a=a.txt", "--data", "a=b.txt"], "--data a=… : every NAME=PATH needs a name of its own"),
        (["--data", "=a.txt"], "needs a name of its own"),
        (["--data", "a="], "--data 'a=' names no path"),
        (["--data", ""], "--data '' names no path"),
        (["--data", "a=a.txt", "--domain-column", "topic"], "--domain-column: several --data are one domain each"),
        (["--domain-column", "topic"], "are of the text at --data"),
        (["--text-column", "body"], "are of the text at --data"),
    ],
)
def test_what_does_not_fit_is_one_line(calls, capsys, arguments, complaint):
    assert main(["eval", "runs/a", *arguments]) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1
    assert calls.given is None


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_the_tables_say_what_was_scored_and_how_well(calls, capsys):
    assert main(["eval", "runs/a"]) == 0
    text = capsys.readouterr().out
    found = rows(text)
    assert "runs/a, step-00000020, averaged weights, 256 tokens at once" in text
    assert found["code"] == ["1.750", "12.00"]
    assert "bigram" not in text  # unknown for other text
    assert found["0–16"] == ["2.500", "25", "%", "–"]
    assert found["17–64"] == ["1.500", "75", "%", "–"]
    assert found["65–256"] == ["–", "1.875", "100", "%"]
    assert found["1"] == ["1.000", "0.250", "1.8", "2", "[prose]", "2.000", "0.500", "0.125"]
    assert "at most 1.00" in text
    assert max(map(len, text.splitlines())) <= 80


def test_one_domain_a_short_text_and_no_experts_need_fewer_tables(calls, capsys):
    domain = {"code": {**RESULT["domains"]["code"], "layers": [layer(1, 1.0)]}}
    calls.result |= {"domains": domain, "weights": "trained", "layers": [layer(1, 1.0, **dict.fromkeys(INFORMATION))]}
    calls.result |= {"by_context": [bucket(0, 16, 2.5, 9)], "by_length": [bucket(0, 16, 2.5, 9)]}
    assert main(["eval", "runs/a"]) == 0
    text = capsys.readouterr().out
    assert rows(text)["1"] == ["1.000", "0.250", "1.8", "2"]
    assert "averaged" not in text and "by number of tokens" not in text and "worst domain" not in text
    calls.result["layers"] = []
    assert main(["eval", "runs/a"]) == 0
    assert "experts" not in capsys.readouterr().out


def test_json_is_everything_and_progress_goes_to_stderr(calls, capsys):
    assert main(["eval", "runs/a", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == RESULT
    assert err == "progress\n"
