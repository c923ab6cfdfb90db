"""The dense networks against their formulas."""

import math

import torch
from small_layers import D, tokens

from himoe.nn import GELUMLP, SwiGLU


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
