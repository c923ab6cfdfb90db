"""Every entry of every table in a whole language model: what a batch may not change, and what it must not break."""

import inspect
import sys

import pytest
import torch
from every_entry import (
    CAPACITIES,
    EVERY,
    PRESETS_WITH_CAPACITY,
    D,
    E,
    G,
    assert_same,
    claims_causal,
    gradients,
    id_of,
    loss_of,
    make,
    moved,
    parts_of,
    replayed,
    state_of,
    steady_noise,
    sums_of,
    tokens,
    training_step,
)
from torch import Tensor

import himoe
from himoe import Router
from himoe.functional.bound import unbound
from himoe.functional.selection import round_robin
from himoe.functional.stats import drop_rate, selected_load
from himoe.registry import TABLES, fact
from himoe.testing import suffix_test
from himoe.types import RouterContext

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


@pytest.fixture(autouse=True)
def _steady_noise(monkeypatch):
    monkeypatch.setattr(Router, "standard_noise", steady_noise)


def every(entries=EVERY):
    return pytest.mark.parametrize("entry", entries, ids=id_of)


# --- padding


def assert_padding_changes_nothing(entry, **options) -> dict[str, Tensor]:
    ids = tokens(2, 7, seed=2)
    assert ids[0, 0] != ids[1, 0]  # equal tokens would be equal up to rounding, and so would their place in a queue
    padded, mask = tokens(2, 11, seed=1), torch.zeros(2, 11, dtype=torch.bool)
    padded[0, :7], padded[1, 4:] = ids[0], ids[1]  # behind one text, before the other
    mask[0, :7] = mask[1, 4:] = True
    alone = training_step(moved(entry, **options), ids)
    assert_same(alone, training_step(moved(entry, **options), padded, mask))
    return alone


@every()
def test_padding_changes_no_loss_term_count_sum_state_or_gradient(entry):
    assert_padding_changes_nothing(entry)


@pytest.mark.parametrize(("preset", "order"), PRESETS_WITH_CAPACITY)
def test_nor_a_place_of_any_preset_under_capacity(preset, order):
    alone = assert_padding_changes_nothing(("presets", preset), capacity_factor=0.25, capacity_order=order)
    assert sum(int(alone[f"kept {layer}"].sum()) for layer in (0, 1)) < sum(
        int(alone[f"selected {layer}"].sum()) for layer in (0, 1)
    )


# --- micro-batches

ROWS = 4


def says_not_linear(model) -> bool:
    """Whether a balancer says in its file that its losses are not linear in what a batch holds."""
    docs = (inspect.getdoc(sys.modules[type(part).__module__]) or "" for part in parts_of(model))
    return any("not linear" in " ".join(doc.split()) for doc in docs)


def goes_by_the_batch(model) -> bool:
    """Whether a token's experts depend on other tokens; in turn they depend on the place in the batch."""
    return not claims_causal(model) or any(selector_of(layer) is round_robin for layer in himoe.moe_layers(model))


def selector_of(layer):
    return getattr(layer.router.selector, "func", layer.router.selector)


def accumulated(entry, micro_batches: int) -> dict[str, Tensor]:
    """Terms and gradients, mean over the micro-batches; sums and state of the optimizer step."""
    model, found = moved(entry), {}
    for ids in tokens(ROWS, 6).chunk(micro_batches):
        task, terms, routings = loss_of(model, ids)
        values = {f"term {name}": value.detach() for name, value in terms.items()}
        values |= {f"gradient {name}": v for name, v in gradients(model, sum(terms.values(), task)).items()}
        for name, value in values.items():
            found[name] = found.get(name, 0) + value / micro_batches
        himoe.observe(model, routings)
    found |= {f"sum {name}": value for name, value in sums_of(model).items()}
    himoe.step(model)
    return found | {f"state {name}": value for name, value in state_of(model).items()}


@every([entry for entry in EVERY if entry[0] in ("balancers", "presets")])
def test_equal_micro_batches_are_one_batch_or_the_file_says_that_they_are_not(entry):
    """What is driven by counts and sums is the same always; losses, unless their file says `not linear`."""
    whole, model = accumulated(entry, 1), make(entry)
    first_layer = len(parts_of(model)) // 2
    for count in (2, 4):
        parts = accumulated(entry, count)
        names = [name for name in whole if name.startswith(("sum", "state"))]
        if goes_by_the_batch(model):  # what the first layer sees does not
            of_first = {f"sum {i}" for i in range(first_layer)}
            names = [n for n in names if n.startswith("state blocks.1.") or " ".join(n.split()[:2]) in of_first]
        assert_same({name: whole[name] for name in names}, {name: parts[name] for name in names})
        losses = {name: value for name, value in whole.items() if name.startswith(("term", "gradient"))}
        if says_not_linear(model):
            apart = max((whole[name] - parts[name]).abs().max() for name in losses if name.startswith("term"))
            assert apart > 1e-7
        elif not goes_by_the_batch(model):
            assert_same(losses, {name: parts[name] for name in losses})


# --- later tokens, and the other texts of the batch


