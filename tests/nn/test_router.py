"""The router: the order of its steps, its weights, its precision, and the `Routing` it hands over."""

from functools import partial

import pytest
import torch
from small_layers import PRESETS, D, E, make_router, tokens
from torch import nn
from torch.utils import _pytree as pytree

from himoe import Balancer, Gate, LogitCorrection, LossFree, Router, RouterContext, Routing
from himoe.errors import ConfigError
from himoe.functional.scores import sigmoid
from himoe.functional.selection import replay, top_k

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")
TOP_2 = partial(top_k, k=2)


def flat_router(**options):
    torch.manual_seed(0)
    return Router(options.pop("gate", Gate(D, E)), TOP_2, num_experts=E, **options)


def test_the_order_of_the_steps():
    calls = []

    class Spy(Balancer):
        def adjust_logits(self, logits, context):
            calls.append(("adjust_logits", logits.sum().item()))
            return logits * 0 + 2

        def adjust_choice(self, scores, context):
            calls.append(("adjust_choice", scores.sum().item()))
            return scores + 4

    class Three(nn.Module):
        def forward(self, x):
            calls.append(("gate", x.sum().item()))
            return torch.full((1, E), 3.0)

    def score(logits):
        calls.append(("score", logits.sum().item()))
        return logits + 5

    def select(scores, context):
        calls.append(("select", scores.sum().item()))
        return TOP_2(scores, context)

    routing = Router(Three(), select, num_experts=E, score=score, balancer=Spy())(torch.ones(1, D))
    expected = [("gate", D), ("adjust_logits", 3 * E), ("score", 2 * E), ("adjust_choice", 7 * E), ("select", 11 * E)]
    assert calls == expected
    assert routing.logits.unique().item() == 3 and routing.scores.unique().item() == 7


def test_weights_are_renormalised_scores_of_the_chosen():
    x = tokens(6)
    routing = flat_router()(x)
    chosen = routing.logits.softmax(-1).topk(2)
    assert torch.equal(routing.expert_ids, chosen.indices)
    torch.testing.assert_close(routing.weights, chosen.values / chosen.values.sum(-1, keepdim=True))
    as_they_are = flat_router(renormalize=False)(x)
    torch.testing.assert_close(as_they_are.weights, chosen.values)


def test_scaling_and_learned_scale_multiply_the_weights():
    x = tokens(6)
    router = flat_router(scaling_factor=2.5, expert_scale=True)
    plain = flat_router()(x)
    torch.testing.assert_close(router(x).weights, 2.5 * plain.weights)
    with torch.no_grad():
        router.expert_scale.copy_(torch.arange(E))
    torch.testing.assert_close(router(x).weights, 2.5 * plain.weights * plain.expert_ids)
    router(x).weights.sum().backward()
    by_hand = torch.zeros(E).scatter_add(0, plain.expert_ids.flatten(), (2.5 * plain.weights).flatten())
    torch.testing.assert_close(router.expert_scale.grad, by_hand)
    router.reset_parameters()
    assert router.expert_scale.tolist() == [1.0] * E


def test_a_choice_bias_moves_the_choice_and_never_the_weights():
    router = flat_router(score=sigmoid, balancer=LossFree(E), renormalize=False)
    router.balancer.bias[5] = 10.0
    routing = router(tokens(6))
    assert (routing.expert_ids[:, 0] == 5).all()
    torch.testing.assert_close(routing.weights, routing.logits.sigmoid().gather(-1, routing.expert_ids))


def test_a_logit_correction_moves_scores_and_leaves_the_logits_raw():
    router = flat_router(balancer=LogitCorrection(E, tau=0.5, temperature=2.0))
    router.balancer.mean_logits.copy_(torch.arange(E))
    x = tokens(6)
    routing = router(x)
    torch.testing.assert_close(routing.logits, x @ router.gate.weight.T)
    torch.testing.assert_close(routing.scores, ((routing.logits - 0.5 * torch.arange(E)) / 2).softmax(-1))
    assert torch.equal(routing.expert_ids, routing.scores.topk(2).indices)


