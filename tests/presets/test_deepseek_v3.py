"""DeepSeek-V3's router: experts from few groups, a bias that freezes, a loss within each sequence."""

from functools import partial

import pytest
import torch

from himoe import MoE, SwiGLUExperts, observe, presets, step
from himoe.balance import LossFree, Schedule, SequenceBalance
from himoe.build import build_model
from himoe.config import load_config
from himoe.errors import ConfigError
from himoe.functional.groups import Groups
from himoe.functional.selection import top_k_in_best_groups
from himoe.nn import Gate, Router
from himoe.testing import check_balancer
from himoe.types import RouterContext


def best_groups_by_hand(row, num_groups, k, keep):
    size = len(row) // num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    value = [sum(sorted((row[e] for e in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(num_groups), key=lambda g: -value[g])[:keep]
    allowed = [e for g in kept for e in groups[g]]
    return sorted(allowed, key=lambda e: -row[e])[:k]


@pytest.mark.parametrize(
    ("experts", "num_groups", "k", "keep"), [(16, 4, 3, 2), (8, 8, 2, 4), (12, 2, 6, 1), (6, 1, 6, 1)]
)
def test_experts_come_from_the_best_groups(experts, num_groups, k, keep):
    scores = torch.randn(40, experts, generator=torch.Generator().manual_seed(0))
    ids, selected = top_k_in_best_groups(
        scores, RouterContext(), groups=Groups.equal(experts, num_groups), k=k, keep=keep
    )
    assert ids.tolist() == [best_groups_by_hand(row, num_groups, k, keep) for row in scores.tolist()]
    assert selected.all()


def test_a_negative_score_in_a_kept_group_beats_a_positive_one_outside():
    scores = torch.tensor([[5.0, -1.0, -2.0, 3.0, 0.5, 0.4]])
    ids, _ = top_k_in_best_groups(scores, RouterContext(), groups=Groups.equal(6, 3), k=2, keep=1)
    assert ids.tolist() == [[0, 1]]  # group values 4, 1, 0.9


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(
        ConfigError, match=r"keep = 1 of 4 groups must hold at least k = 3 experts, 2 a group; .*keep_groups$"
    ):
        presets.deepseek_v3(8, 8, 3, num_groups=4, keep_groups=1)
    with pytest.raises(ConfigError, match="equal contiguous groups"):
        unequal = Groups(((0, 1, 2), (3,)))
        top_k_in_best_groups(torch.zeros(1, 4), RouterContext(), groups=unequal, k=1)


def test_composition():
    router = presets.deepseek_v3(8, 16, 4, num_groups=8)
    bias, loss = router.balancer.parts
    assert isinstance(bias, LossFree)
    assert bias.rate == 1e-3
    assert isinstance(loss, SequenceBalance)
    assert loss.weight == 1e-4
    routing = router(torch.randn(9, 8))
    torch.testing.assert_close(routing.weights.sum(-1), torch.full((9,), 2.5))
    assert ((routing.expert_ids // 2).sort(-1).values.diff(dim=-1) != 0).sum(-1).lt(4).all()  # at most 4 of 8 groups


def route(tokens, batch_shape=None, mask=None):
    """Route with a gate that takes the logits from the token itself."""
    gate = Gate(tokens.shape[1], tokens.shape[1])
    torch.nn.init.eye_(gate.weight)
    selector = partial(top_k_in_best_groups, groups=Groups.equal(tokens.shape[1], 1), k=1, keep=1)
    router = Router(gate, selector, num_experts=tokens.shape[1])
    return router(tokens, mask, batch_shape=batch_shape)


def test_the_sequence_loss_by_hand():
    # Probabilities 3/4, 1/4: sequence one sends both tokens to expert 0, sequence two one to each.
    a, b = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 3.0]).log()
    routing = route(torch.stack([a, a, a, b]), batch_shape=(2, 2))
    value = SequenceBalance(weight=1.0).losses(routing)["sequence_balance"]
    # E·Σ f P: 2·(1·3/4) = 1.5, and 2·(1/2·1/2 + 1/2·1/2) = 1.
    assert value.item() == pytest.approx((1.5 + 1) / 2)


def test_the_sequence_loss_leaves_padding_and_padded_sequences_out():
    a, b = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 3.0]).log()
    tokens = torch.stack([a, a, b, a, b, b])
    mask = torch.tensor([True, True, False, False, False, False])
    value = SequenceBalance(weight=1.0).losses(route(tokens, batch_shape=(2, 3), mask=mask))["sequence_balance"]
    assert value.item() == pytest.approx(1.5)


def test_the_sequence_loss_of_one_sequence_is_the_switch_loss_and_gradient():
    from himoe.functional.losses import load_balance, sequence_load_balance

    tokens = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    routing = route(tokens)
    (ours,) = torch.autograd.grad(sequence_load_balance(routing), tokens, retain_graph=True)
    (switch,) = torch.autograd.grad(load_balance(routing), tokens)
    torch.testing.assert_close(ours, switch)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_sequence_loss_conforms(score):
    check_balancer(lambda: SequenceBalance(weight=0.1), score=score)


def test_a_frozen_bias_stands_still():
    router = presets.deepseek_v3(8, 8, 2, num_groups=4, rate=0.01, freeze_after=2)
    layer = MoE(router, SwiGLUExperts(8, 8, 4))
    (bias,) = [part.bias for part in router.balancer.modules() if isinstance(part, LossFree)]
    biases = []
    for seed in range(4):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
        observe(layer, [layer(x)[1]])
        step(layer)
        biases.append(bias.clone())
    assert not torch.equal(biases[0], biases[1])
    assert torch.equal(biases[1], biases[2])
    assert torch.equal(biases[2], biases[3])


def test_the_bias_freezes_by_a_schedule_of_its_moves():
    frozen, loss = presets.deepseek_v3(8, 16, 4, num_groups=8, freeze_after=7).balancer.parts
    assert isinstance(frozen, Schedule)
    assert (frozen.kind, frozen.steps, frozen.scales) == ("off_after", 7, "moves")
    assert isinstance(frozen.balancer, LossFree)
    assert isinstance(loss, SequenceBalance)
    with pytest.raises(ConfigError, match="schedule off_after: steps = 0 must be at least 1"):
        presets.deepseek_v3(8, 16, 4, num_groups=8, freeze_after=0)


def test_it_is_built_from_a_configuration():
    config = load_config("lm_tiny", sets=["moe.preset=deepseek_v3", "moe.options.scaling_factor=1.0"])
    router = build_model(config, 257).blocks[0].feed_forward.router
    assert router.top_k == config.moe.top_k
    spelled = load_config(
        "lm_tiny", sets=["moe.selector=top_k_in_best_groups", 'moe.balancers=[{name="sequence", weight=0.01}]']
    )
    assert build_model(spelled, 257).blocks[0].feed_forward.router.top_k == config.moe.top_k
