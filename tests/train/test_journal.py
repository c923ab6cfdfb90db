import json

import pytest
from line_writer import Lines
from tiny_training import TinyLM, make_trainer

from himoe.nn import moe_layers
from himoe.presets import loss_free
from himoe.run_folder import read_log
from himoe.train.alarms import diverged
from himoe.train.journal import Journal, describe_evaluation

TRAIN = {
    "kind",
    "step",
    "tokens",
    "seconds",
    "loss",
    "aux",
    "lr",
    "grad_norm",
    "norms",
    "noise_scale",
    "tokens_per_second",
    "data_wait",
    "max_vio",
}
LAYER = {
    "layer",
    "load",
    "experts_per_token",
    "truncated_mass",
    "drop_rate",
    "max_vio_batch",
    "max_vio_window",
    "cv_window",
    "effective_experts",
    "dead_experts",
    "group_mass",
    "concentration",
}
EVALUATION = {"loss": 2.0, "bits_per_byte": 1.5, "domains": {"code": {"loss": 2.0, "bits_per_byte": 1.5}}}


def test_the_lines_hold_what_the_run_folder_page_says(tmp_path):
    trainer = make_trainer(accumulate=2)
    journal = Journal(tmp_path, trainer)
    for step in range(1, 5):
        trainer.step(measure=step % 2 == 0)
        if step % 2 == 0:
            journal.training_line()
    journal.close()
    first, second = read_log(tmp_path / "metrics.jsonl")
    assert set(first) == set(second) == TRAIN and (first["step"], second["step"]) == (2, 4)
    assert set(second["norms"]) == {"embedding", "router", "experts", "norm"}
    assert all(set(norms) == {"grad", "weight"} for norms in second["norms"].values())
    assert second["noise_scale"] is None  # too few measurements
    (load, _) = read_log(tmp_path / "load.jsonl")
    assert set(load) == {"step", "layers"} and set(load["layers"][0]) == LAYER
    assert first["max_vio"] == load["layers"][0]["max_vio_window"]


def test_the_norms_of_a_line_are_those_of_its_own_step_before_clipping(tmp_path):
    trainer = make_trainer(grad_clip=1e-3)
    journal = Journal(tmp_path, trainer)
    trainer.step()
    trainer.step(measure=True)
    whole = sum(norms["grad"] ** 2 for norms in journal.training_line()["norms"].values()) ** 0.5
    trainer.step(measure=True)
    line = journal.training_line()
    assert sum(norms["grad"] ** 2 for norms in line["norms"].values()) ** 0.5 == pytest.approx(line["grad_norm"])
    assert whole != pytest.approx(line["grad_norm"])
    trainer.step()
    assert journal.training_line()["norms"] is None


def test_the_share_of_waiting_is_of_the_interval(tmp_path):
    trainer = make_trainer()
    journal = Journal(tmp_path, trainer)
    shares = []
    for steps, waited in ((2.0, 0.5), (4.0, 2.0), (1.0, 0.0)):  # seconds
        before = trainer.step_seconds, trainer.data_seconds
        trainer.step()
        trainer.step_seconds, trainer.batches.wait_seconds = before[0] + steps, before[1] + waited
        shares.append(journal.training_line()["data_wait"])
    assert shares == pytest.approx([0.25, 0.5, 0.0])


def test_an_evaluation_in_one_line():
    assert describe_evaluation(EVALUATION) == "held-out bits per byte 1.500 (code 1.500)"
    nothing = {"bits_per_byte": None, "domains": {"a": {"bits_per_byte": None}, "b": {"bits_per_byte": 0.5}}}
    assert describe_evaluation(nothing) == "held-out bits per byte – (a –, b 0.500)"


@pytest.mark.filterwarnings("ignore:LossFree. the bias moves:himoe.errors.HimoeWarning")  # a rate that shows
def test_alarms_stand_in_the_metrics_after_their_line(tmp_path):
    trainer = make_trainer(model=TinyLM(loss_free(16, 8, 4, rate=10.0)))
    other = Lines()
    journal = Journal(tmp_path, trainer, writers=other)
    trainer.step()
    journal.training_line()
    (alarm,) = journal.alarms
    lines = read_log(tmp_path / "metrics.jsonl")
    assert [line["kind"] for line in lines] == ["train", "alarm"]
    assert set(lines[1]) == {"kind", "step", "tokens", "seconds", "alarm", "layer", "text"}
    assert (lines[1]["alarm"], lines[1]["layer"], lines[1]["text"]) == ("growing_bias", 0, alarm.text)
    assert [line.get("kind", "load") for line in other.lines] == ["train", "load", "alarm"]
    trainer.step()
    journal.training_line()
    assert journal.alarms == []


def test_a_divergence_is_an_alarm_of_the_step_that_failed(tmp_path):
    trainer = make_trainer()
    journal = Journal(tmp_path, trainer)
    journal.alarm_line(diverged(trainer.model, 7, loss=float("nan"), grad_norm=1.0))
    (line,) = read_log(tmp_path / "metrics.jsonl")
    assert line["kind"] == "alarm" and line["alarm"] == "not_finite" and line["step"] == 7
    assert "loss nan" in line["text"]


def test_the_summary_is_what_the_last_lines_say_those_of_earlier_processes_too(tmp_path):
    trainer = make_trainer()
    journal = Journal(tmp_path, trainer, seconds_before=100.0)
    assert journal.summary("interrupted")["bits_per_byte"] is None
    trainer.step()
    journal.training_line()
    journal.evaluation_line(EVALUATION)
    journal.close()
    later = Journal(tmp_path, trainer, seconds_before=100.0).summary("finished")
    assert later["bits_per_byte"] == 1.5 and later["domains"] == EVALUATION["domains"] and later["seconds"] >= 100
    assert set(later["layers"][0]) == LAYER - {"load"}
    assert later["max_vio_window"] == later["layers"][0]["max_vio_window"]
    json.dumps(later, allow_nan=False)
    assert len(moe_layers(trainer.model)) == len(later["layers"])
