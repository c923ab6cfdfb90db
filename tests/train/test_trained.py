"""What of a run can be scored, and on which text."""

import json

import pytest
import torch
from run_case import config, lines, train

from himoe import trained
from himoe.data import prepare
from himoe.errors import ConfigError, DataError
from himoe.trained import evaluate


@pytest.fixture(scope="module")
def averaged(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "averaged"
    sets = ("train.ema_decay=0.9", "train.steps=6", "train.eval_every=2", "train.checkpoint_every=2")
    return out, train(config(text, *sets), out)[0]


@pytest.fixture
def poems(tmp_path):
    """Return a file of JSON lines in two languages."""
    path = tmp_path / "poems.jsonl"
    rows = [{"body": f"{i} roses, red", "lang": "en"} for i in range(40)]
    rows += [{"body": f"{i} Rosen, süß", "lang": "de"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_averaged_weights_are_taken_where_there_are_some(averaged, finished):
    out, summary = averaged
    first, last = evaluate(out), evaluate(out, ema=False)
    assert (first["weights"], last["weights"]) == ("averaged", "trained")
    assert first["bits_per_byte"] == summary["bits_per_byte"] != last["bits_per_byte"]
    assert evaluate(finished[0])["weights"] == "trained"


def test_best_is_the_checkpoint_with_the_best_evaluation(averaged):
    out, summary = averaged
    assert evaluate(out, checkpoint="best")["step"] == summary["best"]["step"]
    assert evaluate(out, checkpoint="last")["step"] == 6


def test_the_final_line_and_eval_tell_the_same_of_every_length(averaged):
    out, _ = averaged
    result, line = evaluate(out), lines(out / "metrics.jsonl")[-1]
    tokens = sum(domain["tokens"] for domain in result["domains"].values())
    for key in ("by_context", "by_length"):
        assert result[key] == line[key]
        assert sum(row["tokens"] for row in result[key]) == tokens
    whole = sum(domain["bytes"] for domain in result["domains"].values())
    assert sum(row["bytes"] for row in result["by_context"]) == whole  # byte-level tokens measure their text
    assert [row["to"] for row in result["by_context"]] == [16, 64]  # windows of 64


def test_the_use_of_the_experts_is_told_per_domain_and_layer(finished):
    result = evaluate(finished[0])
    for domain in result["domains"].values():
        assert [sum(layer["load"]) for layer in domain["layers"]] == [4 * domain["tokens"]] * 2
    for index, layer in enumerate(result["layers"]):
        parts = [domain["layers"][index]["load"] for domain in result["domains"].values()]
        assert layer["load"] == [sum(pairs) for pairs in zip(*parts, strict=True)]
        assert 0 <= layer["domain_information"] <= layer["domain_information_maximum"] == 1


def test_columns_name_text_and_domain(finished, poems):
    result = evaluate(finished[0], data=poems, text_column="body", domain_column="lang")
    sizes = {
        "en": sum(len(f"{i} roses, red") for i in range(40)),
        "de": sum(len(f"{i} Rosen, süß") + 2 for i in range(20)),
    }
    assert {name: domain["bytes"] for name, domain in result["domains"].items()} == sizes
    assert evaluate(finished[0], data=poems, text_column="body")["domains"].keys() == {"poems"}
    with pytest.raises(DataError, match="text"):
        evaluate(finished[0], data=poems)


def test_text_of_empty_documents_is_refused_and_beside_others_left_out(finished, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 2)
    with pytest.raises(DataError, match="no text to score: every document is empty"):
        evaluate(finished[0], data=tmp_path / "empty.jsonl")
    (tmp_path / "some.jsonl").write_text('{"text": "abc"}\n')
    result = evaluate(finished[0], data={"a": tmp_path / "empty.jsonl", "b": tmp_path / "some.jsonl"})
    assert {name: one["bytes"] for name, one in result["domains"].items()} == {"b": 3}


def test_several_texts_are_a_domain_each(finished, poems, text):
    plain = evaluate(finished[0], data=text / "verse" / "3.txt")
    poems.with_name("3.txt").write_bytes((text / "verse" / "3.txt").read_bytes())
    result = evaluate(finished[0], data={"a": poems.with_name("3.txt"), "b": text / "prose"})
    assert result["domains"]["a"] == plain["domains"]["3"]
    assert result["domains"]["b"]["bytes"] == sum(len(file.read_bytes()) for file in (text / "prose").iterdir())


def test_a_long_text_is_encoded_a_little_at_a_time(finished, tmp_path, monkeypatch):
    (tmp_path / "long.txt").write_text("".join(f"line {i}\n\n" for i in range(3000)))
    whole = evaluate(finished[0], data=tmp_path / "long.txt")
    calls, encode = [], trained.Text.encode

    def counted(documents, tokenizer):
        calls.append(sum(map(len, documents)))
        return encode(documents, tokenizer)

    monkeypatch.setattr(trained.Text, "encode", counted)
    monkeypatch.setattr("himoe.train.texts.PIECE", 5000)
    assert evaluate(finished[0], data=tmp_path / "long.txt") == whole
    assert len(calls) >= 4 and max(calls) < 15_000


def test_of_a_prepared_folder_the_held_out_part_is_read(finished, text, tmp_path):
    out, summary, _ = finished
    corpus = prepare(text, held_out=0.1, tokenizer=out / "tokenizer.json", out=tmp_path / "prepared")
    result = evaluate(out, data=corpus.folder)
    assert result["bits_per_byte"] == pytest.approx(summary["bits_per_byte"])
    prepare(text, held_out=0.1, vocab_size=300, out=tmp_path / "merged")
    with pytest.raises(DataError, match="another tokenizer than that of"):
        evaluate(out, data=tmp_path / "merged")


def test_windows_may_be_longer_or_shorter_than_in_training(finished):
    same, short, long = (evaluate(finished[0], seq_len=length) for length in (64, 5, 1000))
    assert same == evaluate(finished[0])
    assert short["loss"] != same["loss"] != long["loss"]
    assert [result["by_context"][-1]["to"] for result in (short, long)] == [16, 1024]
    assert short["domains"]["verse"]["tokens"] == long["domains"]["verse"]["tokens"]
    with pytest.raises(ConfigError, match="--seq-len is 0; it must be at least 1"):
        evaluate(finished[0], seq_len=0)


def test_scoring_changes_nothing_in_the_run_folder(finished, poems):
    def content():
        return {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()}

    before = content()
    evaluate(finished[0])
    evaluate(finished[0], data=poems, text_column="body")
    assert content() == before


def test_scoring_leaves_random_generators_and_threads_as_they_were(finished, monkeypatch):
    seen, read = [], trained.evaluate_pieces
    monkeypatch.setattr(trained, "evaluate_pieces", lambda *of: seen.append(torch.get_num_threads()) or read(*of))
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    torch.manual_seed(5)
    states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    try:
        evaluate(finished[0])
        assert (seen, torch.get_num_threads()) == ([1], before + 1)  # the run has train.threads = 1
    finally:
        torch.set_num_threads(before)
    after = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
    assert all(map(torch.equal, states, after))
