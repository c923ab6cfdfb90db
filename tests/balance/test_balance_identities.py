"""The identities between the terms, their ranges and symmetries, over random routings."""

import math

import pytest
import torch
from free_router import free_router, one_step, random_logits, route
from hypothesis import example, given, settings
from hypothesis import strategies as st

from himoe import Gate, Groups
from himoe.balance import Chain, LogitCorrection, LossFree, Switch, TwoLevelTerms
from himoe.functional import losses
from himoe.functional.stats import coefficient_of_variation

quick = settings(max_examples=25, deadline=None, derandomize=True)  # fp32 state: an unlucky near tie would flip
E = 12
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([0.01, 1.0, 5.0, 30.0])


@st.composite
def partitions(draw) -> Groups:
    """Equal groups, or any partition of the E experts in any order."""
    if draw(st.booleans()):
        return Groups.equal(E, draw(st.sampled_from([1, 2, 3, 4, 6, 12])))
    order = draw(st.permutations(range(E)))
    cuts = sorted(draw(st.sets(st.integers(1, E - 1), max_size=5)))
    return Groups(tuple(tuple(order[a:b]) for a, b in zip([0, *cuts], [*cuts, E], strict=True)))


def measures(logits, groups, k=1, **forms) -> dict[str, float]:
    routing = route(logits, k, groups=groups)
    return {name: value.item() for name, value in TwoLevelTerms(E, groups, **forms).measures(routing).items()}


@quick
@given(seeds, scales, partitions())
def test_square_norm_splits_into_masses_and_concentrations(seed, scale, groups):
    logits = random_logits(seed, 1, E, scale)
    log_m = groups.log_sum(logits.log_softmax(-1))
    q = (logits.log_softmax(-1) - groups.expand(log_m)).exp()
    c = groups.sum(q**2)
    assert measures(logits, groups, intra="global")["intra"] == pytest.approx(((2 * log_m).exp() * c).sum().item())
    assert measures(logits, groups, intra="group_conditional")["intra"] == pytest.approx(c.mean().item())


@quick
@given(seeds, scales, partitions())
def test_entropy_splits_into_that_of_masses_and_of_shares(seed, scale, groups):
    logits = random_logits(seed, 1, E, scale)
    p = logits.softmax(-1)
    m, log_p = groups.sum(p), logits.log_softmax(-1)
    h_q = -groups.sum(p * (log_p - groups.expand(groups.log_sum(log_p)))) / m  # H(q_g) of each group
    found = measures(logits, groups, intra="entropy", inter="entropy")
    assert -found["intra"] == pytest.approx(-found["inter"] + (m * h_q).nansum().item(), abs=1e-12)
    assert -measures(logits, groups, intra="group_entropy")["intra"] == pytest.approx(
        h_q.nan_to_num().mean().item(), abs=1e-9
    )


@quick
@given(seeds, st.sampled_from([0.0, 1.0, 30.0, 100.0]), st.booleans(), partitions())
def test_ranges_of_all_measures_also_at_extreme_logits(seed, scale, single, groups):
    logits = random_logits(seed, 6, E, 1.0).sign() * 100 if scale == 100.0 else random_logits(seed, 6, E, scale)
    logits = logits.float() if single else logits
    g, slack = groups.num_groups, 1e-5
    bounds = {
        "global": (1 / E, 1),
        "group_conditional": (sum(1 / s for s in groups.sizes) / g, 1),
        "entropy": (-math.log(E), 0),
        "group_entropy": (-sum(math.log(s) for s in groups.sizes) / g, 0),
        "dense": (1 / g, 1),
        "sparse": (0, 1),
        "selected": (0, 1),
        "group_load": (0, 1 - 1 / g),
    }
    for source in ("raw", "corrected"):
        for intra in losses.INTRA:
            low, high = bounds[intra]
            assert low - slack <= measures(logits, groups, intra=intra, source=source)["intra"] <= high + slack
        for inter in losses.INTER:
            low, high = (-math.log(g), 0) if inter == "entropy" else bounds[inter]
            assert low - slack <= measures(logits, groups, inter=inter, source=source)["inter"] <= high + slack


