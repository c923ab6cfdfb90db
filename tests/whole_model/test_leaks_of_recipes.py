"""No recipe lets a token see what it must not: later tokens, padding, other documents of its row."""

import dataclasses

import pytest
import torch
from small_recipe import END, VOCAB, small_recipe, tokens
from torch.nn import functional as F

import himoe
from himoe.balance import Balancer, LogitCorrection
from himoe.config import recipe_names
from himoe.functional import stats
from himoe.train.batches import document_ids

RECIPES = recipe_names()
TINY = 1e-10  # rounding in fp64
SHOWS = 1e-6


def largest_change(model, ids, changed, where):
    """Return the largest change of the logits of `where`, and that of the others, when tokens change."""
    with torch.no_grad():
        difference = (model(*changed)[0] - model(*ids)[0]).abs().amax(-1)
    return difference[where].max().item(), difference[~where].max().item()


def after_one_step(model, ids, mask, documents=None):
    """Return by name all that a training step comes to: real logits, loss terms, counts, gradients, states."""
    model.zero_grad()
    logits, routings = model(ids, mask, document_ids=documents)
    real = logits if mask is None else logits[mask]
    terms = himoe.aux_losses(model, routings)
    task = F.cross_entropy(real.flatten(0, -2), (ids if mask is None else ids[mask]).flatten())
    (task + sum(terms.values())).backward()
    found = {"logits": real.detach().flatten(0, -2), "loss": task.detach()}
    found |= {f"term {name}": value.detach() for name, value in terms.items()}
    found |= {f"count {layer}": stats.selected_load(routing) for layer, routing in enumerate(routings)}
    found |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    himoe.observe(model, routings)
    found |= {
        f"sum {name} {key}": value.clone()
        for name, part in model.named_modules()
        if isinstance(part, Balancer)
        for key, value in part.sums.items()
    }
    himoe.step(model)
    return found | {f"state {name}": buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        tolerance = 1e-6 if name.startswith("state") else 1e-9  # balancers keep fp32
        torch.testing.assert_close(other[name], value, rtol=tolerance, atol=tolerance, msg=f"{name} differs")


# --- later tokens


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", RECIPES)
def test_later_tokens_change_nothing_before_them(name, training):
    model = small_recipe(name).train(training)
    assert all(getattr(part, "causal", True) for part in model.modules())
    ids = tokens(2, 10)
    for first in (1, 5, 9):
        changed = ids.clone()
        changed[0, first:] = tokens(1, 10, seed=1)[0, first:]
        behind = torch.zeros(2, 10, dtype=torch.bool)
        behind[0, first:] = True
        there, elsewhere = largest_change(model, (ids,), (changed,), behind)
        assert there > SHOWS
        assert elsewhere < TINY


def test_the_suffix_test_notices_statistics_of_the_same_batch():
    with pytest.warns(himoe.errors.HimoeWarning, match="not causal"):
        sets = ("moe.options.correction=same_batch", "moe.options.tau=0.5", "moe.allow_non_causal=true")
        model = small_recipe("lm_small", sets=sets)
    ids = tokens(1, 10)
    changed = ids.clone()
    changed[0, 5:] = tokens(1, 10, seed=1)[0, 5:]
    behind = torch.arange(10)[None] >= 5
    assert largest_change(model, (ids,), (changed,), behind)[1] > SHOWS


# --- padding


@pytest.mark.parametrize(("before", "after"), [(4, 0), (0, 4)], ids=["left", "right"])
@pytest.mark.parametrize("name", RECIPES)
def test_padding_changes_nothing(name, before, after):
    ids = tokens(2, 7)
    alone = after_one_step(small_recipe(name), ids, None)
    padded = tokens(2, before + 7 + after, seed=3)
    padded[:, before : before + 7] = ids
    mask = F.pad(torch.ones_like(ids, dtype=torch.bool), (before, after))
    assert_same(alone, after_one_step(small_recipe(name), padded, mask))
    unmasked = small_recipe(name)(padded)[0][:, before : before + 7].flatten(0, 1)
    assert before == 0 or (unmasked - alone["logits"]).abs().max() > SHOWS  # it is the mask that hides them


def test_the_padding_test_notices_padding_in_the_sums(monkeypatch):
    observe = LogitCorrection.observe

    def forgetful(self, routing):
        observe(self, routing.replace(context=dataclasses.replace(routing.context, mask=None)))

    monkeypatch.setattr(LogitCorrection, "observe", forgetful)
    ids = tokens(2, 7)
    alone = after_one_step(small_recipe("lm_small"), ids, None)
    padded = after_one_step(small_recipe("lm_small"), F.pad(ids, (0, 4)), torch.arange(11).lt(7).expand(2, -1))
    with pytest.raises(AssertionError, match=r"^sum \S+ tokens differs"):
        assert_same(alone, padded)


# --- document borders

ROW = torch.tensor([[7, 3, 9, 4, END, 8, 8, 5, 2, 6, 1, END, 3, 5, END, END, 9]])
DOCUMENTS = torch.from_numpy(document_ids(ROW.numpy(), END))


def test_the_row_is_of_documents_of_several_lengths():
    assert DOCUMENTS.unique_consecutive(return_counts=True)[1].tolist() == [4, 7, 3, 1, 2]
    assert ROW.max() < VOCAB


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_document_changes_nothing_in_the_others_of_its_row(name, training):
    model = small_recipe(name).train(training)
    for document in (0, 1):
        own = document == DOCUMENTS
        changed = torch.where(own & (ROW != END), tokens(1, ROW.shape[1], seed=4), ROW)

        def read(ids):
            return model(ids, document_ids=DOCUMENTS)

        there, elsewhere = largest_change(read, (ROW,), (changed,), own)
        assert there > SHOWS
        assert elsewhere < TINY
        assert largest_change(model, (ROW,), (changed,), own)[1] > SHOWS  # which they do where attention may cross


@pytest.mark.parametrize("name", RECIPES)
def test_a_packed_row_is_its_documents_alone(name):
    """Every document in a row of its own, padded to one length: the same tokens, so also the same terms and counts."""
    packed = after_one_step(small_recipe(name), ROW, None, DOCUMENTS)
    lengths = DOCUMENTS.unique_consecutive(return_counts=True)[1].tolist()
    rows = torch.nn.utils.rnn.pad_sequence(ROW[0].split(lengths), batch_first=True, padding_value=11)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    assert_same(packed, after_one_step(small_recipe(name), rows, mask))


@pytest.mark.parametrize("name", RECIPES)
def test_no_gradient_crosses_a_border(name):
    """The loss of one document moves no embedding at the places of the others."""

    def moves_others(documents):
        model, embedded = small_recipe(name), []
        model.embedding.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
        logits, _ = model(ROW, document_ids=documents)
        (gradient,) = torch.autograd.grad(logits[DOCUMENTS == 1].logsumexp(-1).sum(), embedded)
        return gradient[DOCUMENTS != 1].abs().max()

    assert moves_others(DOCUMENTS) == 0
    assert moves_others(None) > SHOWS
