"""What strategies do over some steps of descent: load, group masses, where free logits end."""

import inspect
from functools import partial

import pytest
import torch
from torch import nn

from himoe import Balancer, Gate, Router, presets, registry
from himoe.balance import Load, LogitCorrection, LossFree, Similarity, TwoLevelTerms, step_balancers
from himoe.functional import losses, stats
from himoe.functional.groups import Groups
from himoe.functional.scores import sigmoid, softmax
from himoe.functional.selection import top_k
from himoe.nn import NoisyGate

E, K, D = 8, 2, 6


def above_zero(scores, context):
    """Every expert of positive score."""
    return torch.arange(scores.shape[1]).expand_as(scores), scores > 0


class NeedsNoise(Balancer):
    """Does nothing, on a noisy gate."""

    needs_noise = True


def skewed_router(balancer: Balancer, score=softmax, selector=None) -> Router:
    """A gate that prefers the first experts for every token; noisy where the balancer needs it."""
    torch.manual_seed(0)
    gate = NoisyGate if any(getattr(part, "needs_noise", False) for part in balancer.modules()) else Gate
    selector = selector or partial(top_k, k=K)
    router = Router(gate(D, E), selector, num_experts=E, score=score, balancer=balancer)
    with torch.no_grad():
        router.gate.weight[:, 0] += torch.linspace(1.5, -1.5, E)
    return router


def batch(seed: int, count: int = 128):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, D, generator=generator)
    x[:, 0] = 1.0  # every token carries the common direction
    return x


@torch.no_grad()
def max_vio(router: Router) -> float:
    """Of the router in its mode: a noisy gate chooses otherwise in eval."""
    return stats.max_vio(stats.load(router(batch(999, 2048)))).item()


def train(router: Router, steps: int = 200) -> float:
    """Descend on a task and the balancer's losses; return MaxVio after over that of the fresh gate's best K experts."""
    before = max_vio(skewed_router(Balancer(), router.score))
    values, target = torch.linspace(-1, 1, E), torch.randn(D, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(router.parameters(), lr=0.5)
    for step in range(steps):
        x = batch(step)
        routing = router(x)
        task = ((routing.weights * values[routing.expert_ids]).sum(-1) - 0.1 * x @ target).square().mean()
        total = 0.03 * task + sum(router.balancer.losses(routing).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        with torch.no_grad():
            router.balancer.observe(routing)
        step_balancers([router.balancer])
    assert before > 1
    return max_vio(router) / before


def make(name: str) -> Balancer:
    constructor = registry.load("balancers", name)
    needed = {
        key: value
        for key, value in {"num_experts": E, "groups": 4, "top_k": K}.items()
        if key in inspect.signature(constructor).parameters
    }
    return constructor(**needed | constructor.toy_options)


def by_threshold(name: str) -> bool:
    return registry.fact("balancers", name, "goes_with", {}).get("selector") == "threshold"


BALANCING = [name for name in registry.BALANCERS if registry.load("balancers", name).balances_load]


def test_the_table_has_strategies_that_claim_to_balance():
    assert {"switch", "loss_free", "momentum", "quantile", "expert_threshold"} <= set(BALANCING)


@pytest.mark.parametrize("score", [softmax, sigmoid])
@pytest.mark.parametrize("name", BALANCING)
def test_every_strategy_that_claims_to_balance_halves_max_vio(name, score):
    router = skewed_router(make(name), score, above_zero if by_threshold(name) else None)
    assert train(router) < 0.5
    with torch.no_grad():
        assert router(batch(999, 2048)).selected.sum(-1).double().mean() == pytest.approx(K, rel=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"update": "proportional", "rate": 0.01},
        {"update": "rms", "rate": 0.01},
        {"centred": True, "rate": 0.01},
        {"multiplicative": True, "rate": 0.02},
        {"multiplicative": True, "update": "proportional", "rate": 0.02},
    ],
)
def test_every_variant_of_loss_free_halves_max_vio(options):
    assert train(skewed_router(LossFree(E, **options), sigmoid)) < 0.5


def test_load_evens_the_noisy_choice_of_training_and_less_so_the_choice_without_noise():
    router = skewed_router(Load(weight=0.3))
    before = max_vio(router.eval())
    assert train(router.train()) < 0.1
    assert max_vio(router.eval()) > 0.5 * before


def test_rows_of_the_gate_that_are_kept_apart_do_not_balance_by_themselves():
    for score in (softmax, sigmoid):
        assert train(skewed_router(Similarity(weight=1.0), score)) > 0.7


def test_no_balancing_does_not():
    for score in (softmax, sigmoid):
        assert train(skewed_router(Balancer(), score)) > 0.7
        assert train(skewed_router(NeedsNoise(), score)) > 0.7


def test_the_inter_term_evens_the_group_masses_and_the_correction_evens_the_mean_logits():
    def mass(router: Router) -> float:
        with torch.no_grad():
            routing = router(batch(999))
        return TwoLevelTerms(E, 4).measures(routing)["inter"].item()

    router = skewed_router(TwoLevelTerms(E, 4, lambda_intra=0.0, lambda_inter=0.5))
    before = mass(router)
    train(router, 100)
    assert before > 0.4 and mass(router) < 0.3

    corrected = skewed_router(LogitCorrection(E, tau=1.0, beta=0.5))
    for step in range(10):
        with torch.no_grad():
            corrected.balancer.observe(corrected(batch(step)))
        step_balancers([corrected.balancer])
    assert max_vio(corrected) < 0.5 * max_vio(skewed_router(Balancer()))


class FreeLogits(nn.Module):
    """Logits that are parameters themselves, one row per token."""

    def __init__(self, tokens: int, num_experts: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(0.5 * torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return self.logits


def descend(preset, **options) -> dict[str, float]:
    """Where free logits end under a preset's own losses: Σm², mean C and MaxVio. 16 experts, 4 groups, k' = 1."""
    router = preset(4, 16, 4, num_groups=4, **options)
    router.gate = FreeLogits(64, 16)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.3)
    for _ in range(120):
        routing = router(torch.zeros(64, 4))
        optimizer.zero_grad()
        sum(router.balancer.losses(routing).values()).backward()
        optimizer.step()
        with torch.no_grad():
            router.balancer.observe(routing)
        step_balancers([router.balancer])
    routing, groups = router(torch.zeros(64, 4)), Groups.equal(16, 4)
    log_p = losses.log_probabilities(routing, "raw")
    return {
        "mass": losses.inter_dense(log_p, routing, groups).item(),
        "concentration": losses.intra_group_conditional(log_p, routing, groups).item(),
        "max_vio": stats.max_vio(stats.load(routing)).item(),
    }


@pytest.mark.filterwarnings("ignore::himoe.errors.HimoeWarning")
@pytest.mark.parametrize(
    ("preset", "options"),
    [
        (presets.hi_moe_paper, {}),
        (presets.hi_moe_official, {}),
        (presets.hi_moe_official, {"intra": "entropy", "inter": "entropy"}),
    ],
    ids=["paper", "official", "entropy"],
)
def test_published_coefficients_put_all_mass_of_a_token_on_one_group(preset, options):
    assert descend(preset, **options)["mass"] > 0.97


@pytest.mark.parametrize("lambda_inter", [0.01, 0.05])
def test_the_recommended_form_is_decisive_in_every_group_and_fair_between_them(lambda_inter):
    found = descend(presets.hi_moe, lambda_inter=lambda_inter)
    assert found["mass"] == pytest.approx(1 / 4, abs=0.01)
    assert found["concentration"] > 0.9
    assert found["max_vio"] < 0.3
