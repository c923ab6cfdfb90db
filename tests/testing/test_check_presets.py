"""Every preset passes the suites of its parts, as it puts them together."""

import pytest

from himoe import Router, registry
from himoe.testing import check_balancer, check_gate, check_selector

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

E, K, G = 8, 4, 4


def build(name: str, dim: int = 6, num_experts: int = E) -> Router:
    groups = {"num_groups": G} if name in registry.GROUPED_PRESETS else {}
    return registry.load("presets", name)(dim, num_experts, K, **groups)


@pytest.mark.parametrize("name", sorted(registry.PRESETS))
def test_the_parts_of_every_preset_conform(name):
    router = build(name)
    check_balancer(
        lambda: build(name).balancer,
        num_experts=E,
        top_k=K,
        num_groups=G if name in registry.GROUPED_PRESETS else None,
        score=router.score.__name__,
        gate=lambda dim, num_experts: build(name, dim, num_experts).gate,
    )
    check_selector(router.selector, num_experts=E)
    check_gate(lambda dim, num_experts: build(name, dim, num_experts).gate, num_experts=E)
