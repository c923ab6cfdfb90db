"""One problem of the expert layer: tokens, who goes where, weights, the gradient of the output, and the right answer.

Routings: `uniform`, K experts drawn without replacement, all alike. `zipf`, expert number r in a shuffled order with
odds 1/r (Zipf's law with exponent 1), without replacement. `one_hot`, every token chooses the same K experts, the
heaviest skew there can be. `real`, what a trained run's router chose for real text (`himoe.bench.real`).
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from himoe.bench.shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUTINGS = ("uniform", "zipf", "one_hot", "real")


@dataclass(frozen=True)
class Choice:
    """Who goes where: expert_ids (T, K) without repetition, and weights (T, K) that sum to 1."""

    expert_ids: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]


@dataclass(frozen=True)
class Problem:
    """A whole layer's input; x, weights and both projections want gradients, `grad` is that of the output.

    Attributes:
        up_proj: (E, 2F, D), gate rows first.
        down_proj: (E, D, F).
        kept: (T, K), all True.
    """

    shape: Shape
    dtype: str
    x: Float[Tensor, "T D"]
    expert_ids: Int[Tensor, "T K"]
    weights: Float[Tensor, "T K"]
    kept: Tensor
    up_proj: Float[Tensor, "E H D"]
    down_proj: Float[Tensor, "E D F"]
    grad: Float[Tensor, "T D"]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient."""
        return {"x": self.x, "weights": self.weights, "up_proj": self.up_proj, "down_proj": self.down_proj}


def draw_choice(shape: Shape, routing: str, generator: torch.Generator) -> Choice:
    """Draw who goes where; the weights are a softmax of normal numbers over a token's K experts."""
    tokens, experts, top_k = shape.tokens, shape.num_experts, shape.top_k
    if routing == "one_hot":
        expert_ids = torch.arange(top_k).expand(tokens, top_k).contiguous()
    else:
        log_odds = torch.zeros(experts)
        if routing == "zipf":
            log_odds = -torch.arange(1.0, experts + 1).log()[torch.randperm(experts, generator=generator)]
        # Adding Gumbel noise and taking the K largest draws without replacement.
        noise = -torch.empty(tokens, experts).exponential_(generator=generator).log()
        expert_ids = (log_odds + noise).topk(top_k).indices
    return Choice(expert_ids, torch.randn(tokens, top_k, generator=generator).softmax(-1))


def make_problem(shape: Shape, dtype: str, routing: str | Choice, *, device: str = "cpu", seed: int = 0) -> Problem:
    """Draw a problem; the same arguments give the same one.

    Args:
        shape: its sizes.
        dtype: a name of `DTYPES`, of x, both projections and the output. Combine weights are fp32.
        routing: how to draw, or the choice itself.
        device: where it lives. Who goes where is the same on every device; the other numbers are not.
        seed: decides all numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    choice = _choose(shape, routing, generator, torch.device(device))
    if device != "cpu":  # whose numbers would take longer than what is measured
        generator = torch.Generator(device).manual_seed(seed)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, generator=generator, device=device) * scale).to(DTYPES[dtype])

    tokens, dim, hidden, experts = shape.tokens, shape.dim, shape.hidden_dim, shape.num_experts
    return Problem(
        shape=shape,
        dtype=dtype,
        x=draw(tokens, dim).requires_grad_(),
        expert_ids=choice.expert_ids,
        weights=choice.weights,
        kept=torch.ones_like(choice.expert_ids, dtype=torch.bool),
        up_proj=draw(experts, 2 * hidden, dim, scale=dim**-0.5).requires_grad_(),
        down_proj=draw(experts, dim, hidden, scale=hidden**-0.5).requires_grad_(),
        grad=draw(tokens, dim),
    )


def reroute(problem: Problem, routing: str | Choice, *, seed: int = 0) -> Problem:
    """Return the problem on the same memory with another choice, the one that `make_problem` draws for this seed."""
    choice = _choose(problem.shape, routing, torch.Generator().manual_seed(seed), problem.x.device)
    return replace(problem, expert_ids=choice.expert_ids, weights=choice.weights)


def _choose(shape: Shape, routing: str | Choice, generator: torch.Generator, device: torch.device) -> Choice:
    """Return the choice, given or drawn, on the device; its weights are a leaf of their own that wants a gradient."""
    choice = routing if isinstance(routing, Choice) else draw_choice(shape, routing, generator)
    return Choice(choice.expert_ids.to(device), choice.weights.detach().float().to(device).requires_grad_())


def answer(problem: Problem) -> dict[str, Tensor]:
    """Return the output `y` and all gradients, computed in fp64 expert by expert by plain autograd, kept in fp32.

    Shares no code with any kernel. It holds the weights of one expert in fp64 at a time.
    """
    x = problem.x.detach().double()
    grad, ids = problem.grad.double(), problem.expert_ids
    found = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in problem.leaves.items()}
    y, d_x = torch.zeros_like(x), torch.zeros_like(x)
    for e in range(problem.shape.num_experts):
        token, place = (ids == e).nonzero(as_tuple=True)
        inputs = (x[token], problem.weights[token, place], problem.up_proj[e], problem.down_proj[e])
        rows, weight, up, down = (part.detach().double().requires_grad_() for part in inputs)
        gate, value = (rows @ up.T).chunk(2, dim=-1)
        out = (F.silu(gate) * value) @ down.T * weight[:, None]
        d_rows, d_weight, d_up, d_down = torch.autograd.grad(out, (rows, weight, up, down), grad[token])
        y.index_add_(0, token, out.detach())
        d_x.index_add_(0, token, d_rows)
        found["weights"][token, place] = d_weight.float()
        found["up_proj"][e], found["down_proj"][e] = d_up.float(), d_down.float()
    return {"y": y.float(), **found, "x": d_x.float()}
