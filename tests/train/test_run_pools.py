"""A whole run with pools of experts, experts without hidden layer, a gated shared expert and a capacity by score."""

import pytest
from run_case import config, lines, read, train

POOLS = """moe.pools=[
    { num_experts = 4 }, { num_experts = 8, expert_dim = 16, experts = "relu2" },
    { num_experts = 1, experts = "zero" }, { num_experts = 1, experts = "copy" },
    { num_experts = 2, experts = "constant" },
]"""
SETS = [
    POOLS,
    "moe.selector=top_k",
    'moe.balancers=[{ name = "switch" }]',
    "moe.num_groups=1",
    "moe.top_k=3",
    "moe.shared_dim=16",
    "moe.shared_gate=true",
    "moe.capacity_factor=1.0",
    "moe.capacity_order=batch_prioritised",
    "moe.allow_non_causal=true",
]


@pytest.mark.filterwarnings("ignore:Capacity:himoe.errors.HimoeWarning")
def test_a_recipe_with_pools_trains(text, tmp_path):
    made = config(text, *SETS)
    assert made.moe.num_experts == 16
    train(made, tmp_path / "out")
    steps = [line for line in lines(tmp_path / "out/metrics.jsonl") if "loss" in line]
    assert steps[-1]["loss"] < steps[0]["loss"]
    for line in lines(tmp_path / "out/load.jsonl"):
        for layer in line["layers"]:
            assert len(layer["load"]) == 16 and 0 < layer["drop_rate"] < 1
    parameters = read(tmp_path / "out/env.json")["parameters"]
    one, narrow, constant = 3 * 32 * 32, 2 * 32 * 16, 3 * 32  # an expert of each pool that has parameters
    routed = 4 * one + 8 * narrow + 2 * constant
    assert parameters["total"] - parameters["active"] == 2 * (routed - routed * 3 // 16)
