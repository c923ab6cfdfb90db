"""`PerGroup`: every group's balancer does what it would do in a layer of the group's experts alone."""

import dataclasses

import pytest
import torch
from free_router import choices, free_router, one_step, random_logits, route
from strategies import build

from himoe import Groups, Routing, registry
from himoe.balance import (
    Balancer,
    Chain,
    GlobalBatch,
    Importance,
    Load,
    LogitCorrection,
    LossFree,
    PerGroup,
    Phi,
    Schedule,
    Switch,
    TwoLevelTerms,
)
from himoe.errors import ConfigError

E = 9
EQUAL = (Groups.equal(E, 3), (1, 1, 1))
UNEQUAL = (Groups(((0, 1, 2, 3), (4, 5), (6, 7, 8))), (2, 1, 1))
SCATTERED = (Groups(((7, 0, 3, 5), (8,), (2, 4, 6, 1))), (2, 1, 3))
each_partition = pytest.mark.parametrize(("groups", "k"), [EQUAL, UNEQUAL, SCATTERED], ids=["equal", "unequal", "any"])


def with_noise(routing: Routing, clean, noise, std, weight) -> Routing:
    context = dataclasses.replace(routing.context, noise=noise, noise_std=std, gate_weight=weight)
    return routing.replace(logits=clean, context=context)


def both(groups, k, seed, *, balancer=None, parts=None, score="softmax") -> tuple[Routing, list[Routing]]:
    """The routing of the layer, and those of layers that have one group's experts each, from the same numbers."""
    clean, noise = random_logits(seed, 20, E), random_logits(seed + 1, 20, E)
    std, weight = random_logits(seed + 2, 20, E).exp(), random_logits(seed + 3, E, 4)
    mask = torch.arange(20) % 5 > 0
    whole = route(clean + noise, k, groups=groups, mask=mask, balancer=balancer, score=score)
    alone = []
    for g, members in enumerate(groups.members):
        m = list(members)
        part = route((clean + noise)[:, m], k[g], mask=mask, balancer=None if parts is None else parts[g], score=score)
        alone.append(with_noise(part, clean[:, m], noise[:, m], std[:, m], weight[m]))
    return with_noise(whole, clean, noise, std, weight), alone


@each_partition
def test_the_routing_within_a_group_is_that_of_its_experts_alone(groups, k):
    whole, alone = both(groups, k, 0)
    counts = torch.arange(E)
    per_group = PerGroup(groups, [Switch() for _ in k])
    for g, expected in enumerate(alone):
        found = per_group.within(whole.replace(step_counts=counts), g)
        assert torch.equal(found.logits, expected.logits)
        for name in ("noise", "noise_std", "gate_weight", "mask"):
            assert torch.equal(getattr(found.context, name), getattr(expected.context, name))
        assert found.step_counts.tolist() == list(groups.members[g])
        shares = found.scores / found.scores.sum(-1, keepdim=True)
        assert torch.allclose(shares, expected.scores, atol=1e-14)
        for t in range(20):
            chosen = {int(e) for e, s in zip(found.expert_ids[t], found.selected[t], strict=True) if s}
            assert chosen == {int(e) for e, s in zip(expected.expert_ids[t], expected.selected[t], strict=True) if s}


# Scores and weights are as the layer made them. So these are without importance, whose weights are divided over the
# layer, and without what takes softmax scores as they are: those of a group do not sum to 1.
BIASING = [name for name in registry.BALANCERS if type(build(name)).adjust_choice is not Balancer.adjust_choice]
EACH = [(name, "softmax") for name in registry.BALANCERS if name not in ("importance", "relu_sparsity", *BIASING)]
EACH += [(name, "sigmoid") for name in registry.BALANCERS if name != "importance"]


@each_partition
@pytest.mark.parametrize(("name", "score"), EACH)
def test_losses_gradients_and_state_are_those_of_separate_layers(name, score, groups, k):
    """Over the whole table: two steps of two micro-batches, then a routing with its losses and their gradient."""

    def parts():
        sizes = zip(groups.sizes, k, strict=True)
        return [build(name, num_experts=size, groups=1, top_k=top_k, rate=0.05) for size, top_k in sizes]

    separate, within = parts(), PerGroup(groups, parts())
    for seed in (0, 10):
        looks = [both(groups, k, seed + s, balancer=within, parts=separate, score=score) for s in (0, 5)]
        for g, balancer in enumerate(separate):
            one_step(balancer, *(alone[g] for _, alone in looks))
        one_step(within, *(whole for whole, _ in looks))
    for part, balancer in zip(within.parts, separate, strict=True):
        for (key, found), (_, expected) in zip(part.named_buffers(), balancer.named_buffers(), strict=True):
            assert torch.allclose(found.double(), expected.double(), rtol=0, atol=1e-7), key
    whole, alone = both(groups, k, 20, balancer=within, parts=separate, score=score)
    for g, members in enumerate(groups.members):
        chosen = torch.zeros(20, E).scatter_add(1, whole.expert_ids, whole.selected.float())[:, list(members)]
        expected = torch.zeros_like(chosen).scatter_add(1, alone[g].expert_ids, alone[g].selected.float())
        assert torch.equal(chosen, expected)
    found = within.losses(whole)
    expected = [balancer.losses(routing) for balancer, routing in zip(separate, alone, strict=True)]
    assert all(found.keys() == one.keys() for one in expected)
    for key, value in found.items():
        assert value.item() == pytest.approx(sum(one[key].item() for one in expected), rel=1e-6, abs=1e-9)


