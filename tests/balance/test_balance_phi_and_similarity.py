"""φ-balancing and the similarity of the gate's rows, by hand; what they look at and refuse."""

import math

import pytest
import torch
from free_router import choices, one_step, random_logits, route
from strategies import look

from himoe import GlobalBatch, Phi, Similarity
from himoe.errors import ConfigError
from himoe.functional.gate_losses import NORMS, similarity

LN2 = math.log(2)


# φ


def test_phi_by_hand():
    # p = (1/2, 1/4, 1/8, 1/8) on every token; m starts at 1/4
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    routing = route(p.log().expand(3, 4), 1)
    phi = Phi(4, weight=2.0, rate=0.5)
    assert phi.losses(routing)["phi"].item() == pytest.approx(2 * (1 - 2 * LN2), rel=1e-6)
    one_step(phi, routing)
    assert phi.mean_probabilities.tolist() == [3 / 8, 1 / 4, 3 / 16, 3 / 16]
    expected = 1 + 1 / 2 * math.log(3 / 8) + 1 / 4 * math.log(1 / 4) + 1 / 4 * math.log(3 / 16)
    assert phi.losses(routing)["phi"].item() == pytest.approx(2 * expected, rel=1e-6)
    one_step(phi)  # saw nothing
    assert phi.mean_probabilities.tolist() == [3 / 8, 1 / 4, 3 / 16, 3 / 16]


def test_phi_moves_by_the_mean_over_all_real_tokens_of_the_step():
    logits, mask = random_logits(0, 12, 4), torch.arange(12) % 3 > 0
    phi = Phi(4, rate=0.25)
    one_step(phi, route(logits[:9], 1, mask=mask[:9]), route(logits[9:], 1, mask=mask[9:]))
    expected = 0.75 / 4 + 0.25 * logits.softmax(-1)[mask].mean(0)
    assert phi.mean_probabilities.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_phi_looks_at_scores_or_at_raw_probabilities():
    routing = route(random_logits(3, 20, 4), 2, score="sigmoid")
    shares = routing.scores / routing.scores.sum(-1, keepdim=True)
    for source, p in (("corrected", shares), ("raw", routing.logits.softmax(-1))):
        phi = Phi(4, rate=1.0, source=source)
        one_step(phi, routing)
        assert phi.mean_probabilities.tolist() == pytest.approx(p.mean(0).tolist(), rel=1e-6)
        m = phi.mean_probabilities.double()
        expected = 0.01 * (p.mean(0) * (m.log() + 1)).sum()
        assert phi.losses(routing)["phi"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_near_balance_the_gradient_of_phi_is_that_of_switch():
    """log m_i + 1 against E·f_i: to first order around 1/E the same, up to a constant that Σp = 1 takes away."""
    counts = torch.tensor([104, 96, 102, 98])
    logits = (0.01 * random_logits(0, 6, 4)).requires_grad_()
    phi = Phi(4, weight=1.0)
    phi.mean_probabilities.copy_(counts / counts.sum())
    routing = route(logits, 1).replace(step_counts=counts)
    ours, switch = (
        torch.autograd.grad(sum(balancer.losses(routing).values()), logits, retain_graph=True)[0]
        for balancer in (phi, GlobalBatch(weight=1.0))
    )
    assert torch.allclose(ours, switch, rtol=0.05, atol=1e-5)
    assert switch.abs().max() > 1e-3


# Similarity


def test_similarity_by_hand():
    # rows (3, 4)/5, (1, 0), (0, −2)/2: products 3/5, −4/5, 0
    weight = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, -2.0]], dtype=torch.float64)
    assert similarity(weight, "frobenius").item() == pytest.approx(2 * (9 + 16) / 25)
    assert similarity(weight, "l1").item() == pytest.approx(2 * (3 + 4) / 5)
    routing = look(weight, random_logits(0, 5, 2), 1)
    assert Similarity(weight=0.5, norm="l1").losses(routing)["router_similarity"].item() == pytest.approx(0.5 * 14 / 5)


@pytest.mark.parametrize(("num_experts", "dim"), [(3, 2), (5, 2), (7, 2), (4, 6)])
def test_the_least_similarity_is_that_of_a_tight_frame(num_experts, dim):
    """E directions evenly over the circle reach E²/D − E; at most D can be orthogonal."""
    if num_experts > dim:
        angle = math.pi * torch.arange(num_experts, dtype=torch.float64) / num_experts
        weight = torch.stack([angle.cos(), angle.sin()], dim=-1) * torch.linspace(1, 3, num_experts)[:, None]
    else:
        weight = torch.linalg.qr(random_logits(0, dim, dim))[0][:num_experts]
    least = max(0.0, num_experts**2 / dim - num_experts)
    assert similarity(weight, "frobenius").item() == pytest.approx(least, abs=1e-12)
    assert similarity(random_logits(1, num_experts, dim), "frobenius").item() > least
    assert (similarity(weight, "l1").item() < 1e-12) is (num_experts <= dim)


@pytest.mark.parametrize("norm", NORMS)
def test_similarity_ignores_the_lengths_of_rows_and_survives_an_empty_row(norm):
    weight = random_logits(0, 5, 4)
    scaled = weight * torch.tensor([[1e-3], [1.0], [7.0], [1e3], [2.0]])
    assert similarity(weight, norm).item() == pytest.approx(similarity(scaled, norm).item(), rel=1e-12)
    scaled[0] = 0
    leaf = scaled.requires_grad_()
    (grad,) = torch.autograd.grad(similarity(leaf, norm), leaf)
    assert grad.isfinite().all()


def test_similarity_is_fp32_whatever_the_weight_and_the_autocast():
    weight = random_logits(0, 5, 4).float()
    expected = similarity(weight, "frobenius")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarity(weight, "frobenius"), expected)
    assert similarity(weight.bfloat16(), "frobenius").dtype == torch.float32


def test_similarity_refuses_a_gate_without_a_matrix():
    with pytest.raises(ConfigError, match=r"similarity: the gate has no \(E, D\) weight"):
        Similarity().losses(choices([[0], [1]], 2))
