import gzip
import json

import pytest
from run_case import config, train
from tiny_training import equal, make_trainer, weights

from himoe.train.profile import Profile


def test_a_profile_has_a_trace_and_a_table_and_changes_nothing(tmp_path):
    watched, alone = make_trainer(), make_trainer()
    tables = []
    with Profile(tmp_path / "profile", skip=1, steps=2) as recording:
        for _ in range(6):
            watched.step()
            alone.step()
            tables.append(recording.on_step())
    assert equal(weights(watched), weights(alone))
    assert [table is not None for table in tables] == [False, False, False, True, False, False]
    table = tables[3]
    assert "himoe::expert_mlp" in table and "ms/step" in table
    assert (tmp_path / "profile" / "operators.txt").read_text() == table + "\n"
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    assert sum(event["name"].startswith("ProfilerStep") for event in trace["traceEvents"] if "name" in event) >= 2
    assert any(event.get("name") == "himoe::expert_mlp" for event in trace["traceEvents"])


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_run_that_ends_before_all_is_recorded_leaves_nothing(tmp_path, done):
    trainer = make_trainer()
    with Profile(tmp_path / "profile", skip=1, steps=2) as recording:
        for _ in range(done):
            trainer.step()
            assert recording.on_step() is None
    assert not recording.complete and recording.needs == 4
    assert not (tmp_path / "profile").exists()


def test_a_run_too_short_for_a_profile_says_so(text, tmp_path):
    _, printed = train(config(text, "train.steps=5"), tmp_path / "short", profile=True)
    assert "no profile; it takes 8 steps" in printed and not (tmp_path / "short/profile").exists()
    _, printed = train(config(text), tmp_path / "long", profile=True)
    assert "no profile" not in printed and (tmp_path / "long/profile/operators.txt").is_file()
