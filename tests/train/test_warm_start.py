"""A run that starts from the weights of another one."""

import shutil

import pytest
import safetensors.torch
import torch
from run_case import SHORT, config, read, train, weights

from himoe import run, trained
from himoe.config import load_config
from himoe.errors import CheckpointError, ConfigError, RunFolderError
from himoe.train.start import WarmStart, build_trainer

AVERAGED = ["train.ema_decay=0.9", "train.steps=4", "moe.preset=loss_free"]


@pytest.fixture(scope="module")
def source(text, tmp_path_factory):
    """A run with averaged weights, a BPE tokenizer and balancer state."""
    out = tmp_path_factory.mktemp("runs") / "source"
    train(config(text, *AVERAGED, "data.tokenizer=bpe", "data.vocab_size=300"), out)
    return out


@pytest.fixture
def letters(tmp_path):
    """Text of one new domain."""
    path = tmp_path / "letters.txt"
    path.write_text("\n\n".join(f"dear friend, this is letter {i}. " * 12 for i in range(120)))
    return path


def start_at(source, data, *sets):
    return config(data, "data.tokenizer=bpe", "moe.preset=loss_free", f"train.init_from={source}", *SHORT, *sets)


def tensors(run, step, name="model"):
    return safetensors.torch.load_file(run / f"checkpoints/step-{step:08}/{name}.safetensors")


def start_of(out, monkeypatch, settings):
    """Return the model as it was before the first step of a run, its summary and what it printed."""
    found, build = [], run.build_trainer

    def spy(*given):
        trainer = build(*given)
        found.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        return trainer

    monkeypatch.setattr(run, "build_trainer", spy)
    summary, printed = train(settings, out)
    return found[0], summary, printed


def test_weights_are_the_averages_and_balancer_state_goes_on(source, letters, tmp_path, monkeypatch):
    begun, summary, _ = start_of(tmp_path / "run", monkeypatch, start_at(source, letters))
    model, average = tensors(source, 4), tensors(source, 4, "ema")
    for name, tensor in {**model, **average}.items():
        assert torch.equal(begun[name], tensor), name
    assert any(name.endswith("bias") and tensor.any() for name, tensor in model.items() if name not in average)
    assert (summary["step"], list(summary["domains"])) == (1, ["letters"])
    assert (tmp_path / "run/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_env_says_where_from(source, letters, tmp_path):
    train(start_at(f"{source}/checkpoints/step-00000004", letters), tmp_path / "run")
    state = read(source / "checkpoints/step-00000004/state.json")
    assert read(tmp_path / "run/env.json")["init_from"] == {
        "run": str(source),
        "step": 4,
        "weights": "averaged",
        "sha256": state["files"]["ema.safetensors"]["sha256"],
    }


def test_weights_as_trained_where_there_is_no_average(finished, text, tmp_path, monkeypatch):
    settings = config(text, f"train.init_from={finished[0]}", *SHORT, "seed=5")
    begun, _, _ = start_of(tmp_path / "run", monkeypatch, settings)
    assert all(torch.equal(begun[name], tensor) for name, tensor in tensors(finished[0], 8).items())
    assert read(tmp_path / "run/env.json")["init_from"]["weights"] == "trained"


def test_the_new_run_can_be_evaluated_and_resumed_without_the_weights_of_the_other(letters, source, tmp_path):
    other = shutil.copytree(source, tmp_path / "other")
    summary, _ = train(start_at(other, letters), tmp_path / "run")
    assert trained.evaluate(tmp_path / "run")["bits_per_byte"] == summary["bits_per_byte"]
    shutil.rmtree(other / "checkpoints")
    before = weights(tmp_path / "run", 1)
    train(load_config(tmp_path / "run/config.json"), tmp_path / "run", resume=True)
    assert weights(tmp_path / "run", 1) == before


def test_another_tokenizer_is_refused_naming_both(source, letters, finished, tmp_path):
    words = r"data\.tokenizer = byte is another tokenizer \(byte, 257 ids\) than that of train\.init_from = .*300 ids"
    with pytest.raises(ConfigError, match=words):
        train(start_at(source, letters, "data.tokenizer=byte"), tmp_path / "run")
    path = finished[0] / "tokenizer.json"
    with pytest.raises(ConfigError, match=r"tokenizer\.json is another tokenizer"):
        train(start_at(source, letters, f"data.tokenizer={path}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_prepared_with_another_tokenizer_is_refused(source, letters, tmp_path):
    start = WarmStart.find(source)
    with torch.random.fork_rng():
        other = trained.prepare(letters, tokenizer="byte", held_out=0.1)
        with pytest.raises(ConfigError, match=r"that of the data, .*, is another tokenizer"):
            build_trainer(start_at(source, letters), other, start)


def test_a_model_that_does_not_fit_is_refused_naming_both(source, letters, tmp_path):
    words = r"^train\.init_from: checkpoint .*source.* is of another model: .*the model has .*take the model's keys"
    with pytest.raises(CheckpointError, match=words):
        train(start_at(source, letters, "model.dim=64"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("nowhere", RunFolderError, "does not exist"),
        ("checkpoints/step-00000003", CheckpointError, "step-00000003 does not exist; there are step-00000004"),
    ],
)
def test_a_place_without_weights_is_named(source, letters, tmp_path, place, error, words):
    with pytest.raises(error, match=words):
        train(start_at(source / place, letters), tmp_path / "run")


def test_the_search_for_a_learning_rate_starts_there_too(source, letters, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "find_learning_rate", lambda trainer: seen.append(trainer.model.state_dict()))
    run.range_test(start_at(source, letters))
    assert torch.equal(seen[0]["norm.weight"], tensors(source, 4, "ema")["norm.weight"])
