"""The router: gate (→ noise) → adjust_logits → score → adjust_choice → select → weights.

The only place where this order is written.
"""

import math
from collections.abc import Callable
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from himoe.balance import Balancer
from himoe.errors import ConfigError
from himoe.functional import scores as score_functions
from himoe.functional.bound import bound_options, name_of, unbound
from himoe.functional.noise import normal_noise
from himoe.functional.precision import accumulation_dtype, without_autocast
from himoe.kernels.fused_route import fused_plan, fused_route
from himoe.nn.saved_routing import saved_routing
from himoe.types import RouterContext, Routing

ScoreFunction = Callable[[Tensor], Tensor]
Selector = Callable[[Tensor, RouterContext], tuple[Tensor, Tensor]]

SMALLEST_SUM = 1e-20  # keeps 0/0 away when every chosen score underflows, and a gradient of 1/sum finite


class Router(nn.Module):
    """Decide which experts see which token, and with what weight.

    Args:
        gate: module, (T, D) → logits (T, E). One with a method `noise_std (T, D) → (T, E)` gets normal noise of that
            size added to its logits in training.
        selector: plain function (scores, context) → (expert_ids (T, K), selected (T, K)); bind its options with
            `functools.partial`.
        num_experts: E.
        score: function logits → scores, softmax by default.
        balancer: strategy that keeps experts evenly used; None for none.
        renormalize: divide each token's weights by their sum.
        expert_scale: learn one weight factor per expert, starting at 1; a vector, hence never decayed by `himoe train`.
        scaling_factor: constant factor on all weights (2.5 in DeepSeek-V3).

    Attribute `fused`, False at first: score, choose and count in one Triton kernel where it covers the score function,
    the selector and what the balancer does to the choice (`kernels/fused_route.py`); elsewhere nothing changes.
    """

    fused: bool = False

    def __init__(
        self,
        gate: nn.Module,
        selector: Selector,
        *,
        num_experts: int,
        score: ScoreFunction = score_functions.softmax,
        balancer: Balancer | None = None,
        renormalize: bool = True,
        expert_scale: bool = False,
        scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        if not math.isfinite(scaling_factor):
            raise ConfigError(f"router: scaling_factor = {scaling_factor} must be finite")
        self.gate, self.selector, self.score = gate, selector, score
        self.num_experts, self.renormalize, self.scaling_factor = num_experts, renormalize, scaling_factor
        self.balancer = Balancer() if balancer is None else balancer
        self.expert_scale = nn.Parameter(torch.ones(num_experts)) if expert_scale else None

    @property
    def selector_name(self) -> str:
        """Name of the selector's function."""
        return name_of(self.selector)

    @cached_property
    def top_k(self) -> int:
        """K, the number of places the selector has for every token; it need not fill them all.

        A selector may say it by an attribute `places`, a function of its options; others choose for one zero token.
        """
        if (places := getattr(unbound(self.selector), "places", None)) is not None:
            return places(**bound_options(self.selector))
        try:
            with torch.device("cpu"):  # also where the model is built on the meta device
                context = RouterContext(batch_shape=(1,), token_ids=torch.zeros(1, dtype=torch.int64))
                return self.selector(torch.zeros(1, self.num_experts), context)[0].shape[-1]
        except AttributeError as error:  # which a module would report as its own lack of `top_k`
            raise TypeError(f"the selector {self.selector_name} fails on one token: {error}") from error

    def reset_parameters(self) -> None:
        """Set the learned scale back to 1."""
        if self.expert_scale is not None:
            nn.init.ones_(self.expert_scale)

    def forward(
        self,
        x: Float[Tensor, "T D"],
        mask: Bool[Tensor, " T"] | None = None,
        *,
        batch_shape: tuple[int, ...] | None = None,
        token_ids: Int[Tensor, " T"] | None = None,
    ) -> Routing:
        """Route T tokens; nothing is written, so the same call can be repeated at will."""
        if mask is not None:
            x = x.where(mask[:, None], 0)  # padding may hold anything, and 0·NaN would reach the gate's gradient
        with without_autocast(x.device):
            logits = self.gate(x)
            logits = logits.to(accumulation_dtype(logits.dtype))  # somebody else's gate may follow a bf16 model
            if logits.shape[-1] != self.num_experts:
                raise ConfigError(
                    f"the gate gives {logits.shape[-1]} logits, the router has {self.num_experts} experts"
                )
            noise_std: Tensor | None = None
            if self.training and hasattr(self.gate, "noise_std"):
                noise_std = self.gate.noise_std(x)  # type: ignore[operator]
            context = RouterContext(
                mask=mask,
                batch_shape=(x.shape[0],) if batch_shape is None else batch_shape,
                token_ids=token_ids,
                gate_weight=getattr(self.gate, "weight", None),
                noise=None if noise_std is None else noise_std * self.standard_noise(noise_std, mask),
                noise_std=noise_std,
                training=self.training,
            )
            noisy = logits if context.noise is None else logits + context.noise
            scores, expert_ids, selected, counts = self._choose(self.balancer.adjust_logits(noisy, context), context)
            if mask is not None:
                selected = selected & mask[:, None]
            expert_ids, selected = saved_routing(expert_ids, selected)
            weights = self._weights(scores, expert_ids, selected)
        return Routing(logits, scores, expert_ids, weights, selected, selected, context, counts=counts)

    def _choose(self, logits: Tensor, context: RouterContext) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Score, adjust the choice and select; the kernel does all three, and counts, where it gives the same."""
        if self.fused and (plan := fused_plan(self.score, self.selector, logits)) is not None:
            added = self.balancer.adds_to_choice()
            if added is not None and len(added) <= 1:  # the sum of two would be rounded elsewhere
                scores, expert_ids, counts = fused_route(logits, added[0] if added else None, context.mask, plan)
                return scores, expert_ids, torch.ones_like(expert_ids, dtype=torch.bool), counts
        scores = self.score(logits)
        choice = self.balancer.adjust_choice(scores, context)
        return scores, *self.selector(choice.detach(), context), None

    def wanted(self, routing: Routing) -> Bool[Tensor, "T E"] | None:
        """Return the experts that the selector's rule asks for before `max_k` cuts any off; None where none can be.

        Only for a routing of this router from before its balancers' next step, since they move what is chosen.
        """
        rule = getattr(unbound(self.selector), "wanted", None)
        if rule is None or routing.top_k == routing.num_experts:
            return None
        options = {name: value for name, value in bound_options(self.selector).items() if name != "max_k"}
        choice = self.balancer.adjust_choice(routing.scores.detach(), routing.context)
        return rule(choice, routing.context, **options)

    def standard_noise(self, like: Float[Tensor, "T E"], mask: Bool[Tensor, " T"] | None) -> Float[Tensor, "T E"]:
        """Draw what a noisy gate's standard deviation is multiplied by."""
        return normal_noise(like, mask)

    def _weights(self, scores: Tensor, expert_ids: Tensor, selected: Tensor) -> Tensor:
        weights = scores.gather(-1, expert_ids).where(selected, 0)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)
        if self.expert_scale is not None:
            weights = weights * self.expert_scale.to(weights.dtype)[expert_ids]
        return weights * self.scaling_factor
