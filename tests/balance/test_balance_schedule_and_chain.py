"""`Chain` and `Schedule` compose any balancers; `step_balancers` ends an optimizer step."""

import pytest
import torch
from free_router import choices, one_step, random_logits, route

from himoe.balance import (
    Balancer,
    Chain,
    ExpertThreshold,
    LogitCorrection,
    LossFree,
    Momentum,
    PerGroup,
    Quantile,
    ReluSparsity,
    Schedule,
    Switch,
    TwoLevelTerms,
    ZLoss,
)
from himoe.balance.base import step_balancers
from himoe.errors import ConfigError
from himoe.functional.groups import Groups

E, G = 8, 4


def routing(seed: int = 0):
    return route(random_logits(seed, 12, E), 1, groups=G)


def terms() -> TwoLevelTerms:
    return TwoLevelTerms(E, G, lambda_intra=0.5, lambda_inter=0.25)


def factors(kind: str, steps: int, count: int) -> list[float]:
    """The factor that each of the first optimizer steps sees."""
    schedule, seen, plain = Schedule(terms(), kind, steps=steps), [], terms().losses(routing())
    for _ in range(count):
        scaled = schedule.losses(routing())
        ratio = {name: (scaled[name] / plain[name]).item() for name in plain}
        assert len(ratio) == 2 and max(ratio.values()) == min(ratio.values())
        seen.append(ratio["intra"])
        one_step(schedule, routing())
    return seen


@pytest.mark.parametrize(
    ("kind", "steps", "expected"),
    [
        ("warmup", 4, [0, 0.25, 0.5, 0.75, 1, 1]),
        ("warmup", 1, [0, 1, 1, 1, 1, 1]),
        ("two_stage", 3, [0, 0, 0, 1, 1, 1]),
        ("off_after", 2, [1, 1, 0, 0, 0, 0]),
    ],
)
def test_the_factor_of_every_step(kind, steps, expected):
    assert factors(kind, steps, 6) == expected


@pytest.mark.parametrize("kind", Schedule.KINDS)
def test_only_the_named_losses_are_scaled(kind):
    schedule, plain = Schedule(terms(), kind, steps=2, only=("intra",)), terms().losses(routing())
    scaled = schedule.losses(routing())
    assert scaled["inter"].item() == plain["inter"].item()
    assert scaled["intra"].item() == (plain["intra"].item() if kind == "off_after" else 0.0)


def test_micro_batches_do_not_advance_a_schedule():
    schedule = Schedule(terms(), "warmup", steps=10)
    one_step(schedule, *[routing()] * 4)
    assert schedule.factor().item() == pytest.approx(0.1)


def test_a_schedule_leaves_every_other_hook_in_force():
    plain = Chain(LogitCorrection(E, tau=2.0, beta=0.0), LossFree(E, rate=0.3))
    inner = Chain(LogitCorrection(E, tau=2.0, beta=0.0), LossFree(E, rate=0.3))
    schedule = Schedule(inner, "off_after", steps=5)
    for balancer in (plain, schedule):
        one_step(balancer, routing(1))
    logits = random_logits(2, 12, E)
    one, other = (route(logits, 1, groups=G, balancer=balancer) for balancer in (plain, schedule))
    assert torch.equal(one.expert_ids, other.expert_ids) and torch.equal(one.scores, other.scores)
    assert not torch.equal(one.expert_ids, route(logits, 1, groups=G).expert_ids)


def test_a_schedule_resumes_from_its_saved_step():
    schedule, resumed = (Schedule(terms(), "warmup", steps=4) for _ in range(2))
    for _ in range(3):
        one_step(schedule)
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.factor().item() == 0.75
    resumed.reset_parameters()
    assert resumed.factor().item() == 0


@pytest.mark.parametrize(
    ("kind", "steps", "text"),
    [
        ("linear", 3, "schedule = 'linear': must be one of warmup, two_stage, off_after"),
        ("warmup", 0, "schedule warmup: steps = 0 must be at least 1"),
    ],
)
def test_wrong_schedules(kind, steps, text):
    with pytest.raises(ConfigError, match=text):
        Schedule(terms(), kind, steps=steps)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scales": "rates"}, "schedule warmup: scales = 'rates' must be one of losses, moves"),
        ({"scales": "moves", "only": ("intra",)}, "leave it out with scales = 'moves'"),
    ],
)
def test_wrong_scales(options, text):
    with pytest.raises(ConfigError, match=text):
        Schedule(terms(), "warmup", steps=1, **options)


