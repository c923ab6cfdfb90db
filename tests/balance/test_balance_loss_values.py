"""The auxiliary losses by hand: values, conventions, what counts as a choice."""

import math

import pytest
import torch
from free_router import choices, random_logits, route

from himoe import Groups
from himoe.balance import Switch, TwoLevelTerms, ZLoss
from himoe.errors import ConfigError
from himoe.functional import losses

# p = (1/2, 1/4, 1/8, 1/8), groups {0, 1} and {2, 3}: m = (3/4, 1/4), q = (2/3, 1/3, 1/2, 1/2), top-1 per group 0 and 2
P = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
H_P = 0.5 * math.log(2) + 0.25 * math.log(4) + 0.25 * math.log(8)
H_M = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
H_Q = (math.log(3) - 2 / 3 * math.log(2) + math.log(2)) / 2
INTRA = {"global": 11 / 32, "group_conditional": 19 / 36, "entropy": -H_P, "group_entropy": -H_Q}
INTER = {"dense": 5 / 8, "sparse": 17 / 64, "selected": 17 / 64, "entropy": -H_M, "group_load": 1 / 8}


@pytest.mark.parametrize("source", ["raw", "corrected"])
@pytest.mark.parametrize("inter", losses.INTER)
@pytest.mark.parametrize("intra", losses.INTRA)
def test_two_level_terms_of_one_token(intra, inter, source):
    terms = TwoLevelTerms(4, 2, lambda_intra=0.3, lambda_inter=0.7, intra=intra, inter=inter, source=source)
    found = terms.losses(route(P.log(), 1, groups=2))
    assert found["intra"].item() == pytest.approx(-0.3 * INTRA[intra])
    assert found["inter"].item() == pytest.approx(0.7 * INTER[inter])


def test_sparse_adds_the_selected_of_a_group_before_squaring():
    routing = route(P.log(), 2, groups=2)  # everything is selected
    sparse, selected = (TwoLevelTerms(4, 2, inter=inter).measures(routing)["inter"] for inter in ("sparse", "selected"))
    assert sparse.item() == pytest.approx(INTER["dense"])
    assert selected.item() == pytest.approx(INTRA["global"])


def test_places_that_hold_no_choice_count_for_nothing():
    routing = route(P.log(), 1, groups=2).replace(selected=torch.tensor([[True, False]]))  # expert 0 alone
    for inter in ("sparse", "selected"):
        assert TwoLevelTerms(4, 2, inter=inter).measures(routing)["inter"].item() == pytest.approx(1 / 4)
    assert Switch(weight=1.0).losses(routing)["load_balance"].item() == pytest.approx(4 * 0.5)


def test_terms_average_over_tokens_and_group_load_averages_first():
    mirrored = torch.cat([P, P.flip(1)]).log()  # masses (3/4, 1/4) and (1/4, 3/4)
    routing = route(mirrored, 1, groups=2)
    assert TwoLevelTerms(4, 2, inter="dense").measures(routing)["inter"].item() == pytest.approx(5 / 8)
    assert TwoLevelTerms(4, 2, inter="group_load").measures(routing)["inter"].item() == pytest.approx(0)


def test_explicit_groups_in_any_order_and_of_any_size():
    groups = Groups(((3, 1), (0,), (2,)))  # masses 3/8, 1/2, 1/8; shares (1/3, 2/3), 1, 1
    terms = TwoLevelTerms(4, groups)
    found = terms.measures(route(P.log(), 1, groups=groups))
    assert found["inter"].item() == pytest.approx((9 + 16 + 1) / 64)
    assert found["intra"].item() == pytest.approx((5 / 9 + 1 + 1) / 3)


def test_raw_and_corrected_probabilities_are_told_apart():
    routing = route(P.log(), 1, groups=2).replace(scores=P.flip(1))
    for source, mass in (("raw", 7 / 8), ("corrected", 1 / 2)):  # of experts 0, 1 and 2
        terms = TwoLevelTerms(4, Groups(((0, 1, 2), (3,))), inter="dense", source=source)
        assert terms.measures(routing)["inter"].item() == pytest.approx(mass**2 + (1 - mass) ** 2)
    # the forms that look at what was selected are always of corrected probabilities: 0 and 2 have 1/8 and 1/4 there
    selected = TwoLevelTerms(4, 2, inter="selected", source="raw").measures(routing)["inter"]
    assert selected.item() == pytest.approx(1 / 64 + 1 / 16)