@pytest.mark.parametrize("scale", [0.0, 100.0])
def test_published_ranges_of_the_weighted_terms_are_reached(scale):
    """Uniform logits give −λ/E, −λ/S and λ/G; one expert at +100 gives −λ and λ, one per group −λ and λ/G."""
    one, one_per_group = torch.zeros(2, 1, E, dtype=torch.float64)
    one[0, 0], one_per_group[0, ::3] = scale, scale
    for logits, intra_global, intra_conditional, dense in (
        (one, -1 / E if scale == 0 else -1, -1 / 3 if scale == 0 else -(1 + 3 / 3) / 4, 1 / 4 if scale == 0 else 1),
        (one_per_group, -1 / E if scale == 0 else -1 / 4, -1 / 3 if scale == 0 else -1, 1 / 4),
    ):
        for intra, expected in (("global", intra_global), ("group_conditional", intra_conditional)):
            terms = TwoLevelTerms(E, 4, lambda_intra=0.1, lambda_inter=0.05, intra=intra)
            found = terms.losses(route(logits, 1, groups=4))
            assert found["intra"].item() == pytest.approx(0.1 * expected)
            assert found["inter"].item() == pytest.approx(0.05 * dense)


@pytest.mark.parametrize("intra", losses.INTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_stay_finite_at_extreme_logits(intra, dtype):
    logits = (random_logits(0, 6, E).sign() * 100).to(dtype)
    for inter in losses.INTER:
        for source in ("raw", "corrected"):
            leaf = logits.clone().requires_grad_()
            terms = TwoLevelTerms(E, 4, intra=intra, inter=inter, source=source)
            (grad,) = torch.autograd.grad(sum(terms.losses(route(leaf, 1, groups=4)).values()), leaf)
            assert grad.isfinite().all()


@quick
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=16).filter(any))
def test_square_of_cv_is_the_scaled_norm_of_the_shares(load):
    shares = torch.tensor(load, dtype=torch.float64) / sum(load)
    expected = len(load) * (shares**2).sum().item() - 1
    assert coefficient_of_variation(torch.tensor(load)).item() ** 2 == pytest.approx(expected, abs=1e-9)


@quick
@given(seeds, scales, partitions(), st.data())
def test_theorem_4_1(seed, scale, groups, data):
    """‖mean r‖² ≤ E‖r‖² ≤ max k'·E‖π̃‖², r_g the selected weight in group g, π̃ normalised."""
    k = tuple(data.draw(st.integers(1, size)) for size in groups.sizes)
    routing = route(random_logits(seed, 7, E, scale), k, groups=groups)
    assert torch.allclose(routing.weights.sum(-1), torch.ones((), dtype=torch.float64), atol=1e-8)
    r = groups.sum(torch.zeros_like(routing.scores).scatter(1, routing.expert_ids, routing.weights))
    of_mean, mean_of = (r.mean(0) ** 2).sum().item(), (r**2).sum(-1).mean().item()
    assert of_mean <= mean_of + 1e-12
    assert mean_of <= max(k) * (routing.weights**2).sum(-1).mean().item() + 1e-12


@quick
@given(seeds, scales, partitions(), st.data())
def test_theorem_4_1_between_the_sparse_and_the_selected_measure(seed, scale, groups, data):
    k = tuple(data.draw(st.integers(1, size)) for size in groups.sizes)
    logits = random_logits(seed, 7, E, scale)
    sparse, selected = (measures(logits, groups, k, inter=inter)["inter"] for inter in ("sparse", "selected"))
    assert selected <= sparse + 1e-12
    assert sparse <= max(k) * selected + 1e-12


def test_theorem_4_1_is_false_as_printed():
    """E = 8, G = 4, k' = 1, uniform: normalised ‖r‖² = 0.25, above S_max·‖π̃‖² = 0.125 of the raw probabilities."""
    logits, groups = torch.zeros(1, 8, dtype=torch.float64), Groups.equal(8, 4)
    routing = route(logits, 1, groups=groups)
    r = groups.sum(torch.zeros_like(routing.scores).scatter(1, routing.expert_ids, routing.weights))
    raw = TwoLevelTerms(8, groups, inter="selected").measures(routing)["inter"].item()
    assert (r**2).sum().item() == pytest.approx(0.25)
    assert max(groups.sizes) * raw == pytest.approx(0.125)


