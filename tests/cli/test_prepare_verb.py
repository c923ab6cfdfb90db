"""`himoe prepare` from the command line: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import normalizers

from himoe.cli import main
from himoe.config import load_config
from himoe.data import BPETokenizer, prepare


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working directory with a folder of text, and a cache of its own."""
    monkeypatch.setenv("HIMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    for domain, words in {"verse": "roses are red", "prose": "it was [b]a dark night[/b]"}.items():
        (tmp_path / "text" / domain).mkdir(parents=True)
        for i in range(12):
            lines = [f"{i * k} {words} {k}" for k in range(40)]
            (tmp_path / "text" / domain / f"{i}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def run(capsys, *arguments):
    status = main(["prepare", *arguments])
    found = capsys.readouterr()
    assert found.err == "" or status
    return status, found.out + found.err


def test_it_prints_what_was_prepared_and_how_to_train_on_it(capsys):
    status, printed = run(capsys, "text", "--tokenizer", "byte", "--held-out", "0.2")
    assert status == 0
    lines = printed.splitlines()
    assert lines[0].split() == ["domain", "documents", "text", "tokens", "bytes/token", "held", "out"]
    assert [line.split()[:2] for line in lines[1:3]] == [["prose", "12"], ["verse", "12"]]
    assert "himoe train --data text --data.tokenizer byte --data.held-out 0.2" in printed
    assert all(len(line) <= 80 for line in lines if not line.startswith("folder"))


def test_training_finds_what_was_prepared(capsys, place):
    """The defaults are those of `himoe train`, so its corpus is the same one."""
    status, printed = run(capsys, "text", "--json", "--vocab-size", "300")
    folder = json.loads(printed)["folder"]
    data = load_config(None, overrides={"data": {"path": "text", "vocab_size": 300}}).data
    corpus = prepare(place / "text", vocab_size=data.vocab_size, tokenizer=data.tokenizer, held_out=data.held_out)
    assert (status, str(corpus.folder)) == (0, folder)


def test_json_holds_the_counts(capsys):
    status, printed = run(capsys, "text", "--tokenizer", "byte", "--json", "--inspect")
    found = json.loads(printed)
    assert (status, found["name"], list(found["domains"])) == (0, "text", ["prose", "verse"])
    verse = found["domains"]["verse"]
    size = sum(Path(f"text/verse/{i}.txt").stat().st_size for i in range(12))
    assert verse["train"]["bytes"] + verse["held_out"]["bytes"] == size
    assert verse["train"]["tokens"] == verse["train"]["bytes"] + verse["train"]["documents"]
    assert len(verse["samples"]) == 2 and all("roses are red" in sample for sample in verse["samples"])
    assert verse["bytes_per_token"] == 1


def test_samples_are_shown_as_they_are(capsys):
    status, printed = run(capsys, "text", "--tokenizer", "byte", "--inspect")
    assert status == 0
    assert "0 it was [b]a dark night[/b] 1\n" in printed
    assert "held out     0.02 of the documents" in printed


def test_a_folder_of_its_own_is_opened_as_it_is(capsys):
    assert run(capsys, "text", "--tokenizer", "byte", "--out", "made")[0] == 0
    assert Path("made/corpus.json").is_file()
    Path("text").rename("away")
    status, printed = run(capsys, "made", "--verify")
    assert status == 0 and "every byte as written" in printed and "himoe train --data made" in printed
    for option, named in (
        (["--tokenizer", "byte"], "--tokenizer"),
        (["--out", "other"], "--out"),
        (
            ["--held-out", "0.1"],
            "--held-out",
        ),
    ):
        status, printed = run(capsys, "made", *option)
        assert status == 2 and f"made is prepared already, as it is: leave {named} out" in printed


@pytest.mark.parametrize("way", ["file", "set", "argument"])
def test_a_prepared_folder_is_opened_as_it_is_however_it_is_named(capsys, way):
    run(capsys, "text", "--tokenizer", "byte", "--out", "made")
    Path("my.toml").write_text('[data]\npath = "made"\n', encoding="utf-8")
    named = {"file": ["--recipe", "my.toml"], "set": ["--set", "data.path=made"], "argument": ["made"]}[way]
    train = {"file": "my.toml", "set": "--set data.path=made", "argument": "--data made"}[way]
    status, printed = run(capsys, *named, "--json")
    assert status == 0 and json.loads(printed)["train"] == f"himoe train {train}"
    assert json.loads(printed)["folder"] == "made"
    for option, value in (("--out", "other"), ("--tokenizer", "bpe"), ("--held-out", "0.5"), ("--workers", "2")):
        for dry in ([], ["--dry-run"]):
            status, printed = run(capsys, *named, option, value, *dry)
            assert status == 2 and f"made is prepared already, as it is: leave {option} out, or prepare" in printed
    assert not Path("other").exists()


def test_a_configuration_that_asks_for_another_tokenizer_than_a_prepared_folder_has_is_refused(capsys):
    run(capsys, "text", "--vocab-size", "300", "--out", "made")
    Path("my.toml").write_text('[data]\npath = "made"\ntokenizer = "byte"\n', encoding="utf-8")
    status, printed = run(capsys, "--recipe", "my.toml")
    assert status == 2 and "data.tokenizer is 'byte', but made was prepared with another one (bpe)" in printed


def test_damage_is_found_and_named(capsys):
    run(capsys, "text", "--tokenizer", "byte", "--out", "made")
    shard = min(Path("made").glob("*.tokens"))
    with shard.open("r+b") as file:
        file.write(b"??")
    status, printed = run(capsys, "made", "--verify")
    assert status == 2
    assert printed == (
        f"himoe: made: damaged: {shard.name} (content differs from its recorded hash); prepare the data again\n"
    )


def test_a_dry_run_says_what_would_be_read_and_writes_nothing(capsys, place):
    status, printed = run(capsys, "text", "--dry-run")
    assert status == 0
    assert "in 1 part\n" in printed and "bpe, 4,096 entries, to be learned" in printed and "not yet" in printed
    assert not (place / "cache").exists()
    for file in (place / "text").rglob("*.txt"):
        os.utime(file, (10**9, 10**9))
    folder = json.loads(run(capsys, "text", "--tokenizer", "byte", "--json")[1])["folder"]
    assert json.loads(run(capsys, "text", "--tokenizer", "byte", "--dry-run", "--json")[1])["prepared"] == folder


def test_a_dry_run_says_what_would_happen_to_the_folder_to_write(capsys, place, monkeypatch):
    for file in (place / "text").rglob("*.txt"):
        os.utime(file, (10**9, 10**9))

    def planned(*options):
        before = sorted(place.rglob("*"))
        status, printed = run(capsys, "text", "--tokenizer", "byte", "--dry-run", *options)
        assert sorted(place.rglob("*")) == before
        return status, printed

    def interrupt(stage, done, total):
        if stage == "writing tokens":
            raise KeyboardInterrupt

    assert "out          made, to be written\n" in planned("--out", "made")[1]
    run(capsys, "text", "--tokenizer", "byte", "--out", "made")
    assert "out          made, holds this corpus already\n" in planned("--out", "made")[1]
    found = json.loads(planned("--out", "made", "--json")[1])
    assert (found["prepared"], found["out"], found["state"]) == ("made", "made", "made")
    assert "prepared     not yet\n" in planned()[1], "the cache is another place"
    for folder, options, complaint in (
        (
            "made",
            ["--held-out", "0.2"],
            "made: holds a corpus of other text or settings; delete made, or choose another",
        ),
        ("text", [], "text: not empty and no prepared corpus; nothing was changed"),
    ):
        status, printed = planned("--out", folder, *options)
        assert status == 2 and complaint in printed
    share = load_config(None).data.held_out
    with pytest.raises(KeyboardInterrupt):
        prepare(place / "text", tokenizer="byte", held_out=share, out=place / "part", progress=interrupt)
    assert "out          part, holds a part of this corpus, to be gone on with\n" in planned("--out", "part")[1]
    status, printed = planned("--out", "part", "--held-out", "0.2")
    assert status == 2 and "part: holds an unfinished corpus of other text or settings; delete part" in printed
    monkeypatch.setenv("HIMOE_CACHE", str(place / "another cache"))
    assert "out          made, holds a corpus with these settings; refused if" in planned("--out", "made")[1]


def test_duplicates_are_counted(capsys):
    for i in range(5):
        Path(f"text/verse/copy{i}.txt").write_bytes(Path(f"text/verse/{i}.txt").read_bytes())
    status, printed = run(capsys, "text", "--tokenizer", "byte", "--deduplicate")
    lines = printed.splitlines()
    assert status == 0 and lines[0].endswith("duplicates")
    assert [line.split()[-1] for line in lines[1:3]] == ["0", "5"]
    assert "--data.deduplicate\n" in printed


def test_a_file_says_what_is_read(capsys, place):
    own = BPETokenizer.train(["some other text"] * 9, 262)
    own.save(place / "own.json")
    sources = '{ poems = "text/verse", stories = "text/prose" }'
    (place / "my.toml").write_text(f'[data]\nsources = {sources}\ntokenizer = "own.json"\n', encoding="utf-8")
    status, printed = run(capsys, "--recipe", "my.toml", "--json")
    found = json.loads(printed)
    assert status == 0
    assert (found["name"], list(found["domains"])) == ("poems+stories", ["poems", "stories"])
    assert found["tokenizer"]["vocab_size"] == own.vocab_size == 262
    assert found["train"] == "himoe train my.toml"
    assert json.loads(run(capsys, "text", "--recipe", "my.toml", "--json")[1])["name"] == "text"


def test_a_tokenizer_that_loses_something_of_the_text_is_marked(capsys):
    own = BPETokenizer.train(["some other text"] * 9, 262)
    own.save("exact.json")
    own.model.normalizer = normalizers.Lowercase()
    own.model.save("lower.json")
    for file, exact in (("exact.json", True), ("lower.json", False)):
        assert json.loads(run(capsys, "text", "--tokenizer", file, "--json")[1])["tokenizer"]["exact"] is exact
        status, printed = run(capsys, "text", "--tokenizer", file)
        assert status == 0
        assert ("bpe, 262 entries; does not give every text back as it was\n" in printed) is not exact


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "himoe: nowhere: no such file or folder"),
        (["text", "--tokenizer", "words"], "data.tokenizer is 'words'; it must be 'bpe', 'byte', or the path of a"),
        (["text", "--held-out", "2"], "data.held_out"),
        (["text", "--held-out", "0"], "data.held_out"),
        (["text", "--workers", "0"], "data.workers"),
        (["text", "--out", "text"], "text: not empty and no prepared corpus; nothing was changed"),
        (["text", "--domain-column", "site"], "leave data.domain_column out"),
        (["text", "--steps", "4"], "unknown option '--steps'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capsys, arguments, complaint):
    status, printed = run(capsys, *arguments)
    assert status == 2
    assert complaint in printed and printed.startswith("himoe: ") and printed.count("\n") == 1


def test_it_answers_without_torch():
    code = "import sys; from himoe.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    words = ["prepare", "text", "--tokenizer", "byte", "--json"]
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("}\nFalse\n")
