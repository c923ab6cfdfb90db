"""The conformance suite: every balancer passes it, and every kind of broken one is named for what it breaks."""

import inspect
import itertools

import pytest
from broken_balancers import BROKEN as BROKEN_RULES
from broken_balancers import Bias
from broken_balancers_forward import BROKEN as BROKEN_HOOKS
from torch import nn

from himoe import Gate, registry
from himoe.balance import (
    Balancer,
    Chain,
    DualAscent,
    ExpertThreshold,
    GlobalBatch,
    Importance,
    Load,
    LogitCorrection,
    LossFree,
    Momentum,
    PerGroup,
    Phi,
    Quantile,
    ReluSparsity,
    Schedule,
    Similarity,
    Switch,
    TwoLevelTerms,
    ZLoss,
)
from himoe.functional import losses
from himoe.functional.groups import Groups
from himoe.nn import NoisyGate
from himoe.testing import check_balancer

BROKEN = BROKEN_RULES | BROKEN_HOOKS
E, G = 8, 4
UNEQUAL = Groups(((0, 3, 5), (1,), (2, 4, 6, 7)))


@pytest.mark.parametrize("name", registry.BALANCERS)
def test_every_entry_of_the_table_conforms_with_its_defaults(name):
    constructor = registry.load("balancers", name)
    layer = {"num_experts": E, "groups": G, "top_k": 2}
    needed = {key: value for key, value in layer.items() if key in inspect.signature(constructor).parameters}
    for gate in (NoisyGate,) if constructor.needs_noise else (Gate, NoisyGate):
        check_balancer(lambda: constructor(**needed), num_experts=E, gate=gate, compiles=gate is NoisyGate)
        grouped = {"num_groups": G, "top_k": G, "score": "sigmoid"}
        check_balancer(lambda: constructor(**needed), num_experts=E, gate=gate, compiles=False, **grouped)


COMPILED = set(zip(itertools.cycle(losses.INTRA), losses.INTER, strict=False))
"""Every form of both terms once."""


@pytest.mark.parametrize("inter", losses.INTER)
@pytest.mark.parametrize("intra", losses.INTRA)
def test_every_form_of_the_two_level_terms_conforms(intra, inter):
    for groups in (G, UNEQUAL):
        for source, score in (("raw", "softmax"), ("corrected", "softmax"), ("corrected", "sigmoid")):
            check_balancer(
                lambda groups=groups, source=source: TwoLevelTerms(E, groups, intra=intra, inter=inter, source=source),
                num_groups=G,
                top_k=G,
                score=score,
                compiles=score == "sigmoid" and (intra, inter) in COMPILED,
            )


