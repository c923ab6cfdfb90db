"""Text read in parts with a cache is the text read at once: logits to the last bits, routing, padding, documents."""

import pytest
import torch
from small_models import make_lm, make_moe, token_ids

from himoe import Capacity
from himoe.errors import ConfigError
from himoe.models import KVCache
from himoe.nn import SwiGLU

pytestmark = pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")

MODELS = {
    "hi_moe": lambda _: make_moe("hi_moe", tau=0.5),
    "hi_moe_official": lambda _: make_moe("hi_moe_official"),
    "hi_moe_paper": lambda _: make_moe("hi_moe_paper"),
    "loss_free": lambda _: make_moe("loss_free"),
    "deepseek_v3": lambda _: make_moe("deepseek_v3", num_groups=4, shared_dim=6),
    "moge": lambda _: make_moe("moge"),
    "switch": lambda _: make_moe("switch", top_k=1),
    "capacity": lambda _: make_moe("switch", top_k=2, dispatcher=Capacity(0.5)),
    "dense and experts": lambda layer: make_moe() if layer else SwiGLU(16, 24),
}
PARTS = {"at once": [11], "token by token": [1] * 11, "chunks": [4, 1, 3, 3], "a long prompt": [8, 1, 1, 1]}


def in_parts(model, ids, sizes, **more):
    """Logits and chosen experts, (B, S, …), read with a cache in parts of these sizes."""
    cache, logits, experts, start = KVCache(len(model.blocks)), [], [], 0
    for size in sizes:
        here = slice(start, start + size)
        out, routings = model(ids[:, here], cache=cache, **{name: value[:, here] for name, value in more.items()})
        logits.append(out)
        experts.append(torch.stack([r.expert_ids.view(len(ids), size, -1) for r in routings], 2))
        start += size
    assert cache.length == start == ids.shape[1]
    return torch.cat(logits, 1), torch.cat(experts, 1)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("heads", [{}, {"num_heads": 4, "num_kv_heads": 2}], ids=["all heads", "grouped queries"])
@torch.no_grad()
def test_reading_in_parts_is_reading_at_once(name, parts, heads):
    model, ids = make_lm(MODELS[name], **heads).double().eval(), token_ids(3, 11)
    logits, experts = in_parts(model, ids, PARTS[parts])
    expected, routings = model(ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    for layer, routing in enumerate(routings):
        assert torch.equal(experts[:, :, layer].flatten(0, 1), routing.expert_ids)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_and_documents_are_remembered(side):
    model, ids = make_lm(num_kv_heads=1).double().eval(), token_ids(3, 11)
    lengths = torch.tensor([[11], [6], [1]])
    position = torch.arange(11)
    mask = position >= 11 - lengths if side == "left" else position < lengths
    for more in (
        {"mask": mask},
        {"document_ids": position.expand(3, 11) // 4},
        {"mask": mask, "document_ids": position.expand(3, 11) // 4},
    ):
        expected, _ = model(ids, **more)
        for sizes in PARTS.values():
            logits, _ = in_parts(model, ids, sizes, **more)
            torch.testing.assert_close(logits[mask], expected[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_other_precisions_agree_to_rounding(dtype):
    model, ids = make_lm(lambda _: SwiGLU(16, 24)).to(dtype).eval(), token_ids(2, 11)
    cache = KVCache(2)
    logits = torch.cat([model(ids[:, i : i + 1], cache=cache)[0] for i in range(11)], 1)
    torch.testing.assert_close(logits, model(ids)[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 3e-3)


@torch.no_grad()
def test_autocast_agrees_to_rounding():
    model, ids = make_lm(lambda _: SwiGLU(16, 24)).eval(), token_ids(2, 11)
    with torch.autocast("cpu", torch.bfloat16):
        cache = KVCache(2)
        logits = torch.cat([model(part, cache=cache)[0] for part in ids.split(3, 1)], 1)
        torch.testing.assert_close(logits, model(ids)[0], rtol=0, atol=3e-3)


def test_a_cache_is_refused_in_training():
    model = make_lm()
    for mode in (model.train, model.eval):
        with pytest.raises(ConfigError, match=r"not for training; use eval\(\) and torch.no_grad\(\)"):
            mode()(token_ids(1, 2), cache=KVCache(2))


@torch.no_grad()
def test_a_cache_of_other_rows_or_of_another_model_is_refused():
    model, cache = make_lm().eval(), KVCache(2)
    model(token_ids(1, 4), cache=cache)
    with pytest.raises(ConfigError, match="3 rows after 1; make a new cache"):
        model(token_ids(3, 1), cache=cache)
    assert cache.length == 4
    with pytest.raises(ConfigError, match="the cache is for 3 layers, the model has 2"):
        model(token_ids(1, 4), cache=KVCache(3))


@torch.no_grad()
def test_a_mask_that_comes_later_is_refused():
    model, cache = make_lm().eval(), KVCache(2)
    model(token_ids(2, 3), cache=cache)
    with pytest.raises(ConfigError, match="in every call with this cache, or in none"):
        model(token_ids(2, 3), torch.ones(2, 3, dtype=torch.bool), cache=cache)
    assert cache.length == 3
