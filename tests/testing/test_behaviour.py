"""The behaviour table: its rows are the tables' entries, and its verdict can be both."""

import json

import pytest

from himoe import registry
from himoe.balance import Balancer, Switch
from himoe.functional.selection import round_robin
from himoe.testing import behaviour


def test_every_balancer_and_every_selector_that_chooses_is_a_row():
    names = [strategy.name for strategy in behaviour.strategies()]
    assert names == ["none", *registry.BALANCERS, *(name for name in registry.SELECTORS if name != "replay")]
    for strategy in behaviour.strategies():
        after, in_eval, loss = behaviour.run(strategy, seed=0, steps=2)
        assert 0 <= after <= behaviour.E - 1 and 0 <= in_eval <= behaviour.E - 1 and 0 < loss < 100


def test_the_table_tells_who_balances_and_what_it_costs(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert behaviour.main(["--seeds", "1", "--steps", "150", "--only", "none", "loss_free", "--json"]) == 0
    none, loss_free = json.loads(capsys.readouterr().out)["rows"]
    assert none["max_vio_before"] == loss_free["max_vio_before"] > 2
    assert none["ratio"] > 0.7 and loss_free["ratio"] < 0.3
    assert none["task_loss_relative"] == 1 and 0.8 < loss_free["task_loss_relative"] < 1.2
    assert behaviour.main(["--seeds", "1", "--steps", "1", "--only", "none", "round_robin"]) == 0
    assert "round_robin" in capsys.readouterr().out


class Idle(Balancer):
    """Claims to balance, and does nothing."""

    balances_load = True


def test_a_claim_that_does_not_hold_and_a_balance_that_nobody_made_fail(monkeypatch, capsys):
    monkeypatch.setitem(registry.BALANCERS, "idle", f"{__name__}:Idle")
    assert behaviour.main(["--seeds", "1", "--steps", "5", "--only", "idle"]) == 1
    assert "not as claimed: idle" in capsys.readouterr().err
    monkeypatch.setattr(behaviour, "Balancer", lambda: Switch(weight=3.0))
    assert behaviour.main(["--seeds", "1", "--steps", "100", "--only", "none"]) == 1
    assert "not as claimed: none" in capsys.readouterr().err


class Even(Switch):
    """Does what it claims, with weight enough."""


def turns(scores, context):
    """Takes two experts in turn."""
    return round_robin(scores, context, k=2)


turns.balances_load = True


def test_a_strategy_of_a_readers_own_is_a_row(capsys):
    few = ["--seeds", "1", "--steps", "100", "--only"]
    assert behaviour.main([*few, f"{__name__}:Even", "--set", "weight=0.3"]) == 0
    assert behaviour.main([*few, f"{__name__}:Even", "--set", "weight=0.0"]) == 1
    assert f"not as claimed: {__name__}:Even" in capsys.readouterr().err
    assert behaviour.main(["--seeds", "1", "--steps", "1", "--only", f"{__name__}:turns", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["table"] == "selectors" and row["claims_to_balance"] and row["max_vio_after"] == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["swich"], "no strategy 'swich'; known: none, "),
        ([f"{__name__}:Odd"], "cannot load"),
        ([f"{__name__}:Even", "--set", "wait=1"], "unexpected keyword argument 'wait'"),
        ([f"{__name__}:Even", "--set", "weight=-1"], "weight = -1 must be ≥ 0"),
        (["switch", "--set", "weight=1"], "--set: is for one strategy of your own, and --only names 0 of them"),
    ],
)
def test_what_cannot_be_run_is_refused(capsys, words, text):
    with pytest.raises(SystemExit):
        behaviour.main(["--only", *words])
    assert text in capsys.readouterr().err
