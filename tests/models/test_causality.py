"""The suffix test: later tokens never change earlier logits, also in training mode, or the part says so."""

import pytest
import torch
from small_models import make_lm, make_moe, token_ids

from himoe import Capacity, observe, step

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

CAUSAL = {
    "hi_moe": lambda: make_moe("hi_moe", tau=0.5),
    "hi_moe, unequal groups": lambda: make_moe("hi_moe", groups=[[7, 0, 3], [1, 2], [4, 6, 5]], top_k=[2, 1, 1]),
    "hi_moe, shared expert": lambda: make_moe("hi_moe", shared_dim=8),
    "moge": lambda: make_moe("moge"),
    "switch": lambda: make_moe("switch", top_k=1),
    "loss_free": lambda: make_moe("loss_free", rate=0.1),
    "loss_free multiplicative": lambda: make_moe("loss_free", rate=0.1, multiplicative=True),
    "capacity, token by token": lambda: make_moe("switch", top_k=2, dispatcher=Capacity(0.6)),
    "grouped capacity": lambda: make_moe("hi_moe", dispatcher=Capacity(0.6)),
}
NOT_CAUSAL = {
    "same_batch": lambda: make_moe("hi_moe", tau=0.5, correction="same_batch"),
    "hi_moe_paper": lambda: make_moe("hi_moe_paper"),
    "hi_moe_official": lambda: make_moe("hi_moe_official"),
    "capacity, column by column": lambda: make_moe("switch", top_k=2, dispatcher=Capacity(0.6, order="column_major")),
    "capacity, by score": lambda: make_moe("switch", top_k=2, dispatcher=Capacity(0.6, order="score")),
    "capacity, batch prioritised": lambda: make_moe(
        "switch", top_k=2, dispatcher=Capacity(0.6, order="batch_prioritised")
    ),
}


def largest_change(make, *, training=True):
    """Change the end of one sequence of the batch; return the largest change of a logit before it in that sequence."""
    model = make_lm(lambda _: make(), vocab_size=40).double()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the even start, so that capacity and bias matter
            if parameter.ndim > 1:
                parameter.mul_(8)
        observe(model, model(token_ids(3, 10, seed=9))[1])
    step(model)
    model.train(training)
    ids, others = token_ids(3, 10), token_ids(3, 10, seed=1)
    largest = 0.0
    with torch.no_grad():
        logits, _ = model(ids)
        for row in range(3):
            for first in (1, 4, 9):
                changed = ids.clone()
                changed[row, first:] = others[row, first:]
                difference = (model(changed)[0] - logits)[row].abs()
                assert difference[first:].max() > 1e-6, "the change did not arrive"
                largest = max(largest, difference[:first].max().item())
    return largest


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("training", [True, False])
def test_suffix(name, training):
    assert largest_change(CAUSAL[name], training=training) < 1e-10


@pytest.mark.parametrize("name", NOT_CAUSAL)
def test_what_is_not_causal_leaks_and_is_labelled(name):
    assert largest_change(NOT_CAUSAL[name]) > 1e-6
    labels = [m.causal for m in NOT_CAUSAL[name]().modules() if hasattr(m, "causal")]
    assert False in labels


@pytest.mark.parametrize("name", CAUSAL)
def test_what_is_causal_is_labelled_so(name):
    assert all(m.causal for m in CAUSAL[name]().modules() if hasattr(m, "causal"))


def test_the_correction_of_the_same_batch_does_not_leak_in_eval():
    assert largest_change(NOT_CAUSAL["same_batch"], training=False) < 1e-10
