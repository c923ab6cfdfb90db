"""The table: its columns and types, facts by hand, kept as rebuilt, and asked in SQL."""

import pyarrow as pa
import pyarrow.parquet
import pytest

from himoe.config import load_config
from himoe.errors import ConfigError, RunFolderError
from himoe.files import write_json
from himoe.plan import flops, shape_of
from himoe.run_folder import Log
from himoe.sweep import Table, build_table, query

COLUMNS = """
run name status error recipe seed preset selector balancers num_experts top_k expert_dim dim num_layers granularity
sparsity total_parameters active_parameters active_without_embeddings tokens training_flops steps learning_rate
cross_entropy bits_per_byte bits_per_byte_by_domain cv max_vio cv_by_level max_vio_by_level dead_experts wall_seconds
tokens_per_second started commit version kernels
"""


def folder_of(out, name, *sets, **summary):
    """Write a run folder by hand: 4 experts in 2 groups, two layers, 100 steps with a log line each 50."""
    folder = out / "runs" / name
    folder.mkdir(parents=True)
    config = load_config("lm_tiny", sets=["moe.num_experts=4", "moe.num_groups=2", "moe.top_k=2", *sets])
    write_json(folder / "config.json", config.model_dump(mode="json"))
    env = {"started": "2026-01-02T03:04:05+00:00", "git_commit": "abc", "himoe": "0.2.0", "kernels": ["loop", "native"]}
    write_json(folder / "env.json", {**env, "data": {"vocab_size": 257}})
    metrics, load = Log(folder / "metrics.jsonl"), Log(folder / "load.jsonl")
    for step, loads in (
        (50, [[9, 0, 0, 0]] * 2),
        (75, [[3, 1, 2, 2], [4, 4, 0, 0]]),
        (100, [[1, 3, 0, 0], [2, 2, 2, 2]]),
    ):
        metrics.append({"kind": "train", "step": step, "tokens": step * 512, "seconds": step / 10, "loss": 600 / step})
        load.append({"step": step, "layers": [{"layer": i, "load": each} for i, each in enumerate(loads)]})
    metrics.append({"kind": "eval", "step": 100, "tokens": 51200, "seconds": 11.0, "loss": 3.0, "final": True})
    metrics.close()
    load.close()
    if summary:
        layers = [
            {"layer": i, "cv_window": cv, "max_vio_window": vio, "dead_experts": dead} for i, cv, vio, dead in LAYERS
        ]
        rest = {"step": 100, "tokens": 51200, "seconds": 12.5, "tokens_per_second": 5120.0, "layers": layers}
        domains = {"a": {"bits_per_byte": 1.5}, "b": {"bits_per_byte": None}}
        write_json(folder / "summary.json", {"loss": 3.0, "bits_per_byte": 1.6, "domains": domains, **rest, **summary})
    return folder, config


LAYERS = [(0, 0.25, 0.5, [3]), (1, 0.75, 1.5, [0, 2])]


def test_a_row_by_hand(tmp_path):
    _, config = folder_of(tmp_path, "a", status="finished")
    folder_of(tmp_path, "b", "moe.every=0", status="stopped by an alarm")
    table = build_table(tmp_path).runs()
    assert table.column_names == [*COLUMNS.split(), "moe.every"]
    row, dense = table.to_pylist(maps_as_pydicts="strict")
    assert (row["run"], row["name"], row["status"], row["recipe"], row["seed"]) == (
        "a",
        "every=1",
        "done",
        "lm_tiny",
        0,
    )
    assert (row["num_experts"], row["top_k"], row["sparsity"], row["granularity"]) == (4, 2, 2.0, 32 / 128)
    assert row["training_flops"] == 51200 * flops(shape_of(config), config.train.seq_len).total
    assert (row["tokens"], row["steps"], row["wall_seconds"]) == (51200, 100, 12.5)
    assert (row["cross_entropy"], row["bits_per_byte"], row["bits_per_byte_by_domain"]) == (3.0, 1.6, {"a": 1.5})
    assert (row["cv"], row["max_vio"], row["dead_experts"]) == (0.5, 1.0, 1.5)
    # the last 50 steps, groups of two: layer 0 has 8 and 4, layer 1 12 and 4
    assert row["max_vio_by_level"] == {"expert": 1.0, "group": pytest.approx((8 / 6 - 1 + 12 / 8 - 1) / 2)}
    assert row["cv_by_level"] == {"expert": 0.5, "group": pytest.approx((2 / 6 + 4 / 8) / 2)}
    assert row["started"].isoformat() == "2026-01-02T03:04:05+00:00" and row["kernels"] == "loop, native"
    assert (dense["status"], dense["name"], dense["num_experts"], dense["preset"]) == ("stopped", "every=0", None, None)
    curves = pyarrow.parquet.read_table(tmp_path / "curves.parquet").to_pylist()[:3]
    losses = [(line["step"], line["cross_entropy"], line["train_cross_entropy"]) for line in curves]
    assert losses == [(50, None, 12.0), (75, None, 8.0), (100, 3.0, 6.0)]


