"""`moe.backend` reaches the experts, and with `triton` the router's choice too."""

import pytest

from himoe.build import build_moe
from himoe.config.schema import MoEConfig


@pytest.mark.parametrize(("backend", "fused"), [("auto", False), ("grouped", False), ("triton", True)])
def test_the_backend_reaches_experts_and_router(backend, fused):
    moe = MoEConfig(num_experts=8, num_groups=4, top_k=4, expert_dim=8, backend=backend)
    layer = build_moe(moe, 16)
    assert layer.experts.backend == backend and layer.router.fused is fused
