import pytest
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from himoe.models import DecoderLM
from himoe.nn import MoE, SwiGLU, SwiGLUExperts
from himoe.presets import hi_moe
from himoe.train.norms import RoleNorms, parameters_by_role


def model(tie_embeddings=False):
    def feed_forward(layer):
        if layer == 0:
            return SwiGLU(16, 24)
        router = hi_moe(16, 8, 4, num_groups=4, expert_scale=True)
        return MoE(router, SwiGLUExperts(8, 16, 8), shared_expert=SwiGLU(16, 8))

    torch.manual_seed(0)
    return DecoderLM(
        vocab_size=32, dim=16, num_layers=2, num_heads=2, feed_forward=feed_forward, tie_embeddings=tie_embeddings
    )


def names(lm, role):
    of = {parameter: name for name, parameter in lm.named_parameters()}
    return {of[parameter] for parameter in parameters_by_role(lm).get(role, [])}


def test_every_parameter_has_the_role_of_its_module():
    lm = model()
    assert names(lm, "embedding") == {"embedding.weight"}
    assert names(lm, "head") == {"head.weight"}
    assert names(lm, "attention") == {
        f"blocks.{i}.attention.{part}_proj.weight" for i in (0, 1) for part in ("qkv", "out")
    }
    assert names(lm, "router") == {
        "blocks.1.feed_forward.router.gate.weight",
        "blocks.1.feed_forward.router.expert_scale",
    }
    assert names(lm, "experts") == {
        "blocks.1.feed_forward.experts.gate_up_proj",
        "blocks.1.feed_forward.experts.down_proj",
    }
    assert names(lm, "shared_expert") == {
        f"blocks.1.feed_forward.shared_expert.{part}_proj.weight" for part in ("gate_up", "down")
    }
    assert names(lm, "ffn") == {f"blocks.0.feed_forward.{part}_proj.weight" for part in ("gate_up", "down")}
    assert names(lm, "norm") == {name for name, _ in lm.named_parameters() if "norm" in name}
    assert sum(len(parameters) for parameters in parameters_by_role(lm).values()) == len(list(lm.parameters()))


def test_a_tied_head_is_the_embedding_and_a_frozen_part_has_no_role():
    lm = model(tie_embeddings=True)
    lm.embedding.weight.requires_grad_(False)
    assert "head" not in parameters_by_role(lm) and "embedding" not in parameters_by_role(lm)
    lm.embedding.weight.requires_grad_(True)
    assert names(lm, "embedding") == {"embedding.weight"}


def test_the_roles_are_found_by_type_also_where_the_names_mislead():
    router = nn.Linear(4, 4, bias=False)
    lm = nn.Sequential()
    lm.add_module("attention", nn.Embedding(3, 4))
    lm.add_module("experts", nn.Sequential(nn.LayerNorm(4), router))
    assert {role: len(found) for role, found in parameters_by_role(lm).items()} == {"embedding": 1, "ffn": 1, "norm": 2}


def test_norms_by_hand_and_together_the_norm_of_everything():
    lm = model()
    for parameter in lm.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    lm.head.weight.grad = None
    norms = RoleNorms(lm)
    norms.measure()
    assert norms.gradient.item() == pytest.approx(
        get_total_norm([p.grad for p in lm.parameters() if p.grad is not None]).item()
    )
    values = norms.read()
    assert values["embedding"]["grad"] == pytest.approx(0.5 * (32 * 16) ** 0.5)
    assert values["head"]["grad"] == 0 and values["head"]["weight"] == pytest.approx(lm.head.weight.norm().item())
    weight = sum(value["weight"] ** 2 for value in values.values()) ** 0.5
    assert weight == pytest.approx(get_total_norm(list(lm.parameters())).item())
    assert norms.read() is None  # a measurement is read once