def test_varied_keys_have_their_own_types(tmp_path):
    sets = ["moe.expert_dim=8", "train.learning_rate=0.5", "model.tie_embeddings=false", "moe.options.alpha=1"]
    for i, change in enumerate([*sets, "moe.layers=[0]", "moe.options.alpha=0.5"]):
        folder_of(tmp_path, str(i), change, status="finished")
    kinds = {"moe.expert_dim": pa.int64(), "train.learning_rate": pa.float64(), "model.tie_embeddings": pa.bool_()}
    kinds |= {"moe.options.alpha": pa.float64(), "moe.layers": pa.string()}
    table = build_table(tmp_path).runs()
    found = dict(zip(table.schema.names, table.schema.types, strict=True))
    assert {name: kind for name, kind in found.items() if "." in name} == kinds
    assert table.column("moe.options.alpha").to_pylist() == [None, None, None, 1.0, None, 0.5]
    assert table.column("moe.layers").to_pylist() == [None, None, None, None, "[0]", None]


def test_what_is_not_done_has_no_result(tmp_path):
    folder_of(tmp_path, "going")
    write_json(folder_of(tmp_path, "lost")[0] / "error.json", {"error": "ValueError: no"})
    (tmp_path / "runs" / "empty").mkdir()
    bare = tmp_path / "runs" / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((tmp_path / "runs" / "going" / "config.json").read_text())
    rows = {row["run"]: row for row in build_table(tmp_path).runs().to_pylist()}
    found = {name: (row["status"], row["error"], row["steps"], row["cross_entropy"]) for name, row in rows.items()}
    running = {"going": ("running", None, 100, None), "bare": ("running", None, 0, None)}
    assert found == running | {"lost": ("failed", "ValueError: no", 100, None)}


def test_a_table_that_is_kept_is_the_one_that_is_rebuilt(tmp_path):
    kept = Table(tmp_path)
    for step in range(4):
        folder, _ = folder_of(tmp_path, str(step), f"seed={step % 2}", f"moe.top_k={2 + 2 * (step == 3)}")
        kept.read()
        write_json(folder / "summary.json", {"status": "finished", "step": 100, "tokens": 1, "loss": float(step)})
        assert kept.read().runs() == Table(tmp_path).read().runs()
    assert kept.curves() == Table(tmp_path).read().curves() and kept.runs().num_rows == 4
    (folder / "config.json").unlink()
    assert kept.read().runs() == Table(tmp_path).read().runs() and kept.runs().num_rows == 3


def test_queries_see_what_has_been_written_since(tmp_path):
    folder_of(tmp_path, "a", status="finished")
    folder, _ = folder_of(tmp_path, "b", "seed=1", status="finished", loss=2.0)
    best = "select seed, cross_entropy from runs order by cross_entropy limit 1"
    assert query(tmp_path, best).to_pylist() == [{"seed": 1, "cross_entropy": 2.0}]
    write_json(folder / "summary.json", {"status": "finished", "step": 100, "loss": 4.0})
    assert query(tmp_path, best).to_pylist() == [{"seed": 0, "cross_entropy": 3.0}]
    folder_of(tmp_path, "c", "seed=2", status="finished", loss=1.0)
    assert query(tmp_path, best).to_pylist() == [{"seed": 2, "cross_entropy": 1.0}]
    assert query(tmp_path, "select count(*) as n from curves").to_pylist() == [{"n": 9}]
    with pytest.raises(ConfigError, match=r"query: .*nam.*name"):
        query(tmp_path, "select nam from runs")
    with pytest.raises(ConfigError, match="query: empty"):
        query(tmp_path, " ;")
    with pytest.raises(RunFolderError, match="holds no sweep"):
        query(tmp_path / "other", best)
    assert not (tmp_path / "other").exists()
