"""Every gate of the table passes its suite, and every kind of broken one is named for what it breaks."""

from functools import partial

import pytest
import torch
from broken_gates import BROKEN, Plain
from torch import nn

from himoe import registry
from himoe.nn import CosineGate, Gate, NoisyGate
from himoe.testing import check_gate


@pytest.mark.parametrize("name", registry.GATES)
def test_every_entry_of_the_table_conforms_with_its_defaults(name):
    gate = registry.load("gates", name)
    check_gate(gate)
    check_gate(gate, dim=5, num_experts=3)


@pytest.mark.parametrize(
    "make", [partial(NoisyGate, noise_floor=0.0), partial(CosineGate, proj_dim=1), partial(CosineGate, temperature=2.0)]
)
def test_options_conform(make):
    check_gate(make)


def test_the_gate_that_the_broken_ones_break_is_sound():
    check_gate(Plain)


class Zeros(Gate):
    def reset_parameters(self):
        nn.init.zeros_(self.weight)


class TwoLayers(nn.Module):
    """Sound: its last layer starts at 0, so that at first the layer before has no gradient."""

    def __init__(self, dim, num_experts):
        super().__init__()
        self.first, self.last = Gate(dim, 5), Zeros(5, num_experts)

    def forward(self, x):
        return self.last(self.first(x).tanh())


def test_a_last_layer_that_starts_at_zero_is_sound():
    check_gate(TwoLayers)


class SameNoiseForAll(Gate):
    """Sound: only its logits are learned."""

    def noise_std(self, x):
        return torch.ones_like(x[:, :1]).expand(-1, len(self.weight)).to(torch.promote_types(x.dtype, torch.float32))


class Fixed(Gate):
    """Sound: random features, as hashes of the tokens are."""

    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.weight.requires_grad_(False)


@pytest.mark.parametrize("make", [SameNoiseForAll, Fixed])
def test_what_is_not_learned_at_all_is_sound(make):
    check_gate(make)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_gate_is_caught_and_named(broken):
    with pytest.raises(AssertionError) as caught:
        check_gate(broken)
    assert str(caught.value).startswith(f"{broken.__name__}: ")
    assert BROKEN[broken] in str(caught.value)
