"""The dense networks against their formulas."""

import math

import pytest
import torch
from small_layers import D, tokens

from himoe.nn import GELUMLP, GatedNetwork, ReLU2MLP, ReLUMLP, SwiGLU


def test_swiglu():
    network, x = SwiGLU(D, 10).double(), tokens(3, 4, dtype=torch.float64)
    gate, value = (x @ network.gate_up_proj.weight.T).split(10, -1)
    expected = (gate / (1 + (-gate).exp()) * value) @ network.down_proj.weight.T
    torch.testing.assert_close(network(x), expected)


def test_gelu():
    network, x = GELUMLP(D, 10).double(), tokens(3, 4, dtype=torch.float64)
    hidden = x @ network.up_proj.weight.T
    expected = (hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2) @ network.down_proj.weight.T
    torch.testing.assert_close(network(x), expected)


@pytest.mark.parametrize(("kind", "power"), [(ReLUMLP, 1), (ReLU2MLP, 2)])
def test_relus(kind, power):
    network, x = kind(D, 10).double(), tokens(3, 4, dtype=torch.float64)
    hidden = x @ network.up_proj.weight.T
    expected = (hidden**power * (hidden > 0)) @ network.down_proj.weight.T
    torch.testing.assert_close(network(x), expected)


def test_a_gated_network_is_weighed_token_by_token():
    network = GatedNetwork(SwiGLU(D, 10), D).double()
    x = tokens(3, 4, dtype=torch.float64)
    weight = 1 / (1 + torch.exp(-(x * network.gate.weight[0]).sum(-1)))
    torch.testing.assert_close(network(x), weight[..., None] * network.network(x))
    assert set(dict(network.named_parameters())) == {
        "network.gate_up_proj.weight", "network.down_proj.weight", "gate.weight"
    }  # fmt: skip


@pytest.mark.parametrize("how", ["autocast", "bf16 model"])
def test_the_gate_of_a_network_is_computed_in_fp32(how):
    class Ones(torch.nn.Module):
        def forward(self, x):
            return torch.ones_like(x, dtype=torch.bfloat16)

    network, x = GatedNetwork(Ones(), D), tokens(50)
    if how == "bf16 model":
        network, x = network.to(torch.bfloat16), x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        y = network(x)
    exact = torch.sigmoid((x.double() * network.gate.weight.double()).sum(-1))
    rounded = torch.sigmoid(x.bfloat16() @ network.gate.weight.bfloat16().T)[:, 0]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[:, 0], exact.to(torch.bfloat16))
    assert not torch.equal(y[:, 0], rounded)