@pytest.mark.parametrize(
    ("make", "scales"),
    [
        (Switch, "losses"),
        (lambda: LossFree(E), "moves"),
        (lambda: Chain(LossFree(E), Switch()), "losses"),
        (lambda: Chain(LossFree(E)), "moves"),
        (lambda: PerGroup(Groups.equal(E, G), [LossFree(2) for _ in range(G)]), "moves"),
        (lambda: Schedule(LossFree(E), "warmup", steps=3), "moves"),
        (lambda: ReluSparsity(E, 2), "losses"),
    ],
)
def test_a_schedule_scales_what_its_balancer_has(make, scales):
    assert Schedule(make(), "off_after", steps=5).scales == scales


@pytest.mark.parametrize(
    ("make", "scales", "text"),
    [
        (lambda: LossFree(E), "losses", "LossFree has no losses to scale; it has moves, so give scales = 'moves'$"),
        (
            lambda: PerGroup(Groups.equal(E, G), [LossFree(2) for _ in range(G)]),
            "losses",
            "PerGroup has no losses to scale; ",
        ),
        (Switch, "moves", "Switch has no moves to scale; it has losses, so give scales = 'losses'$"),
        (Chain, None, "schedule off_after: scales = 'moves', but Chain has no moves to scale$"),
        (lambda: Schedule(Switch(), "warmup", steps=3), "moves", "Schedule has no moves to scale; "),
    ],
)
def test_a_schedule_with_nothing_to_scale_is_refused(make, scales, text):
    with pytest.raises(ConfigError, match=text):
        Schedule(make(), "off_after", steps=5, scales=scales)


@pytest.mark.parametrize(
    ("kind", "steps", "expected"),
    [
        ("warmup", 4, [0, 0.25, 0.5, 0.75, 1, 1]),
        ("two_stage", 3, [0, 0, 0, 1, 1, 1]),
        ("off_after", 2, [1, 1, 0, 0, 0, 0]),
    ],
)
def test_the_moves_of_every_step(kind, steps, expected):
    schedule, moves = Schedule(LossFree(2, rate=0.5), kind, steps=steps, scales="moves"), []
    for _ in range(6):
        before = schedule.balancer.bias.clone()
        one_step(schedule, choices([[0]], 2))
        moves.append((schedule.balancer.bias - before).tolist())
    assert moves == [[-0.5 * factor, 0.5 * factor] for factor in expected]


CONTROLLERS = {
    "loss_free": lambda: LossFree(E, rate=0.1, update="rms"),
    "momentum": lambda: Momentum(E, rate=0.1),
    "quantile": lambda: Quantile(E, 4, selection_groups=G),
    "expert_threshold": lambda: ExpertThreshold(E, 2, start=0.1),
    "logit_correction": lambda: LogitCorrection(E, tau=0.5),
}


@pytest.mark.parametrize("name", CONTROLLERS)
def test_any_controller_moves_as_without_a_schedule_until_it_is_off_and_then_stands_still(name):
    plain, scheduled = CONTROLLERS[name](), Schedule(CONTROLLERS[name](), "off_after", steps=3, scales="moves")
    states = []
    for step in range(5):
        batch = route(random_logits(step, 30, E), 1, groups=G)
        for balancer in (plain, scheduled):
            one_step(balancer, batch)
        floats = {n: b.clone() for n, b in scheduled.balancer.named_buffers() if b.is_floating_point()}
        states.append(floats)
        if step < 3:
            assert all(torch.equal(b, dict(plain.named_buffers())[n]) for n, b in floats.items())
    assert any(not torch.equal(states[1][n], states[2][n]) for n in states[0])
    assert all(torch.equal(states[2][n], states[4][n]) for n in states[0])


def test_counters_move_as_they_are():
    scheduled = Schedule(ExpertThreshold(E, 2), "off_after", steps=1, scales="moves")
    for seed in range(3):
        one_step(scheduled, routing(seed))
    assert scheduled.balancer.num_steps.item() == 3 and scheduled.num_steps.item() == 3


