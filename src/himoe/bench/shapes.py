"""Shapes of an expert layer by name: small ones, and slices of published models that fit into a laptop.

A slice keeps D whole and says what it leaves out. Fewer experts and choices in equal proportion leave the rows of an
expert as they are in the model; a part of F is what one rank of tensor parallelism holds. Sources are the models'
config.json: OLMoE-1B-7B-0125 (D 2048, F 1024, E 64, K 8), Qwen3-30B-A3B (2048, 768, 128, 8), Mixtral-8x7B (4096,
14336, 8, 2), DeepSeek-V3 (7168, 2048, 256, 8).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from himoe.errors import ConfigError, nearest


@dataclass(frozen=True)
class Shape:
    """T tokens of width D go to K of E experts of hidden width F."""

    name: str
    tokens: int
    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    about: str = ""

    @property
    def flops(self) -> int:
        """18·T·K·D·F, forward and backward of three matrices per pair; a dense network of width K·F has as many."""
        return 18 * self.tokens * self.top_k * self.dim * self.hidden_dim

    @property
    def weight_bytes(self) -> int:
        """Size of the weights in fp32."""
        return 4 * 3 * self.num_experts * self.dim * self.hidden_dim

    def record(self) -> dict[str, Any]:
        """Return the shape as it stands in JSON."""
        sizes = {"T": self.tokens, "D": self.dim, "F": self.hidden_dim, "E": self.num_experts, "K": self.top_k}
        return {"name": self.name, **sizes}


_SHAPES = [
    Shape("few-large", 1024, 256, 1024, 8, 2, "8 experts of 1024"),
    Shape("tokens-2k", 2048, 256, 512, 8, 2, "8 experts of 512, 2,048 tokens"),
    Shape("e64", 1024, 256, 256, 64, 8, "64 experts of 256"),
    Shape("e128-f128", 4096, 256, 128, 128, 8, "128 narrow experts"),
    Shape("e32-f512", 4096, 512, 512, 32, 2, "32 experts of 512"),
    Shape("e64-d1024", 4096, 1024, 256, 64, 8, "64 experts of a wide model"),
    Shape("e64-16k", 16384, 256, 256, 64, 8, "64 experts, many tokens"),
    Shape("fine-grained", 1024, 512, 64, 512, 8, "512 tiny experts: bound by the traffic of weights, not by products"),
    Shape("olmoe/4", 1024, 2048, 1024, 16, 2, "OLMoE: 16 of 64 experts, 2 of 8 choices"),
    Shape("qwen3-30b/8", 1024, 2048, 768, 16, 1, "Qwen3-30B-A3B: 16 of 128 experts, 1 of 8 choices"),
    Shape("mixtral/16", 512, 4096, 896, 8, 2, "Mixtral-8x7B: a sixteenth of F"),
    Shape("deepseek-v3/32", 512, 7168, 512, 8, 2, "DeepSeek-V3: 8 of 256 experts, a quarter of F, 2 of 8 choices"),
    Shape("model", 1024, 256, 128, 64, 8, "the layer of `himoe bench model`"),
    Shape("qwen3-30b-8k", 8192, 2048, 768, 128, 8, "Qwen3-30B-A3B whole, for a GPU"),
    Shape("qwen3-30b-16k", 16384, 2048, 768, 128, 8, "Qwen3-30B-A3B whole, for a GPU"),
    Shape("qwen3-30b-32k", 32768, 2048, 768, 128, 8, "Qwen3-30B-A3B whole, for a GPU"),
    Shape("olmoe", 16384, 2048, 1024, 64, 8, "OLMoE whole, for a GPU"),
    Shape("mixtral", 8192, 4096, 14336, 8, 2, "Mixtral-8x7B whole, for a GPU"),
]  # fmt: skip
SHAPES = {shape.name: shape for shape in _SHAPES}

# What is measured unless shapes are named: (shape, dtypes, routings).
Plan = list[tuple[str, tuple[str, ...], tuple[str, ...]]]
_BOTH, _SKEWED = ("fp32", "bf16"), ("uniform", "zipf")
FULL: Plan = [
    ("few-large", _BOTH, ("uniform", "zipf", "one_hot")),
    ("tokens-2k", ("fp32",), _SKEWED),
    ("e64", ("fp32",), _SKEWED),
    ("e128-f128", ("fp32",), _SKEWED),
    ("e32-f512", ("bf16",), _SKEWED),
    ("e64-d1024", ("fp32",), _SKEWED),
    ("e64-16k", ("bf16",), _SKEWED),
    ("fine-grained", _BOTH, ("uniform",)),
    ("olmoe/4", ("fp32",), ("uniform",)),
    ("qwen3-30b/8", ("bf16",), ("uniform",)),
    ("mixtral/16", ("fp32",), ("uniform",)),
    ("deepseek-v3/32", ("bf16",), ("uniform",)),
]
QUICK: Plan = [
    ("few-large", ("fp32",), ("uniform",)),
    ("tokens-2k", ("fp32",), ("uniform",)),
    ("e64", ("fp32",), ("uniform",)),
    ("e128-f128", ("fp32",), _SKEWED),
    ("e32-f512", ("bf16",), ("uniform",)),
    ("fine-grained", ("bf16",), ("uniform",)),
]
FULL_GPU: Plan = [
    (name, ("bf16",), _SKEWED) for name in ("qwen3-30b-8k", "qwen3-30b-16k", "qwen3-30b-32k", "olmoe", "mixtral")
]
QUICK_GPU: Plan = [("qwen3-30b-8k", ("bf16",), _SKEWED)]


def parse_shape(text: str) -> Shape:
    """Return a shape by its name or by five numbers.

    >>> parse_shape("1024,256,128,64,8").record()
    {'name': '1024,256,128,64,8', 'T': 1024, 'D': 256, 'F': 128, 'E': 64, 'K': 8}

    Raises:
        ConfigError: neither, numbers below 1, or more choices than experts.
    """
    if text in SHAPES:
        return SHAPES[text]
    parts = text.replace("x", ",").split(",")
    if len(parts) != 5 or not all(part.strip().isdigit() for part in parts):
        raise ConfigError(
            f"--shape {text}: no such name, and not five numbers T,D,F,E,K; known: {', '.join(SHAPES)}"
            f"{nearest(text, SHAPES)}"
        )
    tokens, dim, hidden_dim, num_experts, top_k = map(int, parts)
    if min(tokens, dim, hidden_dim, num_experts, top_k) < 1 or top_k > num_experts:
        raise ConfigError(f"--shape {text}: T, D, F, E and K must be at least 1, and K at most E")
    return Shape(text, tokens, dim, hidden_dim, num_experts, top_k)


def plan(device: str, *, quick: bool, names: Sequence[str] = ()) -> Plan:
    """Return what is measured on a device: of the shapes that are named, or else of those that fit it."""
    default = ("bf16",) if device == "cuda" else ("fp32",)
    usual = {entry[0]: entry for entry in FULL + FULL_GPU}
    if names:
        return [usual.get(name, (name, default, ("uniform",))) for name in names]
    if device == "cuda":
        return QUICK_GPU if quick else FULL_GPU
    return QUICK if quick else FULL


def cases(plan: Plan, dtypes: Sequence[str], routings: Sequence[str]) -> list[tuple[Shape, str, str]]:
    """Spell out a plan; dtypes and routings that are given replace the plan's."""
    return [
        (SHAPES.get(name) or parse_shape(name), dtype, routing)
        for name, own_dtypes, own_routings in plan
        for dtype in (dtypes or own_dtypes)
        for routing in (routings or own_routings)
    ]
