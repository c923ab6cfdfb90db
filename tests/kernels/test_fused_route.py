"""The fused router's kernel against torch and the reference: scores, choices, ties, counts, gradients; in a router."""

from functools import partial

import pytest
import torch
import triton_here
from hypothesis import given, settings
from hypothesis import strategies as st

from himoe import Groups, MoE, SwiGLUExperts, aux_losses, observe, presets, step
from himoe.balance import Chain, LossFree, Momentum, PerGroup, Quantile, Schedule
from himoe.functional import reference, scores
from himoe.functional.selection import top_k, top_k_per_group, top_p
from himoe.functional.stats import count_pairs, selected_load
from himoe.kernels.fused_route import Plan, fused_plan, fused_route

pytestmark = triton_here.marks
DEVICE = triton_here.DEVICE


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def chosen_by_the_reference(choice, plan):
    size, k = choice.shape[1] // plan.groups, plan.places // plan.groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(plan.groups)]
    return torch.tensor(reference.top_k_per_group(choice.cpu(), groups, [k] * plan.groups)).view(-1, plan.places)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(0, 9), st.integers(1, 4), st.integers(1, 9), st.sampled_from(["softmax", "sigmoid"]))
def test_scores_choice_counts_and_gradients(data, tokens, groups, size, score):
    k = data.draw(st.integers(1, size))
    plan = Plan(score, k * groups, groups)
    logits, upstream = normal(tokens, groups * size).requires_grad_(), normal(tokens, groups * size, seed=1)
    bias = normal(groups * size, seed=2) if data.draw(st.booleans()) else None
    mask = normal(tokens, seed=3) > 0 if data.draw(st.booleans()) else None
    found, expert_ids, counts = fused_route(logits, bias, mask, plan)
    expected = getattr(scores, score)(logits)
    torch.testing.assert_close(found, expected)
    choice = found.detach() if bias is None else found.detach() + bias
    assert torch.equal(expert_ids.cpu(), chosen_by_the_reference(choice, plan))
    real = torch.ones(tokens, dtype=torch.bool, device=DEVICE) if mask is None else mask
    assert torch.equal(counts, count_pairs(expert_ids, real[:, None].expand_as(expert_ids), groups * size))
    torch.testing.assert_close(
        torch.autograd.grad(found, logits, upstream)[0], torch.autograd.grad(expected, logits, upstream)[0]
    )


def test_ties_go_to_the_lower_id_and_impossible_scores_still_give_valid_ids():
    logits = torch.zeros(5, 6, device=DEVICE)
    logits[1, 3] = logits[1, 5] = 1
    logits[2] = -torch.inf
    logits[2, 4] = 0
    logits[3] = torch.nan
    _, expert_ids, counts = fused_route(logits, None, None, Plan("softmax", 4, 1))
    assert expert_ids.tolist()[:3] == [[0, 1, 2, 3], [3, 5, 0, 1], [4, 0, 1, 2]]
    assert expert_ids[3].tolist() == [0, 1, 2, 3] and counts.sum() == 20
    _, expert_ids, _ = fused_route(logits, None, None, Plan("sigmoid", 3, 3))
    assert expert_ids.tolist()[:2] == [[0, 2, 4], [0, 3, 5]]
    bias = torch.tensor([-torch.inf, -torch.inf, -torch.inf, -torch.inf, 0, -torch.inf], device=DEVICE)
    _, expert_ids, _ = fused_route(logits[:1], bias, None, Plan("sigmoid", 3, 1))
    assert expert_ids.tolist() == [[4, 0, 1]]


def test_most_experts_and_most_places():
    logits = normal(3, 1024)
    found, expert_ids, _ = fused_route(logits, None, None, Plan("softmax", 12, 1))
    assert torch.equal(expert_ids, found.topk(12).indices)
    _, expert_ids, counts = fused_route(logits[:, :8].contiguous(), None, None, Plan("sigmoid", 8, 1))
    assert expert_ids.sort().values.tolist() == [list(range(8))] * 3 and counts.tolist() == [3] * 8


