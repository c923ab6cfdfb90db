"""State stays fp32 however the model is built, padding may stand on either side, fp64 is never cast down."""

import pytest
import torch

from himoe import DecoderLM, MoE, SwiGLU, SwiGLUExperts, presets
from himoe.balance import Balancer, Chain, DualAscent, LogitCorrection, LossFree, SequenceBalance, TwoLevelTerms
from himoe.errors import GuardError
from himoe.presets import check_guards
from himoe.types import RouterContext, Routing


def stateful() -> list[Balancer]:
    dual = DualAscent(TwoLevelTerms(8, 2), epsilon_intra=0.3, epsilon_inter=0.6)
    return [LossFree(8), LogitCorrection(8), dual]


@pytest.mark.parametrize("index", range(3))
def test_state_is_fp32_in_a_model_that_is_built_in_bf16(index):
    torch.set_default_dtype(torch.bfloat16)
    try:
        balancer = stateful()[index]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [b.dtype for b in balancer.buffers()] == [torch.float32]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("index", range(3))
def test_state_is_fp32_after_a_checkpoint_that_was_cast(index, assign):
    balancer = stateful()[index]
    saved = {name: value.to(torch.bfloat16) for name, value in balancer.state_dict().items()}
    balancer.load_state_dict(saved, assign=assign)
    assert [b.dtype for b in balancer.buffers()] == [torch.float32]


def make_lm() -> DecoderLM:
    torch.manual_seed(0)

    def feed_forward(layer: int):
        if layer == 0:
            return SwiGLU(16, 32)
        return MoE(presets.hi_moe(16, 8, 4, num_groups=4), SwiGLUExperts(8, 16, 8))

    return DecoderLM(
        vocab_size=20, dim=16, num_layers=2, num_heads=2, num_kv_heads=1, feed_forward=feed_forward
    ).double()


@pytest.mark.parametrize(("before", "behind"), [(3, 0), (0, 3), (2, 2)])
def test_padding_on_either_side_changes_no_real_logit_and_no_gradient(before, behind):
    model, text = make_lm(), torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(text, (before, behind), value=5)
    mask = torch.nn.functional.pad(torch.ones_like(text, dtype=torch.bool), (before, behind))
    results = []
    for tokens, m in ((text, None), (padded, mask)):
        logits, _ = model(tokens, m)
        real = logits if m is None else logits[m].view(2, 7, -1)
        model.zero_grad()
        real.logsumexp(-1).sum().backward()
        results.append((real, model.blocks[0].attention.qkv_proj.weight.grad.clone()))
    for alone, among_padding in zip(*results, strict=True):
        torch.testing.assert_close(alone, among_padding)


def test_autocast_leaves_fp64_experts_alone():
    layer = MoE(presets.switch(16, 4, 2), SwiGLUExperts(4, 16, 8)).double()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(torch.randn(3, 16, dtype=torch.float64))
    assert y.dtype == torch.float64


@pytest.mark.parametrize(
    ("weak", "reason"),
    [
        (SequenceBalance(weight=0.1), r"lambda_intra/alpha = 5/0.1 = 50 > 2.5"),
        (SequenceBalance(weight=0.0), "without any load-balancing part"),
        (LossFree(8, rate=0.0), "without any load-balancing part"),
    ],
)
def test_a_balancer_that_does_little_or_nothing_excuses_no_collapse(weak, reason):
    with pytest.raises(GuardError, match=reason):
        check_guards(Chain(TwoLevelTerms(8, 4, lambda_intra=5.0), weak), top_k=4)


@pytest.mark.parametrize("make", [presets.moge, presets.hi_moe])
def test_the_gate_learns_from_the_task_at_one_expert_per_token(make):
    layer = MoE(make(16, 4, 1, num_groups=1), SwiGLUExperts(4, 16, 8))
    layer(torch.randn(32, 16))[0].square().sum().backward()
    assert layer.router.gate.weight.grad.norm() > 1e-3 * layer.experts.down_proj.grad.norm()


def test_the_sequence_loss_ignores_whatever_padding_holds():
    logits = torch.randn(4, 3)
    logits[2:] = torch.nan
    mask = torch.tensor([True, True, False, False])
    ids = torch.zeros(4, 1, dtype=torch.int64)
    kept = mask[:, None]

    def routing(shape):
        context = RouterContext(mask=mask, batch_shape=shape)
        return Routing(logits, logits.softmax(-1), ids, torch.ones(4, 1), kept, kept, context)

    for shape in ((1, 4), (4,)):
        assert SequenceBalance(weight=1.0).losses(routing(shape))["sequence_balance"].isfinite()
