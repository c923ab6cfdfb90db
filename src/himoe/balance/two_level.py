"""Hi-MoE's two terms (arXiv 2605.08292): fair traffic between groups, specialization inside a group.

    intra = −λ_intra·A        inter = +λ_inter·B

A and B are measures of the probabilities, tabulated in `functional/losses.py`. Which pair, and on which probabilities:

| | source | intra | inter |
|---|---|---|---|
| the paper | corrected | global | selected |
| the authors' code | raw | global | dense |
| entropy form | raw | entropy | entropy |
| recommended here | raw | group_conditional | dense |

With `global` the published coefficients reward putting all of a token's mass on one group: the dense total is
Σ_g m_g²(λ_inter − λ_intra·C_g), negative as soon as C_g > λ_inter/λ_intra. `group_conditional` measures decisiveness
inside each group and leaves the masses alone.
"""

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from himoe.balance.base import Balancer
from himoe.errors import ConfigError
from himoe.functional import losses
from himoe.functional.groups import Groups
from himoe.types import Routing

SELECTED_FORMS = ("sparse", "selected")


class TwoLevelTerms(Balancer):
    """Add the intra-group and inter-group terms.

    Args:
        num_experts: E.
        groups: number of equal groups, or explicit `Groups`.
        lambda_intra: λ_intra ≥ 0; 0 leaves the term out.
        lambda_inter: λ_inter ≥ 0; 0 leaves the term out.
        intra: `global`, `group_conditional`, `entropy` or `group_entropy`.
        inter: `dense`, `sparse`, `selected`, `entropy` or `group_load`.
        source: `raw`, softmax of the gate's logits, or `corrected`, the scores after every adjustment of the logits.
            `sparse` and `selected` look at what was selected, hence always at corrected probabilities.
    """

    loss_names: ClassVar[tuple[str, ...]] = ("intra", "inter")

    def __init__(
        self,
        num_experts: int,
        groups: Groups | int,
        *,
        lambda_intra: float = 0.01,
        lambda_inter: float = 0.01,
        intra: str = "group_conditional",
        inter: str = "dense",
        source: str = "raw",
    ) -> None:
        super().__init__()
        for name, value, table in (("intra", intra, losses.INTRA), ("inter", inter, losses.INTER)):
            if value not in table:
                raise ConfigError(f"two_level: {name} = {value!r} must be one of {', '.join(table)}")
        if source not in ("raw", "corrected"):
            raise ConfigError(f"two_level: source = {source!r} must be raw or corrected")
        for name, value in (("lambda_intra", lambda_intra), ("lambda_inter", lambda_inter)):
            if not 0 <= value < float("inf"):
                raise ConfigError(f"two_level: {name} = {value} must be ≥ 0 and finite")
        self.groups = Groups.of(groups, num_experts)
        self.lambda_intra, self.lambda_inter = lambda_intra, lambda_inter
        self.intra, self.inter, self.source = intra, inter, source

    def measures(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return `intra` A and `inter` B, unweighted."""
        source = {"intra": self.source, "inter": "corrected" if self.inter in SELECTED_FORMS else self.source}
        log_p = {name: losses.log_probabilities(routing, name) for name in set(source.values())}
        return {
            "intra": losses.INTRA[self.intra](log_p[source["intra"]], routing, self.groups),
            "inter": losses.INTER[self.inter](log_p[source["inter"]], routing, self.groups),
        }

    def losses(self, routing: Routing) -> dict[str, Float[Tensor, ""]]:
        """Return `intra` = −λ_intra·A and `inter` = +λ_inter·B."""
        measures, result = self.measures(routing), {}
        if self.lambda_intra:
            result["intra"] = -self.lambda_intra * measures["intra"]
        if self.lambda_inter:
            result["inter"] = self.lambda_inter * measures["inter"]
        return result
