"""The loss over the global batch in one process: its own formula over micro-batches, wherever the balancer stands."""

import dataclasses

import pytest
import torch
from free_router import free_router, one_step, random_logits, route
from torch import Tensor, nn

import himoe
from himoe import Groups, MoE
from himoe.balance import Balancer, Chain, GlobalBatch, PerGroup, Schedule, Switch, ZLoss
from himoe.balance.base import STEP_COUNTS, step_balancers
from himoe.errors import ConfigError

E, K, TOKENS = 6, 2, 8
GROUPS = Groups(((5, 0, 3), (2, 1, 4)))


def model_of(*balancers: Balancer) -> nn.ModuleList:
    """Layers whose tokens are their own logits."""
    layers = [
        MoE(
            free_router(E, (1, 1), groups=GROUPS, balancer=b),
            lambda x, ids, weights, kept: x * weights.sum(-1)[:, None],
        )
        for b in balancers
    ]
    return nn.ModuleList(layers)


def batches(count: int, seed: int = 0, size: int = TOKENS) -> list[Tensor]:
    favoured = torch.linspace(1, -1, E, dtype=torch.float64)
    return [random_logits(seed + i, size, E) + favoured * (1 + i % 2) for i in range(count)]


def counts_of(x: Tensor) -> Tensor:
    return torch.bincount(route(x, (1, 1), groups=GROUPS).expert_ids.flatten(), minlength=E).double()


def formula(so_far: list[Tensor], weight: float = 1.0) -> Tensor:
    """E·Σ f P, f from all of these, P of the last."""
    f = sum(counts_of(x) for x in so_far)
    return weight * E * (f / f.sum() * so_far[-1].softmax(-1).mean(0)).sum()


def step_of(model: nn.Module, micro_batches: list[Tensor]) -> list[dict[str, float]]:
    """One optimizer step; what every micro-batch's losses are."""
    found = []
    for x in micro_batches:
        routings = [layer(x)[1] for layer in model]
        found.append({name: value.item() for name, value in himoe.aux_losses(model, routings).items()})
        himoe.observe(model, routings)
    himoe.step(model)
    return found


@pytest.mark.parametrize("count", [1, 2, 4])
def test_over_micro_batches_it_is_its_own_formula_and_starts_anew_with_every_step(count):
    model = model_of(GlobalBatch(weight=0.3))
    for seed in (0, 50):
        data = batches(count, seed)
        found = [losses["global_balance"] for losses in step_of(model, data)]
        assert found == pytest.approx([formula(data[: i + 1], 0.3).item() for i in range(count)], rel=1e-12)
    switch = [losses["load_balance"] for losses in step_of(model_of(Switch(weight=0.3)), data)]
    assert found[0] == pytest.approx(switch[0], rel=1e-6)
    assert all(one != pytest.approx(other, rel=1e-3) for one, other in zip(found[1:], switch[1:], strict=True))


def test_what_is_uneven_in_each_micro_batch_and_even_over_the_step_has_its_price_only_at_first():
    one = torch.where(torch.arange(E) < 3, 9.0, -9.0).double().expand(TOKENS, E)
    model = nn.ModuleList([MoE(free_router(E, 3, balancer=GlobalBatch(weight=1.0)), lambda x, *_: x)])
    first, second = (losses["global_balance"] for losses in step_of(model, [one, -one]))
    assert first == pytest.approx(2) and second == pytest.approx(1)


def test_each_layer_has_its_own_counts():
    balancers = [GlobalBatch(weight=1.0) for _ in range(2)]
    model, data = model_of(*balancers), batches(2)
    for x, mirrored in ((data[0], -data[0]), (data[1], -data[1])):
        routings = [model[0](x)[1], model[1](mirrored)[1]]
        found = himoe.aux_losses(model, routings)["global_balance"]
        himoe.observe(model, routings)
    expected = formula(data) + formula([-x for x in data])
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)


def test_two_layers_that_share_one_are_refused():
    shared = GlobalBatch(weight=1.0)
    model, x = model_of(shared, shared), batches(1)[0]
    with pytest.raises(ConfigError, match="MoE layer 1 shares its GlobalBatch with another layer"):
        himoe.aux_losses(model, [model[0](x)[1], model[1](-x)[1]])


