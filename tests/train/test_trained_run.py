"""A finished run in use."""

import pytest
import torch

from himoe import trained
from himoe.errors import CheckpointError, RunFolderError


def test_eval_repeats_the_final_evaluation(finished):
    out, summary, _ = finished
    result = trained.evaluate(out)
    for name, record in summary["domains"].items():
        assert {key: result["domains"][name][key] for key in record} == record
    assert result["step"] == 8
    assert result["bits_per_byte"] == summary["bits_per_byte"]
    earlier = trained.evaluate(out, checkpoint="step-00000004")
    assert earlier["step"] == 4 and earlier["loss"] > result["loss"]


def test_eval_on_other_text_reads_all_of_it(finished, tmp_path):
    (tmp_path / "letters.txt").write_text("Grüße\n" * 50)
    result = trained.evaluate(finished[0], data=tmp_path / "letters.txt")
    record = result["domains"]["letters"]
    assert record["bytes"] == 50 * 8 and record["tokens"] > 400
    assert "bigram" not in record


def test_eval_of_an_unknown_checkpoint_names_it(finished, tmp_path):
    with pytest.raises(CheckpointError, match=r"^step-5 does not exist; there are step-00000004, step-00000008$"):
        trained.evaluate(finished[0], checkpoint="step-5")
    with pytest.raises(RunFolderError, match=r"holds no config\.json"):
        trained.evaluate(tmp_path)


def test_a_loaded_run_is_ready_to_use(finished):
    loaded = trained.load_run(finished[0])
    assert not loaded.model.training and loaded.step == 8
    ids = torch.tensor([loaded.tokenizer.encode("roses")])
    logits, routings = loaded.model(ids)
    assert logits.shape == (1, 5, loaded.tokenizer.vocab_size) and len(routings) == 2
