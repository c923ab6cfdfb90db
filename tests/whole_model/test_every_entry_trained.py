"""Every entry of every table in a whole language model that trains: state, recompute, evaluation, decay, memory."""

from functools import partial

import pytest
import torch
from every_entry import (
    CAPACITIES,
    EVERY,
    assert_same,
    gradients,
    id_of,
    loss_of,
    make,
    measure_largest,
    moved,
    parts_of,
    state_of,
    sums_of,
    tokens,
    train,
)
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import himoe
from himoe.functional.histogram import BINS
from himoe.train.optimizer import build_optimizer, decay_groups

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def every(entries=EVERY):
    return pytest.mark.parametrize("entry", entries, ids=id_of)


# --- losses


@every()
def test_losses_are_each_layers_own_added_up_and_train_every_gate(entry):
    model = moved(entry)
    _, terms, routings = loss_of(model, tokens(3, 9))
    layers = himoe.moe_layers(model)
    own = [layer.router.balancer.losses(routing) for layer, routing in zip(layers, routings, strict=True)]
    assert all(found.keys() == terms.keys() for found in own)
    for name, value in terms.items():
        torch.testing.assert_close(value, sum(found[name] for found in own))
        for i, layer in enumerate(layers):
            (grad,) = torch.autograd.grad(own[i][name], layer.router.gate.weight, retain_graph=True)
            assert grad.isfinite().all() and grad.abs().max() > 1e-8


# --- state


@every()
def test_state_moves_once_a_step_in_place_and_in_training_alone(entry):
    model = moved(entry)
    before, places = state_of(model), {name: value.data_ptr() for name, value in model.named_buffers()}
    for mode in (True, False):
        task, terms, routings = loss_of(model.train(mode), tokens(2, 9, seed=8))
        gradients(model, sum(terms.values(), task))
    himoe.observe(model, routings)  # validation that calls everything by mistake
    assert not sums_of(model)
    assert_same(before, state_of(model))
    model.train()
    for seed in (8, 9):
        himoe.observe(model, model(tokens(2, 9, seed=seed))[1])
        assert_same(before, state_of(model))
    himoe.step(model)
    assert not sums_of(model)
    assert {name: value.data_ptr() for name, value in model.named_buffers()} == places
    after = state_of(model)
    if before:
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert not any(value.requires_grad for value in model.buffers())


@every()
def test_state_is_exact_in_a_bf16_model_and_goes_on_where_it_was_saved(entry):
    model = moved(entry, dtype=torch.float32)
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    before = state_of(model)
    other = make(entry, dtype=torch.float32)
    other.load_state_dict(saved)
    for one in (model, other):
        train(one, [tokens(3, 9, seed=5)])
    assert_same(state_of(model), state_of(other), 0.0)
    other.load_state_dict(saved)
    other.to(torch.bfloat16)
    assert_same(before, state_of(other), 0.0)
    train(other, [tokens(3, 9, seed=5)])
    for name, value in other.named_buffers():
        assert value.dtype == before[name].dtype != torch.bfloat16 and value.isfinite().all()
    fresh = make(entry, dtype=torch.float32)
    fresh.load_state_dict({name: value.to(torch.bfloat16) for name, value in saved.items()})
    assert all(value.dtype == before[name].dtype for name, value in fresh.named_buffers())


@every()
def test_state_starts_the_same_on_the_meta_device_and_is_no_optimizers(entry):
    with torch.device("meta"):
        model = make(entry, dtype=torch.float32)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)  # what is in empty memory is anybody's guess
    model.reset_parameters()
    assert_same(state_of(make(entry, dtype=torch.float32)), state_of(model))
    assert not any((p == 7).all() for layer in himoe.moe_layers(model) for p in layer.router.parameters())
    owned = {id(p) for group in build_optimizer(model, 1e-3).param_groups for p in group["params"]}
    assert owned == {id(p) for p in model.parameters()} and not owned & {id(buffer) for buffer in model.buffers()}
    assert not any(list(part.parameters()) for part in parts_of(model))
    decayed = {id(p) for p in decay_groups(model, 0.1)[0]["params"]}
    assert not any(id(p) in decayed for p in model.parameters() if p.ndim < 2)


# --- recompute


def plain_checkpointing(model) -> None:
    """Wrap every block as somebody else's training code would."""
    for block in model.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def outcome(entry, mode: str):
    """What a training step comes to, and every choice in order of the calls; noise is drawn, the same each time."""
    model, seen = make(entry, dtype=torch.float32), []
    if mode == "somebody else's":
        plain_checkpointing(model)
    else:
        model.recompute = mode
    for layer in himoe.moe_layers(model):
        layer.register_forward_hook(lambda _, given, made: seen.append((made[1].expert_ids, made[1].kept)))
    torch.manual_seed(7)
    with set_checkpoint_early_stop(False):  # all of a layer runs again, though not all of it is needed
        task, terms, routings = loss_of(model, tokens(2, 9))
        sum(terms.values(), task).backward()
    himoe.observe(model, routings)
    found = {f"sum {name}": value for name, value in sums_of(model).items()}
    himoe.step(model)
    found |= {f"state {name}": value for name, value in state_of(model).items()}
    return seen, found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every([*EVERY, *CAPACITIES])
def test_recompute_changes_no_bit(entry):
    (first, second), expected = outcome(entry, "none")
    for mode in ("selective", "full", "somebody else's"):
        seen, found = outcome(entry, mode)
        assert len(seen) == 4  # both layers ran again, the last one first
        for one, other in zip((first, second, second, first), seen, strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
        assert_same(expected, found, 0.0)


# --- evaluation


@every()
def test_evaluation_is_a_function_of_the_text(entry):
    """No noise, no auxiliary term in the loss, no random number drawn, nothing moved."""
    model = moved(entry).eval()
    before, generator = state_of(model), torch.get_rng_state()
    with torch.no_grad():
        (one, _), (other, _) = model(tokens(2, 9)), model(tokens(2, 9))
    assert torch.equal(one, other) and torch.equal(generator, torch.get_rng_state())
    assert_same(before, state_of(model))


# --- memory


@torch.no_grad()
@every([*EVERY, *CAPACITIES])
def test_no_table_of_tokens_times_choices_times_experts(entry):
    """The largest tensor of routing, losses and statistics is of the size of the logits, or of the pairs' values."""
    count, wide = 256, 32
    model = make(entry, dtype=torch.float32, num_experts=wide, top_k=8)
    layer = himoe.moe_layers(model)[0]
    x, ids = torch.randn(1, count, 8), tokens(1, count)
    if entry == ("selectors", "replay"):
        pytest.skip("its choice is given from outside")
    routing = layer(x, token_ids=ids)[1]
    router = measure_largest(
        lambda: layer.router(x[0], token_ids=ids[0], batch_shape=(1, count))  # what is chosen, and by what
    )
    assert router <= count * wide
    dispatched = measure_largest(lambda: layer.dispatcher(x[0], routing, lambda x, *_: x))
    assert dispatched <= count * wide
    balancer = layer.router.balancer
    assert measure_largest(lambda: balancer.losses(routing)) <= count * wide
    assert measure_largest(lambda: balancer.observe(routing)) <= max(count, BINS) * wide
    for part in parts_of(model):
        assert all(value.numel() <= wide * BINS and value.shape[:1] in ((), (wide,)) for value in part.sums.values())
