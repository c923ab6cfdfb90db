"""Dual ascent reached through the Hi-MoE presets, and the signatures that the presets show."""

import inspect

import pytest

from himoe import DualAscent, presets
from himoe.errors import ConfigError, GuardError


def test_bounds_put_dual_ascent_into_the_chain_with_the_largest_multiplier_the_guard_accepts():
    router = presets.hi_moe(8, 8, 2, num_groups=2, alpha=0.02, epsilon_intra=0.3, epsilon_inter=0.6, dual_rate=0.5)
    (dual,) = [m for m in router.balancer.modules() if isinstance(m, DualAscent)]
    assert (dual.epsilon_intra, dual.epsilon_inter, dual.rate) == (0.3, 0.6, 0.5)
    assert dual.maximum == pytest.approx(2.5 * 0.02)
    assert dual.multipliers.tolist() == pytest.approx([0.01, 0.01])


def test_one_bound_alone_is_refused():
    with pytest.raises(ConfigError, match="needs both epsilon_intra and epsilon_inter"):
        presets.hi_moe(8, 8, 2, num_groups=2, epsilon_inter=0.6)


@pytest.mark.parametrize("lambda_intra", [0.0, 0.01])
def test_a_multiplier_that_may_outgrow_load_balancing_is_refused(lambda_intra):
    with pytest.raises(GuardError, match=r"lambda_intra/alpha = 1/0.01 = 100 > 2.5"):
        presets.hi_moe(
            8, 8, 2, num_groups=2, lambda_intra=lambda_intra, epsilon_intra=0.3, epsilon_inter=0.6, dual_maximum=1.0
        )


def test_published_presets_show_their_own_defaults():
    paper = inspect.signature(presets.hi_moe_paper).parameters
    official = inspect.signature(presets.hi_moe_official).parameters
    assert list(paper) == list(official) == list(inspect.signature(presets.hi_moe).parameters)
    assert (paper["inter"].default, paper["renormalize"].default) == ("selected", False)
    assert (official["inter"].default, official["expert_scale"].default) == ("dense", True)
    assert paper["correction"].default == official["correction"].default == "same_batch"