def within_groups(so_far: list[Tensor], weights: list[float]) -> Tensor:
    """The formula in each group by itself, added."""
    f, total = sum(counts_of(x) for x in so_far), 0.0
    for members, weight in zip(GROUPS.members, weights, strict=True):
        m = list(members)
        total = total + weight * len(m) * (f[m] / f[m].sum() * so_far[-1][:, m].softmax(-1).mean(0)).sum()
    return total


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Chain(ZLoss(weight=0.0), GlobalBatch(weight=0.3)), lambda data: formula(data, 0.3)),
        (lambda: Chain(Chain(GlobalBatch(weight=0.3)), GlobalBatch(weight=0.2)), lambda data: formula(data, 0.5)),
        (lambda: Schedule(GlobalBatch(weight=0.3), "off_after", steps=2), lambda data: formula(data, 0.3)),
        (
            lambda: PerGroup(GROUPS, [GlobalBatch(weight=0.3), GlobalBatch(weight=0.5)]),
            lambda data: within_groups(data, [0.3, 0.5]),
        ),
        (
            lambda: Chain(
                PerGroup(GROUPS, [Chain(Schedule(GlobalBatch(weight=0.3), "off_after", steps=3)), Switch(weight=0.0)]),
                GlobalBatch(weight=0.2),
            ),
            lambda data: within_groups(data, [0.3, 0.0]) + formula(data, 0.2),
        ),
        (
            lambda: Schedule(PerGroup(GROUPS, [Switch(weight=0.0), GlobalBatch(weight=0.5)]), "off_after", steps=2),
            lambda data: within_groups(data, [0.0, 0.5]),
        ),
    ],
    ids=["chain", "twice", "schedule", "per group", "all of them", "scheduled groups"],
)
def test_inside_other_balancers(make, expected):
    model, data = model_of(make()), batches(3)
    found = [losses["global_balance"] for losses in step_of(model, data)]
    assert found == pytest.approx([expected(data[: i + 1]).item() for i in range(3)], rel=1e-12)
    assert not any(part.sums for part in model.modules() if isinstance(part, Balancer))
    # without the three calls of the training loop, on this rank's counts: the same in one process
    balancer, found = make(), []
    for x in data:
        routing = route(x, (1, 1), groups=GROUPS)
        found.append(balancer.losses(routing)["global_balance"].item())
        balancer.observe(routing)
    step_balancers([balancer])
    assert found == pytest.approx([expected(data[: i + 1]).item() for i in range(3)], rel=1e-12)


def test_a_second_forward_or_a_second_look_counts_nothing_twice():
    model, data = model_of(GlobalBatch(weight=1.0)), batches(2)
    for x in data:
        for _ in range(2):
            model[0](x)
            routing = model[0](x)[1]
            found = [himoe.aux_losses(model, [routing])["global_balance"].item() for _ in range(2)]
        himoe.observe(model, [routing])
    assert found == pytest.approx([formula(data).item()] * 2, rel=1e-12)


def test_under_activation_recompute_counts_and_gradients_are_the_same():
    grads = []
    for recompute in (False, True):
        model, found = model_of(GlobalBatch(weight=1.0)), []
        for x in batches(2):
            leaf = x.clone().requires_grad_()
            if recompute:
                y, routing = torch.utils.checkpoint.checkpoint(model[0], leaf, use_reentrant=False)
            else:
                y, routing = model[0](leaf)
            total = y.square().sum() + himoe.aux_losses(model, [routing])["global_balance"]
            total.backward()
            himoe.observe(model, [routing])
            found.append(leaf.grad)
        grads.append(found)
        assert model[0].router.balancer.sums[STEP_COUNTS].sum() == 2 * TOKENS * K
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_padding_is_not_counted():
    model, data = model_of(GlobalBatch(weight=1.0)), batches(2)
    mask = torch.arange(TOKENS) % 3 > 0
    for x in data:
        _, routing = model[0](x, mask)
        found = himoe.aux_losses(model, [routing])["global_balance"]
        himoe.observe(model, [routing])
    assert found.item() == pytest.approx(formula([x[mask] for x in data]).item(), rel=1e-12)


def test_evaluation_in_the_middle_of_a_step_looks_at_its_own_batch_and_leaves_no_trace():
    model, data = model_of(GlobalBatch(weight=1.0)), batches(2)
    first = model[0](data[0])[1]
    himoe.observe(model, [first])
    model.eval()
    evaluated = model[0](data[1])[1]
    alone = himoe.aux_losses(model, [evaluated])["global_balance"]
    himoe.observe(model, [evaluated])
    model.train()
    assert alone.item() == pytest.approx(formula(data[1:]).item(), rel=1e-12)
    after = himoe.aux_losses(model, [model[0](data[1])[1]])["global_balance"]
    assert after.item() == pytest.approx(formula(data).item(), rel=1e-12)


def test_a_layer_that_did_not_run_keeps_its_counts():
    model, data = model_of(GlobalBatch(weight=1.0), Switch(), GlobalBatch(weight=1.0)), batches(3)
    first = [layer(data[0])[1] for layer in model]
    himoe.observe(model, first)
    himoe.aux_losses(model, [None, None, None])
    himoe.observe(model, [None, None, model[2](data[1])[1]])
    last = [model[0](data[2])[1], None, model[2](data[2])[1]]
    found = himoe.aux_losses(model, last)["global_balance"].item()
    assert found == pytest.approx((formula([data[0], data[2]]) + formula(data)).item(), rel=1e-12)


def test_only_those_who_ask_get_counts():
    class Seen(Balancer):
        def losses(self, routing):
            self.counts = routing.step_counts
            return {}

    asking, silent = Seen(), Seen()
    asking.needs_step_counts = True
    model = model_of(asking, silent)
    x = batches(1)[0]
    himoe.aux_losses(model, [layer(x)[1] for layer in model])
    assert silent.counts is None
    assert asking.counts.dtype == torch.int64 and asking.counts.tolist() == counts_of(x).tolist()


def test_counts_are_of_choices_before_drops():
    balancer, routing = GlobalBatch(weight=1.0), route(batches(1)[0], (1, 1), groups=GROUPS)
    dropped = dataclasses.replace(routing, kept=torch.zeros_like(routing.kept))
    expected = balancer.losses(routing)["global_balance"]
    assert torch.equal(balancer.losses(dropped)["global_balance"], expected)
    one_step(balancer, dropped)
    balancer.observe(dropped)
    assert balancer.sums[STEP_COUNTS].sum() == TOKENS * K
