"""Other implementations of the expert layer, each given the same tokens, choices and weights in its own form.

| name | what |
|---|---|
| `dense` | one SwiGLU network of hidden width K·F: the same active FLOPs, no routing; another function, gated against its own answer |
| `hf_grouped`, `hf_eager` | the experts of transformers, `grouped_mm` and the loop; weights in the model's dtype, as its routers give them |
| `st_moe` | the MoE layer of st-moe-pytorch with SwiGLU experts. Its gate runs and is then told the choice; capacity is the largest load and no pair is dropped at random, so it computes the same function |
| `liger`, `scattermoe`, `sonicmoe` | Triton and CuTe kernels, on a GPU |

`sonicmoe` was written from its sources and never run; the gate before the clock tells whether it is used rightly.
"""  # noqa: E501

import importlib.util
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from himoe.bench.contestant import CannotRunError, Contestant, leaf
from himoe.bench.problem import Problem
from himoe.nn import SwiGLU

MOST_DISPATCH_BYTES = 2 * 2**30
"""Beyond this, the dispatch tensors of `st_moe` are not tried."""


@dataclass(frozen=True)
class Peer:
    """An implementation by others.

    Attributes:
        build: problem → contestant; raises CannotRunError.
        package: the module to import, None where nothing is missing.
        install: how to get it.
        cuda: needs a GPU.
        dtypes: those that it takes.
    """

    build: Callable[[Problem], Contestant]
    package: str | None = None
    install: str = ""
    cuda: bool = False
    dtypes: tuple[str, ...] = ("fp32", "bf16")

    def missing(self, device: str) -> str | None:
        """Return why it cannot be used here, None where it can."""
        if self.cuda and device != "cuda":
            return "needs a GPU"
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"not installed: {self.install}"
        return None


def _dense(problem: Problem) -> Contestant:
    """Build the network of the first experts' widths together; only its size matters."""
    shape = problem.shape
    width = shape.top_k * shape.hidden_dim
    wide = replace(shape, hidden_dim=width, num_experts=1, top_k=1)
    network = SwiGLU(shape.dim, width).to(problem.x)
    up, down = network.gate_up_proj.weight, network.down_proj.weight
    ids = torch.zeros(shape.tokens, 1, dtype=torch.int64, device=problem.x.device)
    weights = torch.ones(shape.tokens, 1, device=problem.x.device)
    own = replace(
        problem,
        shape=wide,
        expert_ids=ids,
        weights=weights,
        kept=ids == 0,
        up_proj=up.detach()[None],
        down_proj=down.detach()[None],
    )
    return Contestant(own, lambda: network(own.x), {"weights": weights, "up_proj": [up], "down_proj": [down]})


def _transformers(implementation: str) -> Callable[[Problem], Contestant]:
    def build(problem: Problem) -> Contestant:
        experts = transformers_experts(problem.up_proj, problem.down_proj, implementation)
        weights = leaf(problem.weights.to(problem.x.dtype))
        return Contestant(
            problem,
            lambda: experts(problem.x, problem.expert_ids, weights),
            {
                "weights": weights,
                "up_proj": experts.get_parameter("gate_up_proj"),
                "down_proj": experts.get_parameter("down_proj"),
            },
        )

    return build


