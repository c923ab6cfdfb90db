"""Random numbers by seed, place among the real tokens, and column: their distribution, and what they depend on."""

import pytest
import torch
from torch.distributions import Normal

from himoe.functional.noise import normal_noise, uniform_noise

T, N = 2000, 50


def drawn(seed: int = 0, rows: int = T, columns: int = N, mask=None, draw=uniform_noise, dtype=torch.float32):
    torch.manual_seed(seed)
    return draw(torch.empty(rows, columns, dtype=dtype), mask)


@pytest.mark.parametrize("seed", range(3))
def test_uniform_numbers_are_even_in_every_row_and_column_and_between_neighbours(seed):
    u = drawn(seed)
    assert u.dtype == torch.float32 and u.min() > 0 and u.max() < 1 and u.unique().numel() > 0.99 * T * N
    deviation = 12**-0.5
    for means, count in ((u.mean(0), T), (u.mean(1), N), (u.mean(), T * N)):
        assert (means - 0.5).abs().max() < 5 * deviation / count**0.5
    counts = torch.histc(u.float(), 100, 0, 1)
    assert (((counts - T * N / 100) ** 2) / (T * N / 100)).sum() < 99 + 5 * (2 * 99) ** 0.5  # χ² with 99 degrees
    centred = (u - 0.5) / deviation
    for other in (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred * drawn(seed + 1).sub(0.5) * 12**0.5,
    ):
        assert other.mean().abs() < 5 / other.numel() ** 0.5


def test_normal_numbers_follow_the_normal_distribution():
    x = drawn(draw=normal_noise).double().flatten().sort().values
    distance = (Normal(0, 1).cdf(x) - (torch.arange(T * N) + 0.5) / (T * N)).abs().max()
    assert distance < 2 / (T * N) ** 0.5  # Kolmogorov and Smirnov's, exceeded once in 1,500 draws
    assert x.isfinite().all() and drawn(draw=normal_noise, dtype=torch.float64).dtype == torch.float64


def test_padding_changes_no_number_of_a_real_token():
    real = drawn(rows=5)
    mask = torch.tensor([False, True, True, False, False, True, True, True, False])
    assert torch.equal(drawn(rows=9, mask=mask)[mask], real)
    assert torch.equal(drawn(rows=5, mask=torch.ones(5, dtype=torch.bool)), real)
    assert torch.equal(drawn(rows=5, columns=3), real[:, :3])


def test_every_call_and_every_seed_draws_other_numbers():
    torch.manual_seed(0)
    like = torch.empty(8, 4)
    first, second = uniform_noise(like, None), uniform_noise(like, None)
    assert not torch.isclose(first, second).any() and torch.equal(first, drawn(0, 8, 4))
    assert not torch.isclose(first, drawn(1, 8, 4)).any()


def test_it_compiles_as_one_graph():
    compiled = torch.compile(normal_noise, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    assert torch.equal(compiled(torch.empty(6, 3), None), drawn(0, 6, 3, draw=normal_noise))
