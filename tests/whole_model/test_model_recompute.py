"""Activation recompute of a whole model: routing, gradients, counts and state stay; less is kept than without."""

from functools import partial

import pytest
import torch
from router_zoo import PRESETS, E, V, capacity, loss_of, make_model, same, state_of, token_ids
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import himoe
from himoe.errors import ConfigError
from himoe.functional.dispatch import ORDERS

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

MODES = ["selective", "full"]
ZOO = {
    "everything": partial(make_model, "everything"),
    "remoe": partial(make_model, "remoe"),
    "capacity": partial(make_model, "switch", dispatcher=capacity()),
    "some layers": partial(make_model, "hi_moe", layers=(1,)),
}


def plain_checkpointing(model) -> None:
    """Wrap every block as somebody else's training code would."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def train_once(model, *, rows: int = 2):
    """Two micro-batches and a step: what every router decided, in order of its calls, gradients, balancer state."""
    seen = []
    for layer in himoe.moe_layers(model):
        layer.router.register_forward_hook(lambda module, inputs, routing: seen.append(routing.expert_ids.clone()))
    for seed in range(2):
        loss, routings = loss_of(model, token_ids(rows, seed=seed))
        loss.backward()
        himoe.observe(model, routings)
    himoe.step(model)
    return seen, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, state_of(model)


@pytest.mark.parametrize("mode", [*MODES, "somebody else's"])
@pytest.mark.parametrize("name", ZOO)
def test_recompute_changes_no_bit(name, mode):
    seen, grads, state = train_once(ZOO[name](dtype=torch.float32))
    model = ZOO[name](dtype=torch.float32)
    if mode in MODES:
        model.recompute = mode
    else:
        plain_checkpointing(model)
    seen_again, grads_again, state_again = train_once(model)
    layers = len(himoe.moe_layers(model))
    assert len(seen) == 2 * layers and len(seen_again) == 4 * layers  # every layer ran a second time
    for batch in range(2):
        expected = seen[batch * layers : (batch + 1) * layers]
        forward = seen_again[2 * batch * layers : (2 * batch + 1) * layers]
        backward = seen_again[(2 * batch + 1) * layers : (2 * batch + 2) * layers]  # the last layer comes first
        for one, other in ((expected, forward), (expected[::-1], backward)):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert same(grads, grads_again) and same(state, state_again)


class FickleGate(nn.Module):
    """A gate that orders experts and tokens one way in every first pass and the other way in every second one."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.calls = gate, 0

    @property
    def weight(self):
        return self.gate.weight

    def forward(self, x):
        self.calls += 1
        spread = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None] * torch.arange(E, dtype=x.dtype)
        return self.gate(x) * 0 + spread * (1e-11 if self.calls % 2 else -1e-11)


def fickle(name, dispatcher=None):
    model = make_model(name, layers=(1,), dispatcher=dispatcher)
    layer = himoe.moe_layers(model)[0]
    layer.router.gate = FickleGate(layer.router.gate)
    return model


@pytest.mark.parametrize(
    ("name", "dispatcher"),
    [*((name, None) for name in PRESETS), *(("switch", capacity(order)) for order in sorted(ORDERS))],
    ids=[*PRESETS, *sorted(ORDERS)],
)
def test_the_first_choice_is_kept_where_a_second_would_be_another(name, dispatcher):
    """Every choice flips when the layer runs again; forward and backward use the first all the same."""

    def outcome(prepare):
        model = fickle(name, dispatcher)
        prepare(model)
        layer, taken = himoe.moe_layers(model)[0], []
        layer.experts.register_forward_pre_hook(lambda _, given: taken.append((given[1].clone(), given[3].clone())))
        loss, routings = loss_of(model, token_ids())
        loss.backward()
        himoe.observe(model, routings)
        himoe.step(model)
        return taken, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, state_of(model)

    (once,), expected, expected_state = outcome(lambda model: None)
    for mode in MODES:
        (first, second), grads, state = outcome(lambda model, mode=mode: setattr(model, "recompute", mode))
        for kept in (0, 1):
            assert torch.equal(first[kept], once[kept]) and torch.equal(second[kept], once[kept])
        # The gate's own logits differ by 1e-9 between the passes, and so do the weights.
        assert same(grads, expected, tolerance=1e-7) and same(state, expected_state)
    (first, second), *_ = outcome(plain_checkpointing)
    assert not torch.equal(first[0], second[0])  # nothing above would hold if it were not for the modes


def test_a_noisy_gate_repeats_its_noise():
    class NoisyGate(nn.Module):
        def __init__(self, gate: nn.Module) -> None:
            super().__init__()
            self.gate = gate

        def forward(self, x):
            logits = self.gate(x)
            return logits + torch.randn_like(logits)

    outcomes = []
    for mode in ("none", *MODES):
        model = make_model("switch", dtype=torch.float32)
        model.recompute = mode
        for layer in himoe.moe_layers(model):
            layer.router.gate = NoisyGate(layer.router.gate)
        torch.manual_seed(7)
        outcomes.append(train_once(model)[1:])
    for grads, state in outcomes[1:]:
        assert same(grads, outcomes[0][0]) and same(state, outcomes[0][1])


class Living(TorchDispatchMode):
    """Counts the bytes of tensors made inside that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    @property
    def bytes(self) -> int:
        return sum(size for storage, size in self.made.values() if not storage.expired())


@pytest.mark.parametrize("name", ZOO)
def test_less_lives_until_backward(name):
    living = []
    for mode in ("none", *MODES):
        model = ZOO[name](dtype=torch.float32)
        model.recompute = mode
        with Living() as between:
            loss, routings = loss_of(model, token_ids(4, 32))
            living.append(between.bytes)
        loss.backward()
        assert len(routings) == len(himoe.moe_layers(model))  # alive until here
    none, selective, full = living
    assert full < 0.75 * selective and selective < 0.75 * none


@pytest.mark.parametrize("mode", MODES)
def test_one_autocast_context_may_hold_several_batches(mode):
    grads = []
    for recompute in ("none", mode):
        model = make_model("hi_moe", dtype=torch.float32)
        model.recompute = recompute
        with torch.autocast("cpu", torch.bfloat16):
            losses = [loss_of(model, token_ids(seed=seed))[0] for seed in range(2)]
        sum(losses).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    largest = max(grad.abs().max() for grad in grads[0].values())
    assert same(*grads, tolerance=0.02 * largest.item())


@pytest.mark.parametrize("mode", MODES)
def test_documents_and_padding_are_recomputed_too(mode):
    grads = []
    ids, mask = token_ids(2, 9), torch.arange(9).expand(2, 9) > 1
    for recompute in ("none", mode):
        model = make_model("hi_moe", dtype=torch.float32)
        model.recompute = recompute
        logits, routings = model(ids, mask, document_ids=torch.arange(9).expand(2, 9) // 4)
        (logits[mask].square().sum() + sum(himoe.aux_losses(model, routings).values())).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert same(*grads)


def test_without_gradients_nothing_is_kept_or_different():
    model = make_model("hi_moe")
    with torch.no_grad():
        plain = model(token_ids())[0]
        model.recompute = "full"
        assert torch.equal(model(token_ids())[0], plain) and plain.shape[-1] == V


def test_an_unknown_mode_is_named():
    model = make_model("hi_moe")
    with pytest.raises(ConfigError, match="recompute = 'some' must be none, selective or full"):
        model.recompute = "some"
    assert model.recompute == "none"