def transformers_experts(up_proj: Tensor, down_proj: Tensor, implementation: str) -> nn.Module:
    """Return the experts of transformers' Mixtral on the memory of these weights.

    All its SwiGLU models share this code and this layout; `(x, expert_ids, weights) → y`.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, dim, hidden_dim = down_proj.shape
    config = MixtralConfig(num_local_experts=experts, hidden_size=dim, intermediate_size=hidden_dim)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = nn.Parameter(up_proj.detach()), nn.Parameter(down_proj.detach())
    return module


class _OneExpert(nn.Module):
    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = F.linear(x, self.up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * value, self.down)


def _st_moe(problem: Problem) -> Contestant:
    shape = problem.shape
    if shape.top_k < 2:
        raise CannotRunError("needs at least 2 choices per token")
    places = max(4, int(problem.expert_ids.flatten().bincount(minlength=shape.num_experts).max()))
    needed = 4 * shape.tokens * shape.num_experts * places * (shape.top_k + 4)
    if needed > MOST_DISPATCH_BYTES:
        raise CannotRunError(f"its dispatch tensors would take about {needed / 2**30:.0f} GiB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the package's own annotations
        from st_moe_pytorch import MoE  # type: ignore[import-not-found]

    pairs = zip(problem.up_proj.detach(), problem.down_proj.detach(), strict=True)
    experts = [_OneExpert(up, down) for up, down in pairs]
    layer = MoE(
        shape.dim,
        num_experts=shape.num_experts,
        gating_top_n=shape.top_k,
        threshold_train=0.0,
        capacity_factor_train=(places + 0.5) * shape.num_experts / shape.tokens,
        experts=nn.ModuleList(experts),  # type: ignore[arg-type]
        straight_through_dispatch_tensor=False,
    ).to(problem.x.device)
    weights = leaf(problem.weights)

    def given(_scores: Tensor, k: int) -> SimpleNamespace:  # noqa: ARG001
        return SimpleNamespace(values=weights[None], indices=problem.expert_ids[None])

    layer.gate.topk = given  # type: ignore[assignment]
    return Contestant(
        problem,
        lambda: layer(problem.x[None]).outputs[0],
        {"weights": weights, "up_proj": [e.up for e in experts], "down_proj": [e.down for e in experts]},
        normalizes=True,
    )


def _liger(problem: Problem) -> Contestant:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction  # type: ignore[import-not-found]

    ids, weights = problem.expert_ids.to(torch.int32), leaf(problem.weights.to(problem.x.dtype))

    def forward() -> Tensor:
        return LigerFusedMoEFunction.apply(problem.x, problem.up_proj, problem.down_proj, ids, weights)

    return Contestant(problem, forward, {"weights": weights})


def _scattermoe(problem: Problem) -> Contestant:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear  # type: ignore[import-not-found]

    weights, experts = leaf(problem.weights.to(problem.x.dtype)), problem.shape.num_experts

    def forward() -> Tensor:
        rows = flatten_sort_count(problem.expert_ids, num_experts=experts)
        up, down = problem.up_proj.permute(0, 2, 1), problem.down_proj.permute(0, 2, 1)
        hidden = parallel_linear(problem.x, up, problem.shape.top_k, *rows, grouped_out=True)
        gate, value = hidden.chunk(2, dim=-1)
        return parallel_linear(F.silu(gate) * value, down, 1, *rows, grouped_in=True, gates=weights)

    return Contestant(problem, forward, {"weights": weights})


def _sonicmoe(problem: Problem) -> Contestant:
    from sonicmoe import moe_general_routing_inputs  # type: ignore[import-not-found]
    from sonicmoe.enums import ActivationType  # type: ignore[import-not-found]

    # Gate rows before value rows, instead of in turns, has had two names.
    known = inspect.signature(moe_general_routing_inputs).parameters
    layout = next((name for name in ("concat_layout", "is_concatenated_gate_up") if name in known), None)
    if layout is None:
        raise CannotRunError("this version takes gate and value rows in turns only; install a newer one")
    shape, weights = problem.shape, leaf(problem.weights.to(problem.x.dtype))
    token = torch.arange(shape.tokens, device=problem.x.device, dtype=torch.int32).repeat_interleave(shape.top_k)
    ids = problem.expert_ids.flatten().to(torch.int32)

    def forward() -> Tensor:
        y, _ = moe_general_routing_inputs(
            problem.x,
            weights.flatten(),
            token,
            ids,
            problem.up_proj.permute(1, 2, 0),
            None,
            problem.down_proj.permute(1, 2, 0),
            None,
            E=shape.num_experts,
            stream_id=torch.cuda.current_stream().cuda_stream,
            activation_type=ActivationType.SWIGLU,
            **{layout: True},
        )
        return y

    return Contestant(problem, forward, {"weights": weights})


EXTRA = "pip install 'himoe[bench]'"
PEERS = {
    "dense": Peer(_dense),
    "hf_grouped": Peer(_transformers("grouped_mm"), "transformers", EXTRA),
    "hf_eager": Peer(_transformers("eager"), "transformers", EXTRA),
    "st_moe": Peer(_st_moe, "st_moe_pytorch", EXTRA, dtypes=("fp32",)),
    "liger": Peer(_liger, "liger_kernel", "pip install liger-kernel", cuda=True),
    "scattermoe": Peer(_scattermoe, "scattermoe", "pip install from github.com/shawntan/scattermoe", cuda=True),
    "sonicmoe": Peer(_sonicmoe, "sonicmoe", "pip install sonic-moe", cuda=True, dtypes=("bf16",)),
}