def test_weights_train_the_gate_through_the_chosen_scores():
    router = flat_router()
    x = tokens(6)
    routing = router(x)
    upstream = torch.randn(6, 2)
    (grad,) = torch.autograd.grad(routing.weights, router.gate.weight, upstream)
    weight = router.gate.weight.detach().requires_grad_()
    chosen = (x @ weight.T).softmax(-1).gather(-1, routing.expert_ids)
    (expected,) = torch.autograd.grad(chosen / chosen.sum(-1, keepdim=True), weight, upstream)
    torch.testing.assert_close(grad, expected)


def test_places_a_selector_leaves_unused_have_no_weight_and_no_share():
    def first_is_enough(scores, context):
        ids, selected = TOP_2(scores, context)
        return ids, selected & torch.tensor([True, False])

    routing = Router(Gate(D, E), first_is_enough, num_experts=E)(tokens(6))
    assert routing.weights.tolist() == [[1.0, 0.0]] * 6
    assert routing.kept.tolist() == [[True, False]] * 6


def test_padding_is_not_selected_and_has_no_weight():
    mask = torch.tensor([True, False, True])
    routing = flat_router()(tokens(3), mask)
    assert routing.selected.tolist() == [[True, True], [False, False], [True, True]]
    assert routing.weights.sum(-1).tolist() == pytest.approx([1, 0, 1])
    assert torch.equal(routing.kept, routing.selected)


def test_scores_that_all_underflow_give_finite_weights():
    class Low(nn.Module):
        def forward(self, x):
            return x[:, :E] * 0 - 200

    x = tokens(3).requires_grad_()
    routing = Router(Low(), TOP_2, num_experts=E, score=sigmoid)(x)
    routing.weights.sum().backward()
    assert routing.weights.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
def test_top_k_is_what_the_selector_gives(preset):
    router = make_router(preset)
    assert router.top_k == router(tokens(3)).top_k == {"switch": 1, "loss_free": 3}.get(preset, 4)
    assert router.num_experts == router(tokens(3)).num_experts == E


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("training", [True, False])
def test_routing_writes_nothing(preset, training):
    router = make_router(preset).train(training)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    one, other = router(tokens(20)), router(tokens(20))
    assert torch.equal(one.expert_ids, other.expert_ids) and torch.equal(one.weights, other.weights)
    assert all(torch.equal(value, before[name]) for name, value in router.state_dict().items())


def test_the_context_tells_the_hooks_everything():
    seen = []

    class Spy(Balancer):
        def adjust_logits(self, logits, context):
            seen.append(context)
            return logits

    router = flat_router(balancer=Spy())
    mask, ids = torch.tensor([True, False, True, True]), torch.arange(4)
    routing = router.eval()(tokens(4), mask, batch_shape=(2, 2), token_ids=ids)
    (context,) = seen
    assert routing.context is context
    assert context.mask is mask and context.token_ids is ids and context.batch_shape == (2, 2)
    assert context.gate_weight is router.gate.weight and not context.training
    assert router.train()(tokens(4)).context.training


def test_a_gate_of_another_width_is_named():
    with pytest.raises(ConfigError, match="the gate gives 5 logits, the router has 8 experts"):
        flat_router(gate=Gate(D, 5))(tokens(3))


def test_gate_starts_with_logits_of_unit_variance():
    torch.manual_seed(0)
    gate = Gate(256, 400)
    assert gate.weight.std().item() == pytest.approx(1 / 16, rel=0.02)
    assert gate(torch.randn(50, 256)).std().item() == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_routing_is_fp32_whatever_the_tokens(dtype):
    router = flat_router(balancer=LogitCorrection(E)).to(dtype)
    x = tokens(6, dtype=dtype)
    routing = router(x)
    assert {routing.logits.dtype, routing.scores.dtype, routing.weights.dtype} == {torch.float32}
    torch.testing.assert_close(routing.logits, x.float() @ router.gate.weight.float().T)


