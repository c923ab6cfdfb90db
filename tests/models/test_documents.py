"""Documents packed into one row: none sees another, as if each stood in a row of its own."""

import pytest
import torch
from small_models import make_lm, make_moe, token_ids

from himoe import Capacity, aux_losses, observe, step
from himoe.errors import ConfigError
from himoe.nn import GELUMLP, SwiGLU

MODELS = {
    "hi_moe": lambda layer: make_moe("hi_moe", tau=0.5),
    "moge, shared expert": lambda layer: make_moe("moge", shared_dim=8),
    "switch": lambda layer: make_moe("switch", top_k=1),
    "loss_free": lambda layer: make_moe("loss_free"),
    "deepseek_v3": lambda layer: make_moe("deepseek_v3", num_groups=4),
    "dense": lambda layer: SwiGLU(16, 24),
    "dense, gelu": lambda layer: GELUMLP(16, 24),
}
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [5, 6, 6, 6, 6, 6, 6, 6, 7]])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_packed_document_is_what_it_is_alone(name):
    model = make_lm(MODELS[name], num_kv_heads=1).double()
    ids = token_ids(2, 9)
    packed, _ = model(ids, document_ids=DOCUMENTS)
    for row, documents in zip(range(2), DOCUMENTS, strict=True):
        for document in documents.unique():
            here = documents == document
            alone, _ = model(ids[row : row + 1, here])
            # Positions count from the row's start, and the rotary angles are fp64 here.
            torch.testing.assert_close(packed[row, here], alone[0], rtol=0, atol=1e-12)


@torch.no_grad()
def test_changing_one_document_changes_no_other_and_without_ids_it_does():
    model, ids = make_lm(), token_ids(2, 9)
    changed = ids.clone()
    changed[0, :3] = (ids[0, :3] + 1) % 40
    same = model(ids, document_ids=DOCUMENTS)[0][0, 3:] == model(changed, document_ids=DOCUMENTS)[0][0, 3:]
    assert same.all()
    assert not torch.allclose(model(ids)[0][0, 3:], model(changed)[0][0, 3:])


@torch.no_grad()
def test_one_document_per_row_is_the_plain_causal_model():
    model, ids = make_lm(), token_ids(3, 7)
    one = model(ids, document_ids=torch.arange(3)[:, None].expand(3, 7))[0]
    torch.testing.assert_close(one, model(ids)[0])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dispatcher", [None, Capacity(1.0)])
def test_padding_beside_documents_changes_nothing(side, dispatcher):
    (model, padded), ids = (
        (make_lm(lambda _: make_moe(dispatcher=dispatcher)).double() for _ in range(2)),
        token_ids(2, 9),
    )
    more = token_ids(2, 4, seed=1)
    order = (lambda *parts: parts[::-1]) if side == "left" else (lambda *parts: parts)
    padded_ids = torch.cat(order(ids, more), 1)
    documents = torch.cat(order(DOCUMENTS, torch.zeros_like(more)), 1)  # padding may carry any id
    mask = torch.cat(order(torch.ones_like(ids), torch.zeros_like(more)), 1).bool()
    logits, routings = model(ids, document_ids=DOCUMENTS)
    padded_logits, padded_routings = padded(padded_ids, mask, document_ids=documents)
    torch.testing.assert_close(padded_logits[mask].view_as(logits), logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(aux_losses(padded, padded_routings), aux_losses(model, routings))
    for m, r in ((model, routings), (padded, padded_routings)):
        observe(m, r)
        step(m)
    for one, other in zip(model.buffers(), padded.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_gradients_stay_inside_a_document():
    model, ids = make_lm(), token_ids(2, 9)
    embedded = model.embedding.weight[ids].detach().requires_grad_()
    model.embedding.register_forward_hook(lambda *_: embedded)
    logits, _ = model(ids, document_ids=DOCUMENTS)
    logits[0, 3:7].square().sum().backward()
    reached = embedded.grad.any(-1)
    assert reached[0].tolist() == [False] * 3 + [True] * 4 + [False] * 2 and not reached[1].any()


def test_a_mask_of_numbers_is_named():
    with pytest.raises(ConfigError, match=r"mask is torch.int64, must be torch.bool"):
        make_lm()(token_ids(2, 4), torch.ones(2, 4, dtype=torch.int64))


def test_document_ids_of_another_shape_are_named():
    with pytest.raises(ConfigError, match=r"document_ids has shape \(2, 3\), token_ids \(2, 4\)"):
        make_lm()(token_ids(2, 4), document_ids=torch.zeros(2, 3, dtype=torch.int64))