@pytest.mark.parametrize(("preset", "order"), PRESETS_WITH_CAPACITY)
def test_places_leave_earlier_tokens_alone_where_the_model_says_so(preset, order):
    model = moved(("presets", preset), capacity_factor=0.25, capacity_order=order)
    test = suffix_test(model, tokens(1, 20), cuts=[5, 12, 17], modes=["training"])
    if claims_causal(model):
        assert test.causal, test.leaks
    assert any(drop_rate(routing) > 0 for routing in model.train()(tokens(1, 20))[1])


@every([*CAPACITIES, ("selectors", "replay")])
def test_what_no_card_can_name_is_causal_where_it_says_so_and_only_there(entry):
    """`tests/testing/test_causality_of_entries.py` has all other entries."""
    model = moved(entry)
    assert suffix_test(model, tokens(3, 20)).causal == claims_causal(model)


@every()
def test_without_capacity_a_text_alone_is_the_text_among_eight(entry):
    """But for what goes by the batch; in eval mode most of that does not either."""
    model = moved(entry, dtype=torch.float32)
    ids, apart = tokens(8, 7), {}
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            together, routings = model(ids)
            alone = [model(ids[row : row + 1]) for row in range(8)]
        apart[training] = max((together[row] - logits[0]).abs().max().item() for row, (logits, _) in enumerate(alone))
        for layer, routing in enumerate(routings):
            chosen = routing.expert_ids.where(routing.selected, -1)
            if not goes_by_the_batch(model):
                assert torch.equal(chosen, torch.cat([found[layer].expert_ids.where(found[layer].selected, -1)
                                                      for _, found in alone]))  # fmt: skip
    assert (max(apart.values()) < 1e-4) != goes_by_the_batch(model)


# --- batches at the edge


def assert_finite(model, ids: Tensor, mask: Tensor | None = None) -> list:
    """Two steps whose losses, gradients and states are numbers."""
    for _ in range(2):
        task, terms, routings = loss_of(model, ids, mask)
        values = [*gradients(model, sum(terms.values(), task if task.isfinite() else task.nan_to_num())).values()]
        himoe.observe(model, routings)
        himoe.step(model)
        assert all(value.isfinite().all() for value in [*terms.values(), *values, *model.buffers()])
    return routings


@every()
def test_one_token_one_repeated_token_and_none(entry):
    model = make(entry, dtype=torch.float32)
    assert_finite(model, tokens(1, 1))
    assert_finite(model, torch.full((2, 9), 5))
    before = state_of(model)
    logits, routings = model(tokens(1, 4), torch.zeros(1, 4, dtype=torch.bool))
    terms = himoe.aux_losses(model, routings)
    himoe.observe(model, routings)
    himoe.step(model)
    assert logits.isfinite().all() and all(value.isfinite() for value in terms.values())
    assert not any(routing.selected.any() or routing.kept.any() for routing in routings)
    assert_same(before, state_of(model))


def all_groups(entry):
    """What lets a token reach all experts where by default it reaches those of some groups."""
    table, name = entry
    option, divisor = fact(table, name, "keep_groups", ("", None)) if table in TABLES else ("", None)
    where = "selector_options" if table == "selectors" else "options"
    return {where: {option: G}} if divisor else {}


@every()
def test_every_token_may_have_every_expert(entry):
    model = make(entry, dtype=torch.float32, top_k=E, **all_groups(entry))
    for routing in assert_finite(model, tokens(2, 9)):
        assert (routing.selected.sum(-1) <= E).all()
        assert routing.selected.all() or has_a_rule(model) or entry == ("selectors", "replay")


def has_a_rule(model) -> bool:
    """Whether the selector takes as many experts as a rule wants, not always K."""
    return any(hasattr(selector_of(layer), "wanted") for layer in himoe.moe_layers(model))


def is_blind(layer):
    """Whether the selector does not ask which experts a token likes best, or not all of the tokens."""
    selector, context = layer.router.selector, RouterContext(batch_shape=(9,), token_ids=torch.arange(9))
    if layer.router.selector is replayed or getattr(unbound(selector), "balances_load", False):
        return True
    likes = torch.rand(9, E, generator=torch.Generator().manual_seed(0))
    return all(torch.equal(*pair) for pair in zip(selector(likes, context), selector(1 - likes, context), strict=True))


@every()
def test_some_experts_may_have_all_tokens_and_the_others_none(entry):
    model = make(entry, dtype=torch.float32)
    direction = torch.randn(2 * D, generator=torch.Generator().manual_seed(0)).sign()
    with torch.no_grad():  # all tokens look alike to the gates, and by far prefer every second expert
        for layer in himoe.moe_layers(model):
            gate = layer.router.gate
            liking = torch.tensor([1.0, -1.0]).repeat(E // 2)[:, None]
            gate.weight.copy_(liking * 20 * direction[: gate.weight.shape[1]])
            layer.register_forward_pre_hook(lambda _, given: (direction[:D].expand_as(given[0]), *given[1:]))
        first = model(tokens(2, 9))[1]
    assert_finite(model, tokens(2, 9))
    if not any(map(is_blind, himoe.moe_layers(model))):
        for routing in first:
            loads = selected_load(routing)
            assert loads.max() == 18 and loads.min() in (0, 18 if has_a_rule(model) else 0)