def test_routing_is_fp64_for_fp64_tokens():
    assert flat_router().double()(tokens(6, dtype=torch.float64)).weights.dtype == torch.float64


@pytest.mark.parametrize("gate", [Gate, partial(nn.Linear, bias=False)])
def test_autocast_does_not_reach_the_routing(gate):
    router, x = flat_router(gate=gate(D, E), balancer=LogitCorrection(E)), tokens(6)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    for name in ("logits", "scores", "weights", "expert_ids"):
        assert torch.equal(getattr(routing, name), getattr(expected, name)), name


def test_a_gate_by_itself_is_fp32_under_autocast():
    gate, x = Gate(D, E), tokens(6)
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate(x)
    assert torch.equal(logits, x @ gate.weight.T)


def test_somebody_elses_gate_in_a_bf16_model_still_gives_fp32_routing():
    router = flat_router(gate=nn.Linear(D, E, bias=False)).to(torch.bfloat16)
    routing = router(tokens(6, dtype=torch.bfloat16))
    assert {routing.logits.dtype, routing.scores.dtype, routing.weights.dtype} == {torch.float32}


def test_routing_is_a_pytree():
    routing = flat_router().eval()(tokens(4), torch.ones(4, dtype=torch.bool), batch_shape=(2, 2))
    leaves, structure = pytree.tree_flatten(routing)
    assert {id(leaf) for leaf in leaves if isinstance(leaf, torch.Tensor)} == {
        id(getattr(routing, n)) for n in ("logits", "scores", "expert_ids", "weights", "selected", "kept")
    } | {id(routing.context.mask), id(routing.context.gate_weight)}
    assert all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_unflatten(leaves, structure)
    assert isinstance(again, Routing) and again.weights is routing.weights
    detached = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, routing)
    assert isinstance(detached.context, RouterContext)
    assert not detached.logits.requires_grad and not detached.context.gate_weight.requires_grad
    assert detached.context.batch_shape == (2, 2) and detached.context.training is False
    assert detached.context.token_ids is None


def test_replace_changes_a_copy():
    routing = flat_router()(tokens(4))
    none = torch.zeros_like(routing.kept)
    changed = routing.replace(kept=none)
    assert changed.kept is none and routing.kept.all() and changed.weights is routing.weights


def test_weights_are_renormalised_however_small_their_scores_are():
    """Both experts lie 30 and 31 under the best one, and their softmax scores are below 1e-13."""
    logits = torch.tensor([[0.0, -30.0, -31.0]])
    chosen = partial(replay, expert_ids=torch.tensor([[1, 2]]))
    routing = Router(nn.Identity(), chosen, num_experts=3)(logits)
    assert torch.allclose(routing.weights, torch.tensor([-30.0, -31.0]).softmax(0))


def test_replayed_choices_say_how_many_places_they_have():
    chosen = partial(replay, expert_ids=torch.tensor([[1, 2], [0, 1], [2, 0]]))
    router = Router(nn.Identity(), chosen, num_experts=3)
    assert router.top_k == router(torch.zeros(3, 3)).top_k == 2


def test_padding_may_hold_nan():
    torch.manual_seed(0)
    router = Router(Gate(4, 6), partial(top_k, k=2), num_experts=6)
    x, mask = torch.randn(5, 4), torch.tensor([True, True, False, True, False])
    gradients = []
    for padding in (0.0, torch.nan):
        routing = router(x.where(mask[:, None], padding), mask)
        (gradient,) = torch.autograd.grad(routing.weights.square().sum(), router.gate.weight)
        gradients.append(gradient)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_an_error_in_the_selector_is_not_taken_for_a_lack_of_top_k():
    def broken(scores, context):
        return [scores.nothing], None

    with pytest.raises(TypeError, match=r"the selector broken fails on one token: .*'nothing'"):
        _ = Router(Gate(D, E), broken, num_experts=E).top_k