def test_scaled_moves_leave_the_losses_alone_and_scaled_losses_the_moves():
    moves = Schedule(Chain(Switch(), LossFree(E)), "two_stage", steps=9, scales="moves")
    losses = Schedule(Chain(Switch(), LossFree(E)), "two_stage", steps=9)
    assert moves.losses(routing())["load_balance"].item() == Switch().losses(routing())["load_balance"].item()
    assert losses.losses(routing())["load_balance"].item() == 0
    for schedule in (moves, losses):
        one_step(schedule, routing())
    assert not moves.balancer.parts[1].bias.any()
    assert losses.balancer.parts[1].bias.any()


def test_an_empty_chain_does_nothing():
    assert Chain().losses(routing()) == {}
    logits = random_logits(0, 12, E)
    assert torch.equal(route(logits, 2, balancer=Chain()).scores, route(logits, 2).scores)


def test_a_chain_adds_losses_of_one_name_and_keeps_the_others():
    r = routing()
    chained = Chain(Switch(weight=0.1), ZLoss(weight=0.2), Chain(Switch(weight=0.3), terms())).losses(r)
    assert set(chained) == {"load_balance", "z_loss", "intra", "inter"}
    assert chained["load_balance"].item() == pytest.approx(Switch(weight=0.4).losses(r)["load_balance"].item())
    assert chained["z_loss"].item() == pytest.approx(ZLoss(weight=0.2).losses(r)["z_loss"].item())


class Times(Balancer):
    """Multiply logits and scores."""

    def adjust_logits(self, logits, context):
        return logits * 2

    def adjust_choice(self, scores, context):
        return scores * 2


class Plus(Balancer):
    """Add to logits and scores of the first expert."""

    def adjust_logits(self, logits, context):
        return logits + torch.eye(logits.shape[1])[0]

    def adjust_choice(self, scores, context):
        return scores + torch.eye(scores.shape[1])[0]


def test_a_chain_applies_its_parts_in_order():
    x = torch.tensor([[1.0, 1.0]])
    context = choices([[0]], 2).context
    for hook in ("adjust_logits", "adjust_choice"):
        assert getattr(Chain(Times(), Plus()), hook)(x, context).tolist() == [[3.0, 2.0]]
        assert getattr(Chain(Plus(), Times()), hook)(x, context).tolist() == [[4.0, 2.0]]


def test_a_balancer_that_two_layers_share_moves_once():
    shared, alone = LossFree(2, rate=0.5), LossFree(2, rate=0.5)
    batch = choices([[0]], 2)
    for balancer in (shared, alone):
        balancer.observe(batch)
    step_balancers([shared, shared])
    step_balancers([alone])
    assert torch.equal(shared.bias, alone.bias)


def test_a_step_empties_the_sums_of_every_part():
    parts = LossFree(E), LogitCorrection(E)
    chain = Schedule(Chain(*parts), "warmup", steps=3)
    with torch.no_grad():
        chain.observe(routing())
    assert all(part.sums for part in parts)
    step_balancers([chain])
    assert not any(part.sums for part in parts)


def test_sums_are_copies_and_keep_no_graph_also_outside_no_grad():
    balancer, value = Balancer(), torch.ones(2, requires_grad=True)
    balancer.accumulate("sum", value)
    assert not balancer.sums["sum"].requires_grad
    with torch.no_grad():
        value.zero_()
    assert balancer.sums["sum"].tolist() == [1.0, 1.0]
    balancer.accumulate("sum", value + 2)
    assert balancer.sums["sum"].tolist() == [3.0, 3.0] and not balancer.sums["sum"].requires_grad


@pytest.mark.parametrize("only", [("lod_balance",), "load_balance", ("load_balance", "z_loss")])
def test_only_names_losses_that_there_may_be(only):
    with pytest.raises(ConfigError, match=r"must be some of \(load_balance\)"):
        Schedule(Switch(), "off_after", steps=1, only=only)
    Schedule(TwoLevelTerms(E, 2, lambda_intra=0), "off_after", steps=1, only=("intra",))
