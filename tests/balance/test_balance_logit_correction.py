"""Logit correction: the running mean and the corrected logits, worked by hand."""

import pytest
import torch
from free_router import choices, free_router, one_step, random_logits, route

from himoe.balance import Chain, LogitCorrection
from himoe.errors import ConfigError

FIRST = torch.tensor([[1.0, 3.0], [3.0, 5.0]])  # mean 2, 4
SECOND = torch.tensor([[10.0, 0.0], [20.0, 0.0], [30.0, 0.0]])  # mean 20, 0


def corrected(balancer, logits, *, training=True, mask=None) -> torch.Tensor:
    """What the scores are made of, recovered from the softmax up to a constant: logit differences."""
    router = free_router(2, 1, balancer=balancer).train(training)
    scores = router(logits, mask).scores
    return (scores[:, 1] / scores[:, 0]).log()


def test_the_mean_decays_once_per_step():
    balancer = LogitCorrection(2, beta=0.9)
    one_step(balancer, route(FIRST, 1))
    assert balancer.mean_logits.tolist() == pytest.approx([0.2, 0.4])
    one_step(balancer, route(SECOND, 1))
    assert balancer.mean_logits.tolist() == pytest.approx([0.9 * 0.2 + 2.0, 0.9 * 0.4])


def test_micro_batches_count_by_their_tokens():
    balancer = LogitCorrection(2, beta=0.5)
    one_step(balancer, route(FIRST, 1), route(SECOND, 1))
    assert balancer.mean_logits.tolist() == pytest.approx([0.5 * 64 / 5, 0.5 * 8 / 5])
    whole = LogitCorrection(2, beta=0.5)
    one_step(whole, route(torch.cat([FIRST, SECOND]), 1))
    assert torch.equal(whole.mean_logits, balancer.mean_logits)


def test_padding_is_left_out_of_the_mean():
    balancer = LogitCorrection(2, beta=0.0)
    mask = torch.tensor([True, True, False])
    one_step(balancer, route(torch.cat([FIRST, torch.full((1, 2), 99.0)]), 1, mask=mask))
    assert balancer.mean_logits.tolist() == pytest.approx([2.0, 4.0])


def test_a_step_without_tokens_leaves_the_mean():
    balancer = LogitCorrection(2, beta=0.5)
    one_step(balancer, route(FIRST, 1))
    before = balancer.mean_logits.clone()
    one_step(balancer, route(SECOND, 1, mask=torch.zeros(3, dtype=torch.bool)))
    one_step(balancer)
    assert torch.equal(balancer.mean_logits, before)


def test_previous_uses_the_mean_of_the_last_step():
    balancer = LogitCorrection(2, tau=0.5, beta=0.9, temperature=2.0)
    logits = torch.tensor([[1.0, 2.0]])
    assert corrected(balancer, logits).item() == pytest.approx(0.5)  # (2 − 1)/2, the mean is still 0
    one_step(balancer, route(FIRST, 1))  # mean 0.2, 0.4
    for training in (True, False):
        found = corrected(balancer, logits, training=training).item()
        assert found == pytest.approx(((2 - 0.5 * 0.4) - (1 - 0.5 * 0.2)) / 2)


def test_same_batch_includes_the_batch_in_training_and_is_frozen_in_eval():
    balancer = LogitCorrection(2, tau=0.5, beta=0.9, mean_from="same_batch")
    one_step(balancer, route(torch.tensor([[0.0, 10.0]]), 1))  # mean 0, 1
    mean = [0.9 * 0 + 0.1 * 2, 0.9 * 1 + 0.1 * 4]
    assert corrected(balancer, FIRST).tolist() == pytest.approx([2 - 0.5 * (mean[1] - mean[0])] * 2)
    assert corrected(balancer, FIRST, training=False).tolist() == pytest.approx([2 - 0.5] * 2)
    assert balancer.mean_logits.tolist() == pytest.approx([0.0, 1.0])


def test_same_batch_leaves_padding_out():
    balancer = LogitCorrection(2, tau=1.0, beta=0.0, mean_from="same_batch")
    padded = torch.cat([FIRST, torch.tensor([[0.0, 500.0]])])
    found = corrected(balancer, padded, mask=torch.tensor([True, True, False]))[:2]
    assert found.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_tau_zero_and_temperature_one_change_nothing():
    balancer = LogitCorrection(8, tau=0.0)
    one_step(balancer, route(random_logits(0, 9, 8), 2))
    logits = random_logits(1, 9, 8)
    plain, with_it = route(logits, 2), route(logits, 2, balancer=balancer)
    assert torch.equal(plain.scores, with_it.scores) and torch.equal(plain.expert_ids, with_it.expert_ids)


def test_the_correction_moves_the_choice_and_the_weights_and_leaves_the_logits():
    balancer = LogitCorrection(2, tau=1.0, beta=0.0)
    one_step(balancer, route(torch.tensor([[0.0, 4.0]]), 1))
    logits = torch.tensor([[0.0, 3.0]])
    routing = route(logits, 1, balancer=balancer, renormalize=False)
    assert routing.expert_ids.tolist() == [[0]]
    assert routing.weights.item() == pytest.approx(torch.tensor([0.0, -1.0]).softmax(0)[0].item())
    assert torch.equal(routing.logits, logits)


@pytest.mark.parametrize("mean", ["previous", "same_batch"])
def test_the_mean_itself_is_of_the_raw_logits_whatever_comes_before_in_a_chain(mean):
    first, second = LogitCorrection(2, tau=0.7), LogitCorrection(2, tau=0.3, mean_from=mean)
    chain = Chain(first, second)
    for batch in (FIRST, SECOND):
        one_step(chain, free_router(2, 1, balancer=chain)(batch))
    assert torch.equal(first.mean_logits, second.mean_logits)


def test_only_previous_is_causal():
    assert LogitCorrection(2).causal
    assert not LogitCorrection(2, mean_from="same_batch").causal


def test_state_is_fp32_and_resets_to_zero():
    balancer = LogitCorrection(2, beta=0.5)
    one_step(balancer, route(FIRST.double(), 1))
    assert balancer.mean_logits.dtype == torch.float32
    balancer.reset_parameters()
    assert balancer.mean_logits.tolist() == [0.0, 0.0]


def test_sums_in_fp64_keep_small_logits_beside_a_large_one():
    balancer = LogitCorrection(1, beta=0.0)
    large, small = torch.tensor([[3e7]]), torch.full((1000, 1), 1.0)
    one_step(balancer, route(large, 1), *[route(small, 1)] * 3, route(-large, 1))
    assert balancer.mean_logits.item() == pytest.approx(3000 / 3002, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mean_from": "next"}, "mean_from = 'next' must be previous or same_batch"),
        ({"beta": 1.0}, r"beta = 1.0 in \[0, 1\)"),
        ({"beta": -0.1}, r"beta = -0.1 in \[0, 1\)"),
        ({"temperature": 0.0}, "temperature = 0.0 above 0"),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(ConfigError, match=text):
        LogitCorrection(2, **options)


def test_counted_choices_do_not_matter_to_the_mean():
    balancer = LogitCorrection(3, beta=0.0)
    one_step(balancer, choices([[0], [0], [2]], 3))
    assert balancer.mean_logits.tolist() == pytest.approx([2 / 3, 0, 1 / 3])
