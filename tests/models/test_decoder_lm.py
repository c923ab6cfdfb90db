"""The language model as a whole: shapes, layer patterns, padding, initialisation, precision, the meta device."""

import math
import warnings

import pytest
import torch
from small_models import D, V, make_lm, make_moe, token_ids
from torch.nn import functional as F

from himoe import Capacity, DecoderLM, aux_losses, moe_layers, observe, step
from himoe.errors import ConfigError
from himoe.nn import SwiGLU

PRESETS = ["hi_moe", "hi_moe_paper", "hi_moe_official", "moge", "switch", "loss_free"]
pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")


def mixed(layer):
    return make_moe(shared_dim=6) if layer % 2 else SwiGLU(D, 24)


def loss_of(model, ids):
    logits, routings = model(ids)
    task = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    return task + sum(aux_losses(model, routings).values()), routings


@pytest.mark.parametrize("tied", [True, False])
def test_logits_routings_and_gradients(tied):
    model = make_lm(num_layers=3, tie_embeddings=tied)
    ids = token_ids(2, 7)
    logits, routings = model(ids)
    assert logits.shape == (2, 7, V) and logits.dtype == torch.float32
    assert [r.context.batch_shape for r in routings] == [(2, 7)] * 3
    assert all(torch.equal(r.context.token_ids, ids.flatten()) for r in routings)
    assert (model.head.weight is model.embedding.weight) == tied
    loss_of(model, ids)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(layer.router.gate.weight.grad.any() for layer in moe_layers(model))


@pytest.mark.parametrize("tied", [True, False])
def test_with_targets_it_gives_the_mean_cross_entropy_of_its_logits(tied):
    model, ids = make_lm(num_layers=2, tie_embeddings=tied), token_ids(2, 9)
    targets = ids.flip(1)
    expected = F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten())
    loss, routings = model(ids, targets=targets)
    assert len(routings) == 2
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    for mine, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    model.head = torch.nn.Linear(D, V)  # with a bias
    expected = F.cross_entropy(model(ids)[0].flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(ids, targets=targets)[0], expected)
    with pytest.raises(ConfigError, match=r"DecoderLM: targets has shape \(2, 8\), token_ids \(2, 9\)"):
        model(ids, targets=targets[:, :8])


@pytest.mark.parametrize("bias", [False, True])
def test_padding_changes_no_loss_against_targets(bias):
    model, ids = make_lm(num_layers=2), token_ids(2, 9)
    model.head = torch.nn.Linear(D, V, bias=bias)
    mask = torch.arange(12).expand(2, 12) < 9
    padded, targets = F.pad(ids, (0, 3)), F.pad(ids.flip(1), (0, 3), value=-100)
    expected, _ = model(ids, targets=ids.flip(1))
    torch.testing.assert_close(model(padded, mask, targets=targets)[0], expected)


def test_any_pattern_of_dense_and_moe_layers():
    model = make_lm(mixed, num_layers=5)
    _, routings = model(token_ids(2, 4))
    assert model.moe_layer_indices() == [1, 3] and len(routings) == 2
    assert moe_layers(model) == [model.blocks[1].feed_forward, model.blocks[3].feed_forward]
    loss_of(model, token_ids(2, 4))[0].backward()
    dense = make_lm(lambda layer: SwiGLU(D, 24))
    assert dense.moe_layer_indices() == [] and dense(token_ids(2, 4))[1] == []


def test_blocks_are_pre_norm_residual():
    model = make_lm(mixed, num_layers=2)
    ids = token_ids(2, 5)
    x = model.embedding(ids)
    for block in model.blocks:
        x = x + block.attention(F.rms_norm(x, (D,), eps=1e-6))
        y = block.feed_forward(F.rms_norm(x, (D,), eps=1e-6))
        x = x + (y[0] if isinstance(y, tuple) else y)
    expected = F.rms_norm(x, (D,), eps=1e-6) @ model.embedding.weight.T
    torch.testing.assert_close(model(ids)[0], expected)


@pytest.mark.parametrize("shape", [(1, 1), (0, 4), (2, 0)])
def test_degenerate_batches(shape):
    logits, _ = make_lm()(token_ids(*shape))
    assert logits.shape == (*shape, V)
    logits.sum().backward()


