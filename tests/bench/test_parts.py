import pytest

from himoe.bench.parts import SURROUNDING, groups_of, measure_parts
from himoe.bench.shapes import Shape

SHAPE = Shape("", tokens=32, dim=16, hidden_dim=8, num_experts=8, top_k=4)


def test_shares_are_of_the_layer():
    found = measure_parts(SHAPE, "fp32", seconds=0.0)
    parts = found["parts"]
    assert set(parts) == {"layer", "router", "hi_moe", "dispatch", "combine", "gather", "statistics"}
    assert parts["layer"]["share"] == 1
    assert found["surrounding_share"] == pytest.approx(sum(parts[name]["share"] for name in SURROUNDING))
    assert found["hi_moe_extra_share"] == pytest.approx(parts["hi_moe"]["share"] - parts["router"]["share"])
    assert found["time"] == "cpu"


def test_groups_divide_experts_and_choices():
    assert groups_of(64, 8) == 8 and groups_of(8, 2) == 2 and groups_of(12, 8) == 4 and groups_of(8, 1) == 1
