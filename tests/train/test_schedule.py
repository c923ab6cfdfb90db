import pytest

from himoe.train.schedule import learning_rate_schedule

NAMES = ["cosine", "linear", "wsd", "inverse_sqrt", "constant"]


def rates(name, *steps, **options):
    rate = learning_rate_schedule(name, 2.0, **options)
    return [rate(step) for step in steps]


def test_cosine_rises_in_a_line_peaks_after_the_warmup_and_ends_at_its_minimum():
    found = rates("cosine", 1, 2, 4, 9, 14, steps=14, warmup_steps=4, min_ratio=0.1)
    # Halfway between steps 4 and 14 the cosine is at the mean of 1 and 0.1.
    assert found == pytest.approx([0.5, 1.0, 2.0, 2 * 0.55, 0.2])


def test_cosine_at_a_third_of_its_way():
    assert rates("cosine", 10, steps=30, min_ratio=0.0) == pytest.approx([2 * 0.75])  # (1 + cos 60°) / 2


def test_linear_falls_in_a_line():
    found = rates("linear", 2, 4, 9, 14, steps=14, warmup_steps=4, min_ratio=0.5)
    assert found == pytest.approx([1.0, 2.0, 1.5, 1.0])


def test_wsd_is_flat_between_warmup_and_decay():
    found = rates("wsd", 1, 2, 10, 16, 18, 20, steps=20, warmup_steps=2, min_ratio=0.5, decay_fraction=0.2)
    assert found == pytest.approx([1.0, 2.0, 2.0, 2.0, 1.5, 1.0])


def test_inverse_sqrt_halves_when_the_step_is_four_times_the_warmup():
    found = rates("inverse_sqrt", 5, 10, 40, 160, 4000, steps=99, warmup_steps=10, min_ratio=0.1)
    assert found == pytest.approx([1.0, 2.0, 1.0, 0.5, 0.2])
    assert rates("inverse_sqrt", 1, 4, steps=99, min_ratio=0.0) == pytest.approx([2.0, 1.0])  # without a warm-up


def test_constant_stays():
    assert rates("constant", 1, 2, 50, steps=20, warmup_steps=2, min_ratio=0.1) == [1.0, 2.0, 2.0]


@pytest.mark.parametrize("name", NAMES)
def test_no_step_has_a_rate_of_zero_or_above_the_peak(name):
    found = rates(name, *range(1, 101), steps=100, warmup_steps=10, min_ratio=0.1)
    assert min(found) >= 0.2 * (1 - 1e-12) and max(found) == 2.0
    if name in ("cosine", "linear", "wsd"):
        assert min(found) == pytest.approx(0.2) and found[-1] == min(found)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_steps_past_the_end_stay_at_the_minimum(name):
    assert rates(name, 30, steps=20, min_ratio=0.1) == pytest.approx([0.2])


@pytest.mark.parametrize("name", ["inverse_sqrt", "constant"])
def test_some_do_not_depend_on_the_number_of_steps(name):
    how = {"warmup_steps": 3, "min_ratio": 0.1}
    assert rates(name, *range(1, 60), steps=20, **how) == rates(name, *range(1, 60), steps=50, **how)