@each_partition
def test_gradients_stay_in_the_columns_of_their_group(groups, k):
    logits = random_logits(3, 15, E).requires_grad_()
    routing = route(logits, k, groups=groups)
    within = PerGroup(groups, [Switch(weight=0.1 * (g + 1)) for g in range(3)])
    (found,) = torch.autograd.grad(sum(within.losses(routing).values()), logits)
    for g, members in enumerate(groups.members):
        leaf = logits.detach()[:, list(members)].requires_grad_()
        value = Switch(weight=0.1 * (g + 1)).losses(route(leaf, k[g]))["load_balance"]
        (expected,) = torch.autograd.grad(value, leaf)
        assert torch.allclose(found[:, list(members)], expected, rtol=0, atol=1e-8)


def test_a_fair_share_is_one_of_the_pool_not_of_the_layer():
    """Four experts share two places, two share one: balanced in each pool, not over the layer."""
    groups = Groups(((0, 1, 2, 3), (4, 5)))
    ids = [[0, 1, 4], [2, 3, 5], [1, 0, 4], [3, 2, 5]]
    routing = choices(ids, 6)
    per_pool = PerGroup(groups, [LossFree(4, rate=0.5), LossFree(2, rate=0.5)])
    whole = LossFree(6, rate=0.5)
    last_of_second_pool = (torch.arange(4)[:, None] == 3) & (routing.expert_ids >= 4)
    skewed = routing.replace(selected=~last_of_second_pool)
    one_step(per_pool, routing)
    assert [part.bias.tolist() for part in per_pool.parts] == [[0.0] * 4, [0.0] * 2]
    one_step(per_pool, skewed)
    assert [part.bias.tolist() for part in per_pool.parts] == [[0.0] * 4, [-0.5, 0.5]]
    one_step(whole, skewed)
    assert whole.bias.tolist() == [-0.5, -0.5, -0.5, -0.5, -0.5, 0.5]  # 2 against a mean of 11/6, 1 for the last


def test_hooks_put_every_column_back_to_its_place():
    groups, k = SCATTERED
    within = PerGroup(groups, [Chain(LogitCorrection(s, tau=1.0, beta=0.0), LossFree(s)) for s in groups.sizes])
    for part, members in zip(within.parts, groups.members, strict=True):
        part.parts[0].mean_logits.copy_(torch.tensor(members))  # expert e's is e
        part.parts[1].bias.copy_(torch.tensor(members) * 10)
    x = torch.zeros(2, E, dtype=torch.float64)
    context = route(x, k, groups=groups).context
    assert within.adjust_logits(x, context).tolist() == [[-float(e) for e in range(E)]] * 2
    assert within.adjust_choice(x, context).tolist() == [[10.0 * e for e in range(E)]] * 2


def test_importance_per_group_takes_the_layers_weights():
    groups, k = SCATTERED
    whole, _ = both(groups, k, 7)
    dense = torch.zeros(20, E, dtype=torch.float64).scatter(1, whole.expert_ids, whole.weights)
    expected = 0.0
    for members in groups.members:
        summed = dense.sum(0)[list(members)]
        expected += 0.2 * (summed.var(correction=0) / summed.mean() ** 2).item()
    found = PerGroup(groups, [Importance(weight=0.2) for _ in k]).losses(whole)
    assert found["importance"].item() == pytest.approx(expected, rel=1e-9)


def test_different_strategies_per_group_and_compositions():
    groups, k = UNEQUAL
    inner = [Chain(Switch(weight=0.5), Load()), Schedule(Switch(weight=0.25), "warmup", steps=2), Phi(3)]
    routing, _ = both(groups, k, 4)
    found = PerGroup(groups, inner).losses(routing)
    assert found.keys() == {"load_balance", "smooth_load", "phi"}
    alone = PerGroup(groups, [Switch(weight=0.5), Switch(weight=0.0), Switch(weight=0.0)]).losses(routing)
    assert found["load_balance"].item() == pytest.approx(alone["load_balance"].item())  # the warm-up starts at 0
    assert not PerGroup(groups, [Switch() for _ in k]).needs_step_counts
    assert PerGroup(groups, [Chain(Switch(), GlobalBatch()), Switch(), Switch()]).needs_step_counts


def test_state_is_saved_and_restored_by_group():
    groups, k = SCATTERED
    one, other = (PerGroup(groups, [LossFree(size) for size in groups.sizes]) for _ in range(2))
    one_step(one, route(random_logits(0, 30, E), k, groups=groups))
    other.load_state_dict(one.state_dict())
    assert list(one.state_dict()) == ["parts.0.bias", "parts.1.bias", "parts.2.bias"]
    logits = random_logits(1, 30, E)
    found = [free_router(E, k, groups=groups, balancer=balancer)(logits).expert_ids for balancer in (one, other)]
    assert torch.equal(*found)


def test_wrong_compositions_are_refused():
    groups, _ = UNEQUAL
    with pytest.raises(ConfigError, match="per_group: 2 balancers for 3 groups: give one each"):
        PerGroup(groups, [Switch(), Switch()])
    shared = LossFree(3)
    with pytest.raises(ConfigError, match="per_group: two groups share a balancer"):
        PerGroup(Groups.equal(6, 2), [shared, shared])
    with pytest.raises(ConfigError, match="per_group: the groups hold 9 experts, the router has 4"):
        route(random_logits(0, 3, 4), 1, balancer=PerGroup(groups, [Switch() for _ in range(3)]))
    with pytest.raises(ConfigError, match="groups name 3 experts, the layer has num_experts = 4"):
        TwoLevelTerms(4, Groups.equal(3, 1))