def hi_moe(groups: Groups, mean: str = "previous") -> Chain:
    return Chain(
        LogitCorrection(E, tau=0.5, beta=0.5, mean_from=mean),
        TwoLevelTerms(E, groups, intra="group_conditional", source="corrected"),
        TwoLevelTerms(E, groups, intra="global", inter="sparse"),
        Switch(weight=0.1),
    )


@quick
@given(seeds, scales, partitions(), st.sampled_from(["previous", "same_batch"]))
@example(0, 1.0, Groups.equal(E, 4), "same_batch")
def test_a_constant_added_to_a_tokens_logits_changes_no_routing_and_no_term(seed, scale, groups, mean):
    logits, constant = random_logits(seed, 9, E, scale), random_logits(seed + 1, 9, 1, 10.0)
    results = []
    for x in (logits, logits + constant):
        balancer = hi_moe(groups, mean)
        one_step(balancer, route(x, 1, groups=groups))
        routing = route(x, 1, groups=groups, balancer=balancer)
        terms = torch.stack(list(balancer.losses(routing).values()))
        results.append((routing.expert_ids, routing.weights, terms))
    (ids, weights, terms), (ids_c, weights_c, terms_c) = results
    assert torch.equal(ids, ids_c)
    assert torch.allclose(weights, weights_c, atol=1e-5) and torch.allclose(terms, terms_c, atol=1e-5)  # fp32 mean


def run(gate_weight, groups, x, balancer_of):
    """Three steps, then a routing: chosen experts with their weights, losses and state."""
    balancer = balancer_of(groups)
    router = free_router(E, 1, groups=groups, balancer=balancer)
    router.gate = Gate(x.shape[1], E).double()
    with torch.no_grad():
        router.gate.weight.copy_(gate_weight)
    for batch in x.split(10):
        one_step(balancer, router(batch))
    routing = router(x)
    dense = torch.zeros_like(routing.scores).scatter(1, routing.expert_ids, routing.weights)
    losses_found = {name: value.item() for name, value in balancer.losses(routing).items()}
    return dense, losses_found, dict(balancer.named_buffers())


@quick
@given(seeds, st.sampled_from([2, 3, 4, 6]), st.booleans(), st.data())
def test_permuting_experts_in_a_group_or_whole_groups_is_an_equivariance(seed, num_groups, whole_groups, data):
    size = E // num_groups
    table = torch.arange(E).view(num_groups, size)
    if whole_groups:
        order = table[torch.tensor(data.draw(st.permutations(range(num_groups))))].flatten()
    else:
        inside = [data.draw(st.permutations(range(size))) for _ in range(num_groups)]
        order = torch.cat([row[torch.tensor(p)] for row, p in zip(table, inside, strict=True)])
    weight, x = random_logits(seed, E, 5), random_logits(seed + 1, 30, 5)

    def balancer_of(groups: Groups) -> Chain:
        return Chain(hi_moe(groups, "same_batch"), LossFree(E, rate=0.01))

    dense, found, state = run(weight, Groups.equal(E, num_groups), x, balancer_of)
    dense_p, found_p, state_p = run(weight[order], Groups.equal(E, num_groups), x, balancer_of)
    assert torch.allclose(dense[:, order], dense_p, atol=1e-6)
    assert found_p == pytest.approx(found, rel=1e-6)
    assert state.keys() == state_p.keys() and len(state) == 2
    for name in state:
        assert torch.allclose(state[name][order], state_p[name], atol=1e-6)


def test_renaming_the_experts_of_explicit_groups_is_an_equivariance():
    groups = Groups(((0, 3, 5), (1, 2), (4, 6, 7, 8, 9, 10, 11)))
    order = torch.randperm(E, generator=torch.Generator().manual_seed(3))
    place = order.argsort()  # the new name of each old expert
    renamed = Groups(tuple(tuple(int(place[e]) for e in group) for group in groups.members))
    weight, x = random_logits(1, E, 5), random_logits(2, 30, 5)
    dense, found, _ = run(weight, groups, x, hi_moe)
    dense_p, found_p, _ = run(weight[order], renamed, x, hi_moe)
    assert torch.allclose(dense[:, order], dense_p, atol=1e-6)
    assert found_p == pytest.approx(found, rel=1e-6)
