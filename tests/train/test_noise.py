import math

import pytest
import torch
from tiny_training import make_trainer
from torch import nn

from himoe.train.noise import LEAST_MEASUREMENTS, NoiseScale

SIZE, BATCH = 64, 16


def measured(noise, parameter, parts):
    """Give `noise` one step whose micro-batches have the mean gradients `parts`."""
    parameter.grad = parts[0] / len(parts)
    noise.first_micro_batch()
    parameter.grad = torch.stack(parts).mean(0)
    noise.whole_step(parameter.grad.norm())


def synthetic(steps, *, accumulate, sigma, seed=0, decay=1.0):
    """Gradients of BATCH sequences, each (1, …, 1) plus noise of variance σ² per component: S/|G|² = σ²."""
    generator = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    noise = NoiseScale([parameter], batch_size=BATCH, accumulate=accumulate, decay=decay)
    for _ in range(steps):
        gradients = 1 + sigma * torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64)
        measured(noise, parameter, [part.mean(0) for part in gradients.chunk(accumulate)])
    return noise


@pytest.mark.parametrize("accumulate", [2, 4, 16])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 6.0])
def test_known_noise_is_found_whatever_the_micro_batches(accumulate, sigma):
    steps = 1500
    noise = synthetic(steps, accumulate=accumulate, sigma=sigma)
    spread = accumulate / BATCH - 1 / BATCH  # 1/B_small − 1/B_big
    error = 2 / (sigma * math.sqrt(SIZE * steps * spread))  # relative, of the mean of S: its cross term G·noise
    assert noise.read() == pytest.approx(sigma**2, rel=3 * error + 0.02)


def test_both_estimates_are_unbiased():
    # By hand: two micro-batches of 8 with gradients 3 and 1 in one component. |G_small|² = 9, |G_big|² = 4,
    # |G|² = (16·4 − 8·9)/8 = −1, S = (9 − 4)/(1/8 − 1/16) = 80; and in the other order |G|² = 7, S = −48.
    parameter = nn.Parameter(torch.zeros(1))
    noise = NoiseScale([parameter], batch_size=16, accumulate=2)
    three, one = torch.tensor([3.0]), torch.tensor([1.0])
    measured(noise, parameter, [three, one])
    assert noise.tensors()["means"].tolist() == pytest.approx([-1, 80])
    measured(noise, parameter, [one, three])
    assert noise.tensors()["means"].tolist() == pytest.approx([3, 16])


def test_nothing_is_said_too_early_nor_of_a_gradient_lost_in_noise():
    assert synthetic(LEAST_MEASUREMENTS - 1, accumulate=2, sigma=0.5).read() is None
    assert synthetic(LEAST_MEASUREMENTS, accumulate=2, sigma=0.5).read() is not None
    parameter = nn.Parameter(torch.zeros(1))
    noise = NoiseScale([parameter], batch_size=2, accumulate=2)
    for _ in range(LEAST_MEASUREMENTS):
        measured(noise, parameter, [torch.tensor([1.0]), torch.tensor([-1.0])])  # |G|² = −1
    assert noise.read() is None


def test_one_micro_batch_has_nothing_to_compare():
    parameter = nn.Parameter(torch.ones(3))
    noise = NoiseScale([parameter], batch_size=4, accumulate=1)
    for _ in range(LEAST_MEASUREMENTS):
        measured(noise, parameter, [torch.ones(3)])
    assert noise.read() is None


def test_a_run_that_goes_on_with_one_micro_batch_does_not_repeat_what_was_measured():
    first = synthetic(LEAST_MEASUREMENTS, accumulate=2, sigma=0.5)
    second = NoiseScale([nn.Parameter(torch.zeros(SIZE))], batch_size=BATCH, accumulate=1)
    second.load_tensors(first.tensors())
    assert first.read() is not None and second.read() is None


def test_state_goes_through_a_checkpoint():
    whole = synthetic(30, accumulate=4, sigma=1.0, decay=0.9)
    first = synthetic(12, accumulate=4, sigma=1.0, decay=0.9)
    parameter = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))
    second = NoiseScale([parameter], batch_size=BATCH, accumulate=4, decay=0.9)
    second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        gradients = 1 + torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64)
        if step >= 12:
            measured(second, parameter, [part.mean(0) for part in gradients.chunk(4)])
    assert second.read() == whole.read()


def test_a_trainer_hands_over_the_first_micro_batch_and_the_whole_step():
    def squares(batch):
        """Return the squared gradient norm of the first `batch` sequences, which are one step."""
        trainer = make_trainer(batch_size=batch, grad_clip=1e-3)
        trainer.step()
        return trainer.means.read()["grad_norm"] ** 2

    trainer = make_trainer(batch_size=8, accumulate=2, grad_clip=1e-3)
    trainer.step(measure=True)
    gradient, noise = trainer.monitor.tensors()["noise/means"].tolist()
    big, small = trainer.means.read()["grad_norm"] ** 2, squares(4)
    assert gradient == pytest.approx((8 * big - 4 * small) / 4, rel=1e-3)
    assert noise == pytest.approx((small - big) * 8, rel=1e-3)
