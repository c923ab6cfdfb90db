"""Parameter counts against formulas worked by hand and against published totals; big shapes on the meta device."""

import pytest
import torch
from small_models import make_moe

from himoe import DecoderLM, GELUExperts, MoE, PooledExperts, SwiGLUExperts, parameter_counts, presets
from himoe.models import ParameterCounts
from himoe.nn import ConstantExperts, CopyExperts, SwiGLU, ZeroExperts


def build(feed_forward, **options):
    with torch.device("meta"):
        return DecoderLM(feed_forward=feed_forward, **options)


def olmo_like(*, vocab, dim, layers, heads, experts, k, expert_dim, shared_dim=0, **options):
    def feed_forward(_):
        return make_moe("switch", dim=dim, num_experts=experts, top_k=k, expert_dim=expert_dim, shared_dim=shared_dim)

    model = build(feed_forward, vocab_size=vocab, dim=dim, num_layers=layers, num_heads=heads, **options)
    return parameter_counts(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("shared", [0, 7])
@pytest.mark.parametrize("moe_layers", [[], [1], [0, 1, 2]])
def test_counts_are_the_formula(tied, qk_norm, kv_heads, shared, moe_layers):
    V, D, L, H, E, K, F, dense = 50, 16, 3, 4, 8, 3, 5, 24

    def feed_forward(layer):
        if layer not in moe_layers:
            return SwiGLU(D, dense)
        return make_moe("switch", dim=D, num_experts=E, top_k=K, expert_dim=F, shared_dim=shared)

    counts = parameter_counts(
        build(
            feed_forward,
            vocab_size=V,
            dim=D,
            num_layers=L,
            num_heads=H,
            num_kv_heads=kv_heads,
            tie_embeddings=tied,
            qk_norm=qk_norm,
        )
    )
    head = D // H
    attention = D * (H + 2 * kv_heads) * head + D * D + (2 * head if qk_norm else 0)
    every_layer = L * (attention + 2 * D) + D  # with both norms of a block, and the final one
    layers = len(moe_layers)
    always = every_layer + (L - layers) * 3 * D * dense + layers * (E * D + 3 * D * shared)
    one_expert = layers * 3 * D * F
    embeddings = V * D * (1 if tied else 2)
    assert counts == ParameterCounts(
        total=embeddings + always + E * one_expert,
        active=embeddings + always + K * one_expert,
        active_without_input_embedding=V * D + always + K * one_expert,
        active_without_embeddings=always + K * one_expert,
    )


def test_counts_on_the_meta_device_are_those_of_the_real_model():
    def feed_forward(_):
        return make_moe("hi_moe", expert_scale=True)

    options = {"vocab_size": 40, "dim": 16, "num_layers": 2, "num_heads": 2}
    real = DecoderLM(feed_forward=feed_forward, **options)
    assert parameter_counts(real) == parameter_counts(build(feed_forward, **options))
    assert parameter_counts(real).total == sum(p.numel() for p in real.parameters())


def test_k_is_what_the_selector_gives_in_total():
    def active(**options):
        model = build(lambda _: make_moe("hi_moe", **options), vocab_size=40, dim=16, num_layers=1, num_heads=2)
        return parameter_counts(model).active

    one_expert = 3 * 16 * 12
    unequal = active(groups=[[0, 1, 2], [3, 4], [5, 6, 7]], top_k=[2, 1, 2])
    assert active(num_groups=2, top_k=8) - unequal == 3 * one_expert
    assert unequal - active(num_groups=4, top_k=4) == one_expert


def pooled_counts(router, *pools):
    model = build(
        lambda _: MoE(router(sum(p.num_experts for p in pools)), PooledExperts(*pools)),
        vocab_size=40,
        dim=16,
        num_layers=1,
        num_heads=2,
    )
    return parameter_counts(model)


def one_router(k):
    return lambda num_experts: presets.switch(16, num_experts, k)


def router_per_group(groups, k):
    return lambda _: presets.moge(16, sum(map(len, groups)), groups=groups, top_k=k)


WIDE, NARROW = 3 * 16 * 32, 3 * 16 * 8  # parameters of one expert


@pytest.mark.parametrize(
    ("router", "wide", "narrow"),
    [
        # of 4 wide and 8 narrow experts a token uses 3 of 12: one of the 4 and two of the 8, used alike
        (one_router(3), 1, 2),
        (one_router(6), 2, 4),
        # one router per pool: exactly k' of each
        (router_per_group([[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]], [2, 1]), 2, 1),
        # groups within pools: their k' add up
        (router_per_group([[0, 1], [2, 3], [4, 5, 6, 7, 8, 9, 10, 11]], [2, 1, 5]), 3, 5),
        (router_per_group([[2, 0], [11, 4, 6, 5], [1, 3], [7, 8, 9, 10]], [1, 2, 2, 1]), 3, 3),
        # groups across pools: 6 of 12, used alike
        (router_per_group([[0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]], [3, 3]), 2, 4),
    ],
)
def test_pools_by_hand(router, wide, narrow):
    with torch.device("meta"):
        counts = pooled_counts(router, SwiGLUExperts(4, 16, 32), SwiGLUExperts(8, 16, 8))
    assert counts.total - counts.active == (4 - wide) * WIDE + (8 - narrow) * NARROW


def test_expected_parameters_are_rounded_once_for_a_layer():
    with torch.device("meta"):
        counts = pooled_counts(one_router(1), GELUExperts(2, 16, 5), GELUExperts(5, 16, 1))
    routed = 2 * 16 * (2 * 5 + 5 * 1)
    assert counts.total - counts.active == routed - routed // 7


def test_free_experts_cost_nothing_and_constants_what_they_hold():
    with torch.device("meta"):
        networks, free = SwiGLUExperts(4, 16, 32), [ZeroExperts(3), CopyExperts(1)]
        counts = pooled_counts(one_router(2), networks, *free)
        assert counts.total - counts.active == 3 * WIDE  # 2 of 8, so one of the 4 networks
        counts = pooled_counts(one_router(2), SwiGLUExperts(4, 16, 32), ConstantExperts(4, 16))
        assert counts.total - counts.active == 3 * WIDE + 3 * (3 * 16)  # W_e and v_e


def test_mixtral_8x7b():
    counts = olmo_like(
        vocab=32_000,
        dim=4096,
        layers=32,
        heads=32,
        experts=8,
        k=2,
        expert_dim=14_336,
        num_kv_heads=8,
        qk_norm=False,
        tie_embeddings=False,
    )
    assert counts.total == 46_702_792_704
    assert counts.active == 12_879_925_248


def test_olmoe_1b_7b():
    counts = olmo_like(
        vocab=50_304, dim=2048, layers=16, heads=16, experts=64, k=8, expert_dim=1024, tie_embeddings=False
    )
    # OLMoE normalises queries and keys over their full width, 2·2048 weights a layer; here per head, 2·128
    wider_norms = 16 * (2 * 2048 - 2 * 128)
    assert counts.total + wider_norms == 6_919_161_856
    assert counts.active + wider_norms == 1_282_017_280
    assert counts.active - counts.active_without_input_embedding == 50_304 * 2048
    assert counts.active - counts.active_without_embeddings == 2 * 50_304 * 2048


@pytest.mark.parametrize(
    ("dim", "layers", "heads", "sparsity", "printed", "half_a_unit"),
    [
        (48, 3, 3, 64, 15e6, 0.5e6),
        (96, 4, 4, 64, 48e6, 0.5e6),
        (240, 5, 6, 256, 930e6, 5e6),
        (832, 12, 13, 64, 6.58e9, 0.005e9),
    ],
)
def test_scales_of_slicing_and_dicing(dim, layers, heads, sparsity, printed, half_a_unit):
    counts = olmo_like(
        vocab=100_352,
        dim=dim,
        layers=layers,
        heads=heads,
        experts=sparsity,
        k=1,
        expert_dim=4 * dim,
        qk_norm=False,
        tie_embeddings=False,
    )
    router_and_norms = sparsity * dim * layers + (2 * layers + 1) * dim
    square = layers * dim * dim
    assert counts.active == 2 * 100_352 * dim + 16 * square + router_and_norms
    assert counts.total == 2 * 100_352 * dim + 4 * square + 12 * square * sparsity + router_and_norms
    assert abs(counts.total - printed) <= half_a_unit