def test_a_weight_of_zero_leaves_its_term_out():
    routing = route(P.log(), 1, groups=2)
    assert set(TwoLevelTerms(4, 2, lambda_intra=0.0).losses(routing)) == {"inter"}
    assert set(TwoLevelTerms(4, 2, lambda_inter=0.0).losses(routing)) == {"intra"}


def test_switch_by_hand():
    # Loads 3, 1, 0 of 4 pairs; every token chose one expert with logit 1 among zeros.
    routing = choices([[0], [0], [0], [1]], 3)
    high, low = math.e / (math.e + 2), 1 / (math.e + 2)
    mean = [(3 * high + low) / 4, (high + 3 * low) / 4, low]
    expected = 3 * (3 / 4 * mean[0] + 1 / 4 * mean[1])
    assert Switch(weight=0.5).losses(routing)["load_balance"].item() == pytest.approx(0.5 * expected)


@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_the_authors_value_is_k_times_ours(k):
    """f that sums to K, as OLMoE and the Hi-MoE authors count it: ours·K = theirs, so α_ours = K·α_theirs."""
    routing = route(random_logits(k, 50, 8), k)
    p = routing.logits.softmax(-1)
    f = torch.stack([(routing.expert_ids == e).any(-1).double().mean() for e in range(8)])
    assert f.sum().item() == pytest.approx(k)
    authors = 8 * (f * p.mean(0)).sum()
    ours = Switch(weight=1.0).losses(routing)["load_balance"]
    assert (k * ours).item() == pytest.approx(authors.item())


def test_switch_counts_choices_before_drops():
    routing = choices([[0], [0], [1], [2]], 3)
    dropped = routing.replace(kept=torch.tensor([[True], [False], [True], [True]]))
    assert torch.equal(*(Switch().losses(r)["load_balance"] for r in (routing, dropped)))


def test_switch_normalises_sigmoid_scores_or_takes_the_raw_softmax():
    routing = route(random_logits(3, 20, 6), 2, score="sigmoid")
    counts = torch.bincount(routing.expert_ids.flatten(), minlength=6).double()
    shares = routing.scores / routing.scores.sum(-1, keepdim=True)
    for source, p in (("corrected", shares), ("raw", routing.logits.softmax(-1))):
        expected = 6 * (counts / 40 * p.mean(0)).sum()
        assert Switch(weight=1.0, source=source).losses(routing)["load_balance"].item() == pytest.approx(
            expected.item()
        )


def test_switch_can_dip_under_its_balanced_value_when_counts_and_probabilities_disagree():
    logits = torch.tensor([[0.1, 0.0]] * 3 + [[-5.0, 5.0]] * 2, dtype=torch.float64)
    assert Switch(weight=1.0).losses(route(logits, 1))["load_balance"] < 1


def test_z_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    expected = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert ZLoss(weight=0.1).losses(route(logits, 1))["z_loss"].item() == pytest.approx(0.1 * expected)


def test_a_batch_of_padding_alone_costs_nothing():
    routing = route(random_logits(0, 5, 4), 1, groups=2, mask=torch.zeros(5, dtype=torch.bool))
    for balancer in (Switch(weight=1.0), ZLoss(weight=1.0)):
        assert sum(balancer.losses(routing).values()) == 0
    for intra in losses.INTRA:
        for inter in losses.INTER:
            assert sum(TwoLevelTerms(4, 2, intra=intra, inter=inter).losses(routing).values()) == 0


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Switch(weight=-1), "switch: weight = -1 must be ≥ 0"),
        (lambda: Switch(source="both"), "source = 'both' raw or corrected"),
        (lambda: ZLoss(weight=-1), "z_loss: weight = -1 must be ≥ 0"),
        (lambda: TwoLevelTerms(8, 3), "num_groups = 3 must divide num_experts = 8"),
        (lambda: TwoLevelTerms(8, Groups.equal(6, 3)), "groups name 6 experts, the layer has num_experts = 8"),
        (lambda: TwoLevelTerms(8, 4, intra="l2"), "intra = 'l2' must be one of global, group_conditional, entropy"),
        (lambda: TwoLevelTerms(8, 4, inter="l2"), "inter = 'l2' must be one of dense, sparse, selected, entropy"),
        (lambda: TwoLevelTerms(8, 4, source="x"), "source = 'x' must be raw or corrected"),
        (lambda: TwoLevelTerms(8, 4, lambda_inter=-0.1), "lambda_inter = -0.1 must be ≥ 0"),
    ],
)
def test_wrong_options(make, text):
    with pytest.raises(ConfigError, match=text):
        make()
