"""Planned memory against the bytes that a real forward pass keeps, and a rank's share worked by hand."""

import pytest
import torch
from planned import planned
from torch.profiler import ProfilerActivity, profile

import himoe
from himoe.build import build_model
from himoe.config import load_config
from himoe.errors import ConfigError
from himoe.plan import memory, parameters, shape_of
from himoe.plan.memory import FP32, Ranks, _copies, _head, _whole_layer
from himoe.train.optimizer import build_optimizer

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

SIZES = {"model": {"dim": 128, "num_heads": 4, "num_kv_heads": 2, "num_layers": 3, "ffn_dim": 96}}


def kept_bytes(config):
    """Return what a forward pass in training leaves allocated, after one that has warmed things up."""
    vocab_size, length = shape_of(config).vocab_size, config.train.seq_len
    model = build_model(config, vocab_size).train()
    model.recompute = config.train.recompute
    tokens = torch.randint(vocab_size, (config.train.batch_size, length))
    documents = (torch.arange(length) >= length // 2).long().expand_as(tokens)

    def forward():
        with torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
            loss, routings = model(tokens, targets=tokens, document_ids=documents)
            return loss + sum(himoe.aux_losses(model, routings).values())

    forward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        kept = forward()
    assert kept.requires_grad
    return sum(event.self_cpu_memory_usage for event in measured.key_averages())


def planned_bytes(config):
    """Return what is planned for that moment: no layer runs a second time yet, and no chunk of logits is left."""
    shape, train = shape_of(config), config.train
    held, tokens = memory(shape, train), train.batch_size * train.seq_len
    found = held.activations + FP32 * shape.dim * (shape.vocab_size + tokens)
    if train.recompute == "none":
        return found + held.cast_weights
    size = 2 if train.precision == "bf16" else 4
    return found - tokens * max(_whole_layer(layer, shape.dim, size, train.seq_len, True) for layer in shape.layers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", ["hi_moe", "dense", "shared", "gelu_experts", "pools"])
def test_a_forward_pass_keeps_the_bytes_that_are_planned(variant, recompute, precision):
    sets = {"recompute": recompute, "precision": precision, "batch_size": 4, "seq_len": 128}
    config = planned(variant, model=SIZES["model"], **sets)
    assert planned_bytes(config) == pytest.approx(kept_bytes(config), rel=0.1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("variant", ["hi_moe_official", "shared_gate", "constant_experts", "cosine"])
def test_the_state_of_the_optimizer_is_exact(variant, optimizer):
    config = planned(variant, optimizer=optimizer)
    model = build_model(config, 257)
    built = build_optimizer(model, 1e-3, optimizer=optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    built.step()
    held = memory(shape_of(config), config.train)
    state = [tensor for one in built.state.values() for tensor in one.values() if tensor.ndim]
    assert held.optimizer == sum(tensor.nbytes for tensor in state)
    assert held.weights == held.gradients == sum(parameter.nbytes for parameter in model.parameters())


def test_ranks_share_experts_and_with_shards_everything():
    config = load_config("olmoe_7b", sets=["train.ema_decay=0.999", "train.precision=fp32"])
    shape, train = shape_of(config), config.train
    total, experts = parameters(shape).total, parameters(shape).by_role["experts"]
    alone, shared = memory(shape, train), memory(shape, train, Ranks(8, 4))
    split = memory(shape, train, Ranks(8, 4, shard=True))
    assert alone.weights == 4 * total
    assert shared.weights == 4 * (total - experts + experts // 4)
    assert split.weights == 4 * total // 8
    for held in (alone, shared, split):
        assert held.optimizer == 2 * held.weights and held.gradients == held.average == held.weights
    assert (alone.cast_weights, shared.cast_weights) == (0, 0)
    one_layer = 4 * 2048 * 2048 + 64 * 3 * 2048 * 1024 // 4
    assert split.cast_weights == 2 * FP32 * one_layer
    assert alone.total == sum(
        getattr(alone, name)
        for name in ("weights", "gradients", "optimizer", "average", "cast_weights", "activations", "head")
    )


def test_copies_in_bf16():
    config = load_config("lm_tiny", sets=["train.precision=bf16"])
    shape, matrices = shape_of(config), parameters(shape_of(config)).hidden_matrices
    assert _copies(shape, config.train, Ranks()) == 2 * matrices
    recomputed = config.train.model_copy(update={"recompute": "full"})
    assert _copies(shape, recomputed, Ranks()) == 2 * matrices // 2  # one of two layers


def test_a_micro_batch_is_what_fits_the_ranks():
    config = load_config("olmoe_7b")
    train = config.train  # 1024 sequences in 256 micro-batches of 4
    assert [Ranks(dp).rows(train) for dp in (1, 2, 4, 8, 64, 1024)] == [4, 2, 1, 1, 1, 1]
    odd = train.model_copy(update={"batch_size": 36, "accumulate": 4})
    assert Ranks(2).rows(odd) == 3  # not 4: 18 is no multiple of it
    one, two = (memory(shape_of(config), train, Ranks(dp)) for dp in (1, 2))
    assert one.activations == 2 * two.activations
    with pytest.raises(ConfigError, match=r"^--dp 3: must divide train.batch_size \(1024\)"):
        Ranks(3).rows(train)


def test_the_logits_of_the_head_never_exist_as_a_whole():
    config = load_config("nanogpt_1b")
    shape = shape_of(config)
    assert _head(shape, config.train, 10**6) == 4 * 1024 * (50304 + 10**6) + 512 * 50304 * 12


def test_borders_of_documents_cost_a_mask():
    config = load_config("lm_tiny")
    with_mask, without = (memory(shape_of(config), config.train, documents=d).activations for d in (True, False))
    assert with_mask - without == 2 * 4 * 8 * 64 * 64
