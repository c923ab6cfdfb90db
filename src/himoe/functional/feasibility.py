"""Which bounds on the two-level measures any probabilities can meet at all (Hi-MoE, arXiv 2605.08292, 4.4).

With C_g the concentration inside group g and m_g its mass: intra ≤ 1, and 1 − intra ≥ 0 whatever the router does; inter
has a least value, reached at even masses; and Σp² ≤ Σm², so a small inter leaves no room for a large global intra.
"""

from himoe.errors import ConfigError
from himoe.functional.groups import Groups

ROUNDING = 1e-9


def check_feasible(
    intra: str, inter: str, groups: Groups, *, epsilon_intra: float, epsilon_inter: float, one_source: bool
) -> None:
    """Raise `ConfigError` unless inter ≤ `epsilon_inter` and 1 − intra ≤ `epsilon_intra` can hold together.

    Args:
        intra: form of the measure A, see `functional/losses.py`.
        inter: form of the measure B.
        groups: the partition of the experts.
        epsilon_intra: bound on 1 − A.
        epsilon_inter: bound on B.
        one_source: whether both are taken of the same probabilities.
    """
    most_overlap = {
        "global": 1 - 1 / groups.num_experts,
        "group_conditional": 1 - sum(1 / s for s in groups.sizes) / groups.num_groups,
    }
    # Bounds over all probabilities; for the selected forms with one expert per group, more only raise B.
    least_inter = {"dense": 1 / groups.num_groups} | dict.fromkeys(
        ("sparse", "selected"), 1 / sum(s * s for s in groups.sizes)
    )
    if intra not in most_overlap or inter not in least_inter:
        raise ConfigError(f"dual_ascent: intra = {intra!r} with inter = {inter!r}: only the l2 forms have bounds")
    if not least_inter[inter] < epsilon_inter <= 1:
        raise ConfigError(
            f"dual_ascent: epsilon_inter = {epsilon_inter} is infeasible for {inter}: "
            f"must be above {least_inter[inter]:.6g} and at most 1"
        )
    if not 0 < epsilon_intra <= most_overlap[intra]:
        raise ConfigError(
            f"dual_ascent: epsilon_intra = {epsilon_intra} is infeasible for {intra}: "
            f"must be above 0 and at most {most_overlap[intra]:.6g}"
        )
    # Σp² ≤ Σm², and with a_g the largest p of group g, which is selected: Σp² ≤ max a ≤ √Σa², Σp² ≤ S·Σa².
    selected_most = min(epsilon_inter**0.5, max(groups.sizes) * epsilon_inter)
    most = epsilon_inter if inter == "dense" else selected_most
    if intra == "global" and one_source and 1 - epsilon_intra > most + ROUNDING:
        raise ConfigError(
            f"dual_ascent: epsilon_intra = {epsilon_intra} asks for Σp² ≥ {1 - epsilon_intra:.6g}, "
            f"but {inter} ≤ epsilon_inter = {epsilon_inter} allows at most {most:.6g}; raise one of the two"
        )
