import json
import math

import pytest
import torch
from tiny_training import make_trainer

from himoe.errors import HimoeError
from himoe.train.lr_finder import RangeTest, find_learning_rate, sparkline


def test_the_rate_rises_by_equal_factors_and_the_suggestion_trains():
    found = find_learning_rate(make_trainer(), end=10.0, steps=60)
    factors = [after / before for before, after in zip(found.rates, found.rates[1:], strict=False)]
    assert found.rates[0] == pytest.approx(1e-6) and factors == pytest.approx([factors[0]] * len(factors))
    assert found.suggestion == pytest.approx(found.lowest / 10, rel=0.05)
    trainer = make_trainer(learning_rate=found.suggestion, steps=40)
    for _ in range(40):
        trainer.step()
    assert trainer.means.read()["loss"] < 0.9 * found.losses[0]


def test_it_ends_where_training_breaks():
    found = find_learning_rate(make_trainer(), start=1e-3, end=1e6, steps=40)
    assert found.diverged and len(found.losses) < 40
    assert found.lowest < found.rates[-1]
    assert "training broke at" in str(found)


def test_a_model_that_never_trains_is_said_to():
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("inf")
    with pytest.raises(HimoeError, match="broke after 0 steps"):
        find_learning_rate(trainer)


def test_lowest_and_steepest_by_hand():
    smoothed = [9.0, 8.5, 8.4, 8.3, 8.2, 8.1, 8.0, 7.0, 6.9, 7.5, 9.5]
    rates = [10.0**i for i in range(len(smoothed))]
    found = RangeTest(rates, smoothed, smoothed, diverged=True)
    assert found.lowest == 1e8 and found.steepest == 1e7 and found.suggestion == 1e7


def test_the_document_is_json_and_the_table_shows_the_curve():
    found = find_learning_rate(make_trainer(), steps=20)
    document = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert document["suggestion"] == found.suggestion and len(document["rates"]) == len(document["losses"]) == 20
    text = str(found)
    assert sparkline(found.smoothed) in text and f"train.learning_rate = {found.suggestion:g}" in text
    assert math.isfinite(found.suggestion)


def test_a_flat_curve_is_drawn_flat():
    assert sparkline([2.0, 2.0, 2.0]) == "▁▁▁" and sparkline([0.0, 7.0]) == "▁█"