def test_the_plan_covers_what_the_kernel_does_and_nothing_else():
    logits, pairs = normal(2, 8), Groups.equal(8, 4)
    assert fused_plan(scores.softmax, partial(top_k, k=3), logits) == ("softmax", 3, 1)
    assert fused_plan(scores.sigmoid, partial(top_k_per_group, groups=pairs, k=(2,) * 4), logits) == ("sigmoid", 8, 4)
    uneven = Groups(((0, 1, 2), (3, 4, 5, 6, 7)))
    for score, selector, values in [
        (scores.relu, partial(top_k, k=3), logits),
        (scores.softmax, partial(top_p, p=0.5), logits),
        (scores.softmax, partial(top_k, k=9), logits),
        (scores.softmax, partial(top_k_per_group, groups=uneven, k=1), logits),
        (scores.softmax, partial(top_k_per_group, groups=pairs, k=(1, 1, 1, 2)), logits),
        (scores.softmax, partial(top_k_per_group, groups=pairs, k=3), logits),
        (scores.softmax, partial(top_k, k=3), logits.double()),
        (scores.softmax, partial(top_k, k=3), normal(1, 1025)),
        (scores.softmax, lambda values, context: top_k(values, context, k=3), logits),
    ]:
        assert fused_plan(score, selector, values) is None


def test_operator_registration():
    logits = normal(5, 8).requires_grad_()
    arguments = (logits, normal(8), normal(5) > 0, "softmax", 4, 2)
    results = torch.library.opcheck(torch.ops.himoe.fused_route.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("preset", ["hi_moe", "moge", "switch", "loss_free", "deepseek_v3", "olmoe"])
def test_a_fused_router_trains_as_the_general_one(preset, monkeypatch):
    calls = []
    monkeypatch.setattr("himoe.nn.router.fused_route", lambda *a: calls.append(a) or fused_route(*a))

    def trained(fused):
        torch.manual_seed(0)
        grouped = {"num_groups": 4} if preset in ("hi_moe", "moge") else {}
        router = getattr(presets, preset)(dim=16, num_experts=8, top_k=1 if preset == "switch" else 4, **grouped)
        router.fused = fused
        layer = MoE(router, SwiGLUExperts(8, 16, 8)).to(DEVICE)
        mask, seen = torch.arange(12, device=DEVICE).view(2, 6) % 5 > 0, []
        for seed in range(3):
            y, routing = layer(normal(2, 6, 16, seed=seed), mask)
            (y.square().mean() + sum(aux_losses(layer, [routing]).values())).backward()
            observe(layer, [routing])
            step(layer)
            ids = routing.expert_ids.where(routing.selected, -1)  # padding has logits of 0, all ties
            seen += [y, ids, routing.scores, routing.weights, selected_load(routing)]
        return seen + [p.grad for p in layer.parameters()] + list(layer.router.balancer.buffers())

    general = trained(False)
    assert not calls
    torch.testing.assert_close(trained(True), general)
    covered = preset != "deepseek_v3"  # which chooses among its best groups
    assert len(calls) == (3 if covered else 0)


def test_what_balancers_add_is_what_they_do():
    values, additive = normal(3, 8), [LossFree(8), Momentum(8)]
    for balancer in additive:
        balancer.to(DEVICE).bias.copy_(normal(8, seed=5))
    context = presets.olmoe(dim=4, num_experts=8, top_k=2).to(DEVICE)(normal(3, 4)).context
    for balancer in (*additive, Schedule(additive[0], "off_after", steps=2, scales="moves"), Chain(*additive), Chain()):
        expected = values
        for vector in balancer.adds_to_choice():
            expected = expected + vector
        assert torch.equal(balancer.adjust_choice(values, context), expected)

    class Doubled(LossFree):
        def adjust_choice(self, values, context):
            return 2 * super().adjust_choice(values, context)

    others = [
        LossFree(8, multiplicative=True),
        Quantile(8, 2),
        Doubled(8),
        PerGroup(Groups.equal(8, 2), [LossFree(4), LossFree(4)]),
    ]
    for other in others:
        assert other.adds_to_choice() is None and Chain(additive[0], other).adds_to_choice() is None
