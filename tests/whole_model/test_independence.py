"""Of all balancers together: earlier tokens ignore later ones, tokens the batch, extremes stay finite.

Every entry and preset by itself is in `test_every_entry.py`.
"""

import pytest
import torch
from router_zoo import E, capacity, make_model, make_router, optimizer_step, state_of, token_ids

import himoe
from himoe import MoE, SwiGLUExperts, presets
from himoe.balance import LossFree
from himoe.functional import stats

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def suffix_change(model, rows: int = 1, at: int = 12) -> float:
    """How far the logits before `at` move when every token from there on is another."""
    ids = token_ids(rows, 20)
    other = ids.clone()
    other[:, at:] = (ids[:, at:] + 1 + token_ids(rows, 20 - at, seed=9) % 7) % 17
    assert (ids[:, at:] != other[:, at:]).any()
    with torch.no_grad():
        one, two = model(ids)[0], model(other)[0]
    assert (one[:, at:] - two[:, at:]).abs().max() > 1e-6
    return (one[:, :at] - two[:, :at]).abs().max().item()


def moved(name: str, **options):
    """A model whose balancers have state by now."""
    model = make_model(name, **options)
    for step in range(3):
        optimizer_step(model, token_ids(4, 12, seed=step))
    return model


@pytest.mark.parametrize("training", [True, False])
def test_later_tokens_never_change_earlier_logits(training):
    assert suffix_change(moved("everything").train(training), rows=3) < 1e-12


@pytest.mark.parametrize("training", [True, False])
def test_nor_do_they_take_their_places(training):
    model = moved("everything", dispatcher=capacity(factor=0.25)).train(training)
    assert suffix_change(model) < 1e-12
    _, routings = model(token_ids(1, 20))
    assert any(stats.drop_rate(routing) > 0 for routing in routings) == training  # in eval nothing is dropped


def test_what_is_not_causal_says_so():
    for name in ("hi_moe_paper", "hi_moe_official"):
        model = moved(name)
        for layer in himoe.moe_layers(model):
            layer.router.balancer.parts[0].tau = 2.0
            layer.router.balancer.parts[0].beta = 0.0
        assert not any(layer.router.balancer.parts[0].causal for layer in himoe.moe_layers(model))
        assert suffix_change(model.train()) > 1e-6
        assert suffix_change(model.eval()) < 1e-12  # the mean is frozen
    by_column = moved("switch", dispatcher=capacity("column_major"))
    assert not himoe.moe_layers(by_column)[0].dispatcher.causal
    assert suffix_change(by_column) > 1e-6


def test_a_text_alone_equals_the_text_among_eight():
    model = make_model("everything", dtype=torch.float32)
    ids = token_ids(8, 11)
    with torch.no_grad():
        together, routings = model(ids)
        for row in range(8):
            alone, routings_alone = model(ids[row : row + 1])
            assert torch.allclose(together[row], alone[0], atol=1e-5)
            for routing, routing_alone in zip(routings, routings_alone, strict=True):
                assert torch.equal(routing.expert_ids.view(8, 11, -1)[row], routing_alone.expert_ids)


def finite(model) -> bool:
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    return all(tensor.isfinite().all() for tensor in tensors)


def test_one_token_and_one_repeated_token():
    for ids in (torch.zeros(1, 2, dtype=torch.int64), torch.full((3, 9), 5)):
        model = make_model("everything", dtype=torch.float32)
        optimizer_step(model, ids)
        optimizer_step(model, ids)
        assert finite(model)
    layer = himoe.moe_layers(make_model("everything", dtype=torch.float32))[0]
    y, routing = layer(torch.randn(1, 8))
    assert y.isfinite().all() and stats.load(routing).sum() == routing.selected.sum()
    assert routing.selected.all()


@pytest.mark.parametrize("name", ["everything", "loss_free", "deepseek_v3"])
def test_some_experts_get_all_tokens_and_the_others_none(name):
    layer = MoE(make_router(name), SwiGLUExperts(E, 8, 4))
    with torch.no_grad():
        layer.router.gate.weight.zero_()
        layer.router.gate.weight[::2, 0], layer.router.gate.weight[1::2, 0] = 100.0, -100.0
    x = torch.randn(60, 8)
    x[:, 0] = 1.0
    y, routing = layer(x)
    assert stats.load(routing).tolist() == [60, 0] * (E // 2)
    (y.sum() + sum(himoe.aux_losses(layer, [routing]).values())).backward()
    himoe.observe(layer, [routing])
    himoe.step(layer)
    assert y.isfinite().all() and finite(layer)
    for part in layer.router.balancer.modules():
        if isinstance(part, LossFree):
            assert part.bias.sign().tolist() == [-1, 1] * (E // 2)


def test_every_token_takes_every_expert():
    torch.manual_seed(0)
    for router in (
        presets.switch(8, E, E),
        presets.loss_free(8, E, E),
        presets.hi_moe(8, E, E, num_groups=4),
        presets.moge(8, E, E, num_groups=1),
        presets.hi_moe(8, E, E, num_groups=E),
    ):
        layer = MoE(router, SwiGLUExperts(E, 8, 4))
        x = torch.randn(5, 8)
        y, routing = layer(x)
        assert stats.load(routing).tolist() == [5] * E
        terms = himoe.aux_losses(layer, [routing])
        (y.sum() + sum(terms.values())).backward()
        himoe.observe(layer, [routing])
        himoe.step(layer)
        assert finite(layer)
        if "load_balance" in terms:  # equal counts: Σ_i P_i = 1 whatever the probabilities
            weight = next(m.weight for m in router.balancer.modules() if hasattr(m, "weight"))
            assert terms["load_balance"].item() == pytest.approx(weight, rel=1e-5)
        if hasattr(router.balancer, "bias"):
            assert not router.balancer.bias.any()


def test_one_expert_in_all_is_a_dense_layer():
    torch.manual_seed(0)
    layer = MoE(presets.loss_free(8, 1, 1, renormalize=True), SwiGLUExperts(1, 8, 4))
    x = torch.randn(6, 8)
    y, routing = layer(x)
    gate, value = (x @ layer.experts.gate_up_proj[0].T).chunk(2, -1)
    dense = (torch.nn.functional.silu(gate) * value) @ layer.experts.down_proj[0].T
    assert torch.allclose(y, dense, atol=1e-6)
    himoe.observe(layer, [routing])
    himoe.step(layer)
    assert layer.router.balancer.bias.item() == 0


def test_nothing_but_padding():
    model = make_model("everything", dtype=torch.float32)
    before = state_of(model)
    logits, routings = model(token_ids(1, 4), torch.zeros(1, 4, dtype=torch.bool))
    terms = himoe.aux_losses(model, routings)
    (0 * logits.sum() + sum(terms.values())).backward()
    himoe.observe(model, routings)
    himoe.step(model)
    assert all(value == 0 for value in terms.values()) and finite(model)
    after = state_of(model)
    assert all(torch.equal(before[n], after[n]) for n in before if not n.endswith(("num_steps", "multipliers")))