@pytest.mark.parametrize("multiplicative", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("update", ["sign", "proportional", "rms"])
def test_every_variant_of_loss_free_conforms(update, centred, multiplicative):
    check_balancer(
        lambda: LossFree(E, rate=0.03, update=update, centred=centred, multiplicative=multiplicative),
        score="sigmoid",
        compiles=update == "sign" and not centred,  # which say how `step` moves, and that is not compiled
    )


def terms() -> TwoLevelTerms:
    return TwoLevelTerms(E, G)


def dual() -> DualAscent:
    return DualAscent(terms(), epsilon_inter=0.3, epsilon_intra=0.2, rate=0.1)


@pytest.mark.parametrize(
    "make",
    [
        Balancer,
        Chain,
        lambda: LogitCorrection(E, tau=0.5, temperature=0.7),
        lambda: LogitCorrection(E, tau=0.5, temperature=0.7, mean_from="same_batch"),
        lambda: Switch(weight=0.0),
        lambda: Chain(Phi(E, rate=0.5, source="raw"), GlobalBatch(source="raw"), Similarity(norm="l1")),
        lambda: Switch(source="raw"),
        dual,
        lambda: Schedule(terms(), "warmup", steps=3, only=("intra",)),
        lambda: Schedule(Switch(), "off_after", steps=1),
        lambda: Schedule(LogitCorrection(E, tau=0.5), "two_stage", steps=2),
        lambda: Schedule(dual(), "two_stage", steps=1),
        lambda: Schedule(Chain(LossFree(E), LogitCorrection(E), Momentum(E)), "warmup", steps=2, scales="moves"),
        lambda: Quantile(E, 4, selection_groups=G, space="linear"),
        lambda: Quantile(E, 4, smoothing=0.7),
        lambda: PerGroup(Groups.equal(E, G), [Quantile(2, 1) for _ in range(G)]),
        lambda: Momentum(E, rate=0.05, kappa=0.5, beta=0.9),
        lambda: ExpertThreshold(E, 4, beta=0.0, start=0.1),
        lambda: ReluSparsity(E, 4, start=0.5, balance=False),
        lambda: Chain(LogitCorrection(E), Schedule(terms(), "warmup", steps=5), Switch(), ZLoss(), LossFree(E)),
        lambda: Chain(Chain(LossFree(E), dual()), Switch(), Switch()),
    ],
)
def test_compositions_conform(make):
    check_balancer(make, num_groups=G, top_k=G)


@pytest.mark.parametrize("kind", Schedule.KINDS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: Chain(LossFree(E), LogitCorrection(E), Momentum(E)),
        lambda: Quantile(E, 4),
        lambda: ExpertThreshold(E, 2),
        lambda: ReluSparsity(E, 2),
    ],
)
def test_scheduled_moves_conform(make, kind):
    """What moves in `step` is scaled there, outside of what is compiled."""
    check_balancer(lambda: Schedule(make(), kind, steps=2, scales="moves"), num_groups=G, top_k=G, compiles=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda size: Switch(),
        lambda size: LossFree(size, rate=0.03),
        lambda size: LossFree(size, rate=0.03, multiplicative=True),
        lambda size: LogitCorrection(size, tau=0.5),
        lambda size: Schedule(GlobalBatch(), "warmup", steps=2),
        lambda size: Chain(Phi(size), Importance(), Load(), Similarity(norm="l1"), ZLoss()),
    ],
    ids=["switch", "loss_free", "multiplicative", "correction", "global_batch", "chain"],
)
@pytest.mark.parametrize("groups", [Groups.equal(E, G), UNEQUAL], ids=["equal", "unequal"])
def test_balancers_per_group_conform(groups, make):
    for score, compiles in (("softmax", False), ("sigmoid", True)):
        check_balancer(
            lambda: PerGroup(groups, [make(size) for size in groups.sizes]),
            score=score,
            gate=NoisyGate,
            compiles=compiles,
        )


def test_another_gate_can_be_checked_with():
    check_balancer(
        lambda: Chain(LossFree(E), Switch()), gate=lambda dim, num_experts: nn.Sequential(nn.Linear(dim, num_experts))
    )


def test_more_experts_per_token_conform():
    for make in (lambda: LossFree(E), lambda: Momentum(E), lambda: Quantile(E, E), lambda: ExpertThreshold(E, E)):
        check_balancer(make, top_k=E, compiles=False)
    check_balancer(lambda: Chain(LogitCorrection(16), LossFree(16)), num_experts=16, top_k=1, compiles=False)


def test_the_balancer_that_the_broken_ones_break_is_sound():
    check_balancer(Bias)


@pytest.mark.filterwarnings("ignore:var():UserWarning")
@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_balancer_is_caught_and_named(broken):
    with pytest.raises(AssertionError) as caught:
        check_balancer(broken)
    assert str(caught.value).startswith(f"{broken.__name__}: ")
    assert BROKEN[broken] in str(caught.value)


@pytest.mark.parametrize("name", sorted(registry.BALANCERS))
def test_every_entry_with_losses_says_their_names(name):
    balancer = registry.load("balancers", name)
    assert bool(balancer.loss_names) == (balancer.losses is not Balancer.losses)
