"""Small MoE blocks of transformers v5 with random weights, and our layer of the same preset with those weights."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may look for anything on a hub

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeMoE
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from himoe import MoE, Router, SwiGLU, SwiGLUExperts, presets
from himoe.balance import LossFree
from himoe.nn import GatedNetwork
from himoe.types import Routing

D, F = 12, 8  # rows of 32 and 48 bytes, so that their grouped_mm runs too


@dataclass(frozen=True)
class Case:
    """One block: transformers' classes and options, and the router that must equal it."""

    name: str
    config: type
    block: type
    options: dict
    num_experts: int
    top_k: int
    renormalize: bool
    router: Callable[[], Router]

    def __str__(self) -> str:
        return self.name


def _flat(name: str, config: type, block: type, preset, num_experts: int, k: int, norm: bool, **options) -> Case:
    options |= {"hidden_size": D, "num_experts_per_tok": k}
    options["intermediate_size" if name in ("olmoe", "mixtral") else "moe_intermediate_size"] = F
    options["num_local_experts" if name == "mixtral" else "num_experts"] = num_experts
    if name != "mixtral":
        options["norm_topk_prob"] = norm
    text = f"{name}-E{num_experts}-K{k}-{'norm' if norm else 'plain'}"
    router = partial(preset, D, num_experts, k, renormalize=norm)
    return Case(text, config, block, options, num_experts, k, norm, router)


def _grouped(name: str, config: type, block: type, num_experts: int, k: int, groups: tuple[int, int], **more) -> Case:
    given = {"norm": k > 1, "scale": 2.5, "shared": 1} | more
    options = {
        "hidden_size": D, "moe_intermediate_size": F, "n_routed_experts": num_experts, "num_experts_per_tok": k,
        "n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": given["norm"],
        "routed_scaling_factor": given["scale"], "n_shared_experts": given["shared"],
    }  # fmt: skip
    router = partial(
        getattr(presets, name), D, num_experts, k, num_groups=groups[0], keep_groups=groups[1],
        renormalize=given["norm"], scaling_factor=given["scale"],
    )  # fmt: skip
    text = f"{name}-E{num_experts}-K{k}-{groups[1]}of{groups[0]}-{'norm' if given['norm'] else 'plain'}"
    return Case(text, config, block, options, num_experts, k, given["norm"], router)


def cases() -> list[Case]:
    """Every family, with both renormalisations, K = 1, K = E, and groups that bind and that do not."""
    olmoe, mixtral = (OlmoeConfig, OlmoeSparseMoeBlock, presets.olmoe), (MixtralConfig, MixtralSparseMoeBlock)
    qwen3 = (Qwen3MoeConfig, Qwen3MoeSparseMoeBlock, presets.qwen3_moe)
    qwen2 = (Qwen2MoeConfig, Qwen2MoeSparseMoeBlock, presets.olmoe)
    deepseek, glm = (DeepseekV3Config, DeepseekV3MoE), (Glm4MoeConfig, Glm4MoeMoE)
    return [
        _flat("olmoe", *olmoe, 7, 3, False),
        _flat("olmoe", *olmoe, 7, 1, False),
        _flat("olmoe", *olmoe, 5, 5, True),
        _flat("mixtral", *mixtral, presets.mixtral, 7, 2, True),
        _flat("mixtral", *mixtral, presets.mixtral, 5, 1, True),
        _flat("qwen3_moe", *qwen3, 9, 4, True),
        _flat("qwen3_moe", *qwen3, 9, 1, False),
        _flat("qwen2_moe", *qwen2, 7, 3, False, shared_expert_intermediate_size=9),
        _grouped("deepseek_v3", *deepseek, 12, 3, (4, 2)),
        _grouped("deepseek_v3", *deepseek, 12, 4, (3, 1), scale=1.0),
        _grouped("deepseek_v3", *deepseek, 10, 1, (5, 2), norm=False, shared=2),
        _grouped("deepseek_v3", *deepseek, 6, 1, (2, 2), norm=True),
        _grouped("glm4_moe", *glm, 9, 4, (1, 1)),
        _grouped("glm4_moe", *glm, 12, 3, (3, 2), scale=1.5),
        _grouped("glm4_moe", *glm, 7, 1, (1, 1), norm=False),
    ]


def make_block(case: Case, seed: int, dtype: torch.dtype, experts: str = "eager") -> nn.Module:
    """transformers' block with normal weights, and a correction bias that changes choices where it has one."""
    config = case.config(**case.options)
    config._experts_implementation = experts
    block = case.block(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*block.parameters(), *block.buffers()]:
            scale = 0.3 if tensor.ndim == 1 else tensor.shape[-1] ** -0.5
            tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
        block.gate.weight.mul_(2)  # spread logits: experts differ in load and weight
    return block


def our_layer(case: Case, block: nn.Module, dtype: torch.dtype) -> MoE:
    """Our layer with the block's weights."""
    experts = block.experts
    shared = None
    network = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    if network is not None:
        shared = SwiGLU(D, network.down_proj.in_features)
        shared.gate_up_proj.weight.data = torch.cat([network.gate_proj.weight, network.up_proj.weight]).detach().clone()
        shared.down_proj.weight.data = network.down_proj.weight.detach().clone()
        if hasattr(block, "shared_expert_gate"):
            shared = GatedNetwork(shared, D)
            shared.gate.weight.data = block.shared_expert_gate.weight.detach().clone()
    layer = MoE(case.router(), SwiGLUExperts(case.num_experts, D, F), shared_expert=shared).to(dtype)
    layer.router.gate.weight.data = block.gate.weight.detach().clone()
    layer.experts.gate_up_proj.data = experts.gate_up_proj.detach().clone()
    layer.experts.down_proj.data = experts.down_proj.detach().clone()
    for part in layer.router.balancer.modules():
        if isinstance(part, LossFree):
            part.bias.copy_(block.gate.e_score_correction_bias)
    return layer


def pairs(block: nn.Module, layer: MoE) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Gradients that must be equal, theirs first."""
    found = {
        "gate": (block.gate.weight.grad, layer.router.gate.weight.grad),
        "up": (block.experts.gate_up_proj.grad, layer.experts.gate_up_proj.grad),
        "down": (block.experts.down_proj.grad, layer.experts.down_proj.grad),
    }
    network = getattr(block, "shared_experts", getattr(block, "shared_expert", None))
    if network is not None:
        ours = layer.shared_expert
        if isinstance(ours, GatedNetwork):
            found["shared gate"] = (block.shared_expert_gate.weight.grad, ours.gate.weight.grad)
            ours = ours.network
        theirs = torch.cat([network.gate_proj.weight.grad, network.up_proj.weight.grad])
        found["shared up"] = (theirs, ours.gate_up_proj.weight.grad)
        found["shared down"] = (network.down_proj.weight.grad, ours.down_proj.weight.grad)
    return found


def by_expert(routing_or_pair: Routing | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Expert ids of every token in rising order, and their weights."""
    if isinstance(routing_or_pair, Routing):
        routing_or_pair = (routing_or_pair.expert_ids, routing_or_pair.weights)
    ids, order = routing_or_pair[0].sort(-1)
    return ids, routing_or_pair[1].gather(-1, order)