@pytest.mark.parametrize("dispatcher", [None, Capacity(1.0)])
def test_padding_behind_the_text_changes_no_real_logit_loss_or_state(dispatcher):
    ids, model, same = token_ids(3, 6), *(make_lm(lambda _: make_moe(dispatcher=dispatcher)) for _ in range(2))
    padded = torch.cat([ids, token_ids(3, 4, seed=1)], dim=1)
    mask = torch.arange(10).expand(3, 10) < 6
    logits, routings = model(ids)
    padded_logits, padded_routings = same(padded, mask)
    torch.testing.assert_close(padded_logits[:, :6], logits)
    torch.testing.assert_close(aux_losses(same, padded_routings), aux_losses(model, routings))
    for m, r in ((model, routings), (same, padded_routings)):
        observe(m, r)
        step(m)
    for one, other in zip(model.buffers(), same.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_one_sequence_alone_equals_the_sequence_in_a_batch():
    model, ids = make_lm(), token_ids(8, 6)
    together = model(ids)[0]
    for i in range(8):
        torch.testing.assert_close(model(ids[i : i + 1])[0][0], together[i])


@pytest.mark.parametrize("tied", [True, False])
def test_initialisation_is_what_the_module_states(tied):
    def feed_forward(layer):
        options = {"dim": 128, "num_experts": 8, "expert_dim": 96, "expert_scale": True}
        return make_moe("hi_moe", shared_dim=64, **options) if layer % 2 else SwiGLU(128, 200)

    model = make_lm(feed_forward, vocab_size=500, dim=128, num_layers=6, num_heads=4, tie_embeddings=tied)
    residual = 0.02 / math.sqrt(2 * 6)
    kinds = {
        "embedding.weight": 0.02,
        "head.weight": 0.02,
        "qkv_proj.weight": 0.02,
        "out_proj.weight": residual,
        "gate_up_proj": 0.02,
        "gate_up_proj.weight": 0.02,
        "gate.weight": 0.02,
        "down_proj": residual,
        "down_proj.weight": residual,
    }
    seen = set()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            assert (parameter == 1).all(), name
            continue
        (kind,) = [k for k in kinds if name == k or name.endswith(f".{k}")]
        seen.add(kind)
        assert parameter.std().item() == pytest.approx(kinds[kind], rel=0.06), name
        assert abs(parameter.mean().item()) < 5 * kinds[kind] / parameter.numel() ** 0.5, name
    assert seen == kinds.keys() - ({"head.weight"} if tied else set())


def test_a_seed_fixes_the_model():
    one, same, other = make_lm(seed=3), make_lm(seed=3), make_lm(seed=4)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_model_built_on_the_meta_device_starts_like_any_other(preset, tied):
    expected = make_lm(lambda _: make_moe(preset), tie_embeddings=tied)
    with torch.device("meta"):
        model = make_lm(lambda _: make_moe(preset), tie_embeddings=tied)
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(math.nan if tensor.is_floating_point() else -1)
    model.reset_parameters()
    assert (model.head.weight is model.embedding.weight) == tied
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in expected.named_parameters()]
    for (name, parameter), like in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert parameter.isfinite().all() and parameter.dtype == like.dtype, name
        assert parameter.std().item() == pytest.approx(like.std().item(), rel=0.4), name
    for (name, buffer), like in zip(model.named_buffers(), expected.buffers(), strict=True):
        assert torch.equal(buffer, like) and buffer.dtype == like.dtype, name
    loss, routings = loss_of(model, token_ids(2, 8))
    loss.backward()
    observe(model, routings)
    step(model)
    assert loss.isfinite() and all(b.isfinite().all() for b in model.buffers())


def test_a_forward_pass_on_the_meta_device_costs_nothing_and_knows_the_shapes():
    with torch.device("meta"):
        model = make_lm(mixed, dim=D, num_layers=2)
        logits, routings = model(torch.zeros(3, 5, dtype=torch.int64))
        logits.sum().backward()
    assert logits.is_meta and logits.shape == (3, 5, V) and routings[0].expert_ids.shape == (15, 4)


def test_autocast_trains_fp32_weights_without_a_warning():
    model = make_lm()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where a fused kernel cannot take mixed dtypes
            with torch.autocast("cpu", torch.bfloat16):
                logits, routings = model(token_ids(2, 7))
            logits.float().sum().backward()
    finally:
        torch.set_warn_always(False)
    assert logits.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert {r.logits.dtype for r in routings} == {r.weights.dtype for r in routings} == {torch.float32}


def test_a_bf16_model_trains():
    model = make_lm().to(torch.bfloat16)
    loss, routings = loss_of(model, token_ids(2, 7))
    loss.backward()
    observe(model, routings)
    step(model)
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
    assert {r.logits.dtype for r in routings} == {b.dtype for b in model.buffers()} == {torch.float32}


@pytest.mark.parametrize("preset", ["hi_moe", "loss_free"])
def test_it_learns(preset):
    model = make_lm(lambda _: make_moe(preset))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = token_ids(4, 12)
    losses = []
    for _ in range(40):
        loss, routings = loss_of(model, ids)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        observe(model, routings)
        optimizer.step()
        step(model)
    assert losses[0] == pytest.approx(math.log(V), rel=0.1)  # a fresh model knows nothing
    assert losses[-1] < 0.5 * losses[0]


def test_a_layer_used_twice_is_refused_by_the_losses():
    shared = make_moe()
    model = make_lm(lambda _: shared)
    _, routings = model(token_ids(2, 4))
    with pytest.raises(ConfigError, match="2 routings for 1 MoE layers"):
        aux_losses(model, routings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size = 0 and num_layers = 2 must be ≥ 1"),
        ({"num_layers": 0}, "num_layers = 0 must be ≥ 1"),
        ({"num_heads": 3}, "dim = 16 must be a multiple of num_heads = 3"),
        ({"num_heads": 16}, "with an even quotient"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads a multiple of num_kv_heads = 3"),
    ],
)
def test_sizes_that_cannot_work_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        make_lm(**options)


def test_a_mask_of_another_shape_is_named():
    with pytest.raises(ConfigError, match=r"mask has shape \(2, 3\), token_ids \(2, 4\)"):
        make_lm()(token_ids(2, 4), torch.ones(2, 3, dtype=torch.bool))


def test_the_head_stays_tied_through_copies_moves_and_dtypes():
    model = make_lm()
    assert isinstance(model, DecoderLM)
    for convert in (lambda m: m.double(), lambda m: m.bfloat16(), lambda m: m.to("cpu")):
        assert convert(model).head.weight is model.embedding.weight
