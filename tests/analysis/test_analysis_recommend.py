"""Recommendations: the optimum within its interval, budgets, warnings, and what to run next."""

import tomllib

import numpy as np
import pytest

from himoe.analysis import Budget, recommend, study
from himoe.analysis.coverage import DESIGNS, count
from himoe.analysis.published import published
from himoe.analysis.runs import from_rows
from himoe.analysis.synthetic import Truth, rows
from himoe.errors import ConfigError

TWO = {"scales": ((64, 2), (160, 6)), "tokens": (5_000_000, 40_000_000)}


@pytest.fixture(scope="module")
def fitted():
    return study(from_rows("x", rows(**TWO)), replicates=200).fitted


def test_the_true_optimum_lies_within_the_stated_interval():
    found = count(DESIGNS["9 settings, one scale"], 100, replicates=120, truth=Truth(), own=0.003)
    for name in ("granularity", "sparsity"):
        assert found[name].within >= 90  # of 100; the interval is meant to hold it in 95
        assert found[name].width < 0.5 and found[name].whole == 0  # and says something
    assert found["loss"].within >= 90


def test_active_parameters_set_the_optimum(fitted):
    small, large = (recommend(fitted, Budget(active=active), "x") for active in (4e5, 3.1e6))
    for one, n in ((small, 2 * 16 * 64**2), (large, 6 * 16 * 160**2)):
        assert one.granularity.low <= Truth().best_granularity(n) <= one.granularity.high
        assert one.sparsity.low <= Truth().sparsity <= one.sparsity.high
        assert one.warnings == []
        assert one.loss.low < one.loss.value < one.loss.high
    assert large.granularity.value < small.granularity.value
    near = large.nearest
    assert near["num_experts"] == near["sparsity"] * near["top_k"] and near["expert_dim"] * near["top_k"] == 640
    assert near["loss"] == pytest.approx(large.loss.value, rel=1e-3)


def test_flops_are_divided_between_parameters_and_tokens():
    hungry = study(from_rows("x", rows(Truth(data=1.0), **TWO)), replicates=60).fitted
    few, many = (recommend(hungry, Budget(flops=flops), "x") for flops in (2e13, 1e14))
    assert 4.5e5 < few.active < many.active < 3e6
    for one, flops in ((few, 2e13), (many, 1e14)):
        assert 6 * one.active * one.tokens == pytest.approx(flops, rel=0.1)
    settings = study(from_rows("x", rows(scales=((64, 2), (96, 4), (160, 6))))).fitted
    with pytest.raises(ConfigError, match="takes a sweep that varies both"):
        recommend(settings, Budget(flops=1e14), "x")


def test_total_parameters_hold_sparsity_down(fitted):
    free, held = (recommend(fitted, Budget(active=3.1e6, total=total), "x") for total in (None, 15e6))
    assert held.sparsity.value < free.sparsity.value and held.total <= 15e6 * 1.001
    assert any("held down by --total" in line for line in held.warnings)
    with pytest.raises(ConfigError, match="no model of the sweep's active sizes is within it"):
        recommend(fitted, Budget(active=3.1e6, total=1e6), "x")


def test_extrapolation_and_ends_of_the_range_are_said(fitted):
    beyond = recommend(fitted, Budget(active=31e6, tokens=4e8), "x")
    assert any(
        "active parameters" in line and "times beyond the largest measured, 3.12M" in line for line in beyond.warnings
    )
    assert any("tokens 10.0 times beyond the largest measured, 40M" in line for line in beyond.warnings)
    falling = study(from_rows("x", rows(Truth(sparsity=4000.0)))).fitted
    said = recommend(falling, Budget(), "x")
    assert said.sparsity.at_high > 0.9 and said.sparsity.value == pytest.approx(64)
    assert any("sparser may be better still" in line for line in said.warnings)
    assert said.next[0].new and said.next[0].sparsity == 128
    one_scale = study(from_rows("x", rows())).fitted
    assert any(
        "what they change is not in the law" in line for line in recommend(one_scale, Budget(active=9e6), "x").warnings
    )


def test_what_to_run_next_makes_the_optimum_surer():
    said = recommend(study(from_rows("x", rows(own=0.006))).fitted, Budget(), "x")
    spec = tomllib.loads(said.spec())
    (runs,) = spec["zip"]
    assert len(said.next) == 4 and spec["recipe"] == "lm_small_switch" and spec["axes"]["seed"] == [0, 1, 2]
    assert all(k * f == 4 * 96 for k, f in zip(runs["moe.top_k"], runs["moe.expert_dim"], strict=True))
    assert said.next[0].explains == max(one.explains for one in said.next)
    widths = {"chosen": [], "elsewhere": []}
    for draw in range(6):
        base = rows(own=0.006, draw=draw)
        grids = {
            "chosen": [(round(one.sparsity), round(1 / one.granularity)) for one in said.next],
            "elsewhere": [(16, 4)] * 4,
        }
        for name, places in grids.items():
            more = []
            for i, (s, k) in enumerate(places):
                added = rows(own=0.006, draw=100 * draw + i + 50, sparsities=(s,), slices=(k,))
                more += [row | {"run": f"{row['run']}+{i}", "seed": row["seed"] + 10 + 10 * i} for row in added]
            found = recommend(study(from_rows("x", base + more), replicates=100).fitted, Budget(), "x")
            widths[name].append(np.log(found.granularity.high / found.granularity.low))
    assert np.mean(widths["chosen"]) < np.mean(widths["elsewhere"])


def test_groups_divide_what_is_recommended():
    fitted = study(from_rows("x", rows())).fitted
    said = recommend(fitted, Budget(), "x", num_groups=4)
    assert said.nearest["top_k"] % 4 == 0 and all(one.set["moe.top_k"] % 4 == 0 for one in said.next)


def test_published_findings_are_labelled_and_claim_no_number_they_do_not_have():
    said = published(Budget(active=50e6, total=1e9))
    assert "2605.11689" in said["source"] and "not your data" in said["source"]
    assert said["total_over_active"] == 20 and said["limited_by"] == ["--total"] and said["granularity"] is None
    assert said["nearest_size"] == "sd_50m" and said["warnings"] == []
    assert {one["name"] for one in said["released_models_near"]} >= {"olmoe_1b_7b"}
    assert any("beyond the largest active size" in line for line in published(Budget(active=3e9))["warnings"])
    with pytest.raises(ConfigError, match="name a budget"):
        published(Budget())
