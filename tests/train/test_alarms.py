import pytest
import torch
from tiny_training import DIM, TinyLM, make_trainer
from torch import nn

from himoe.balance import Chain, Momentum, Quantile
from himoe.functional.stats import effective_experts
from himoe.nn import MoE, SwiGLUExperts
from himoe.presets import hi_moe, loss_free, switch
from himoe.train.alarms import QUIET_STEPS, Alarms
from himoe.train.journal import Journal
from himoe.train.loop import DivergedError
from himoe.train.nonfinite import find_nonfinite


def train(trainer, tmp_path, steps, *, every=1, before_step=lambda step: None):
    """Train as a run does and return the alarms of all lines."""
    journal, alarms = Journal(tmp_path, trainer), []
    for step in range(1, steps + 1):
        before_step(step)
        trainer.step(measure=step % every == 0)
        if step % every == 0:
            journal.training_line()
            alarms += journal.alarms
    journal.close()
    return alarms


class ConstantGate(nn.Module):
    """The same logits for every token, whatever training does."""

    def __init__(self, logits):
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1) + 0 * x.sum(-1, keepdim=True)


def collapsed(router, logits):
    router.gate = ConstantGate(logits)
    return make_trainer(model=TinyLM(router))


def line(step, loss=2.0, wait=0.0):
    return {"step": step, "loss": loss, "lr": 1e-3, "data_wait": wait}


def spikes(losses, alarms=None):
    """Return the steps at which a loss spike is seen, with 10 steps to a line."""
    alarms = alarms or Alarms(nn.Linear(1, 1), [])
    seen = [alarm for i, loss in enumerate(losses, 1) for alarm in alarms.check(line(10 * i, loss), [])]
    assert all(alarm.kind == "loss_spike" for alarm in seen)
    return [alarm.step for alarm in seen]


def noisy(count, seed=0):
    """A falling loss with noise, as in the first part of a run."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [2 + 6 / (1 + i / 10) + 0.15 * e for i, e in enumerate(noise)]


# A run with each fault


def test_a_healthy_run_raises_nothing(tmp_path):
    assert train(make_trainer(steps=120), tmp_path, 120, every=2) == []


def test_a_learning_rate_that_jumps_is_a_loss_spike(tmp_path):
    trainer = make_trainer(steps=1000)

    def jump(step):
        if step == 60:
            trainer.learning_rate = lambda step: 3.0

    alarms = train(trainer, tmp_path, 70, before_step=jump)
    (spike,) = [alarm for alarm in alarms if alarm.kind == "loss_spike"]
    assert 60 < spike.step <= 65 and spike.layer is None
    assert "median of the 20 lines before" in spike.text and "train.learning_rate" in spike.text


def test_a_router_that_chooses_the_same_experts_for_every_token_has_collapsed(tmp_path):
    trainer = collapsed(switch(DIM, 8, 2), [9.0, 8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    alarms = train(trainer, tmp_path, 55, every=5)
    assert [(alarm.kind, alarm.step, alarm.layer) for alarm in alarms] == [
        ("router_collapse", 20, 0),  # once, not at every line
        ("dead_experts", 50, 0),
    ]
    assert "went to 2.0 of 8 experts" in alarms[0].text and "MaxVio 3.00" in alarms[0].text
    assert "experts 2, 3, 4, 5, 6, 7 of 8" in alarms[1].text


def test_a_layer_whose_every_expert_is_chosen_has_not_collapsed():
    layer = MoE(switch(DIM, 3, 3), SwiGLUExperts(3, DIM, 8))
    used = float(effective_experts(torch.full((3,), 50)))
    assert used < 3  # by rounding
    record = {"layer": 0, "effective_experts": used, "max_vio_window": 0.0, "group_mass": 1.0, "dead_experts": []}
    record["experts_per_token"] = 3.0
    assert Alarms(layer, [0]).check(line(100), [record]) == []


def test_a_router_that_gives_all_probability_to_one_group_is_noticed(tmp_path):
    trainer = collapsed(hi_moe(DIM, 8, 4, num_groups=4), [20.0, 20.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    alarms = train(trainer, tmp_path, 20, every=5)
    assert ("group_collapse", 0) in [(alarm.kind, alarm.layer) for alarm in alarms]
    assert "one of 4 groups" in next(alarm.text for alarm in alarms if alarm.kind == "group_collapse")


def test_a_confident_router_without_groups_is_no_fault(tmp_path):
    trainer = collapsed(switch(DIM, 8, 2), [20.0, 20.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert "group_collapse" not in [alarm.kind for alarm in train(trainer, tmp_path, 20, every=5)]


@pytest.mark.filterwarnings("ignore:LossFree. the bias moves by:himoe.errors.HimoeWarning")
@pytest.mark.parametrize(
    ("rate", "multiplicative", "seen"), [(10.0, False, True), (1e-3, False, False), (2.0, True, True)]
)
def test_biases_that_choose_by_themselves(tmp_path, rate, multiplicative, seen):
    trainer = make_trainer(model=TinyLM(loss_free(DIM, 8, 4, rate=rate, multiplicative=multiplicative)))
    alarms = [a for a in train(trainer, tmp_path, 15) if a.kind == "growing_bias"]
    assert [(alarm.layer, alarm.step <= 15) for alarm in alarms] == [(0, True)] * seen
    assert all(f"rate = {rate:g}" in alarm.text for alarm in alarms)


def test_the_biases_of_every_balancer_with_a_rate_are_judged_and_those_without_are_not(tmp_path):
    router = loss_free(DIM, 8, 4)
    router.balancer = Chain(Momentum(8, rate=2.0, beta=0.0), Quantile(8, 4))
    router.balancer.parts[1].bias.copy_(torch.linspace(-9, 9, 8))  # logarithms, which no range bounds
    (alarm,) = [a for a in train(make_trainer(model=TinyLM(router)), tmp_path, 15) if a.kind == "growing_bias"]
    assert "the biases of Momentum are" in alarm.text and "rate = 2" in alarm.text


def test_a_learning_rate_that_is_far_too_high_names_step_and_place():
    trainer = make_trainer(learning_rate=1e30)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: loss .*first not finite: the \w+ of \w+") as error:
        for _ in range(20):
            trainer.step()
    assert error.value.alarm.kind == "not_finite" and error.value.alarm.step == trainer.steps_done + 1


def test_waiting_for_data_is_an_alarm_that_stops_nothing():
    def check(wait, waited):
        return Alarms(nn.Linear(1, 1), []).check(line(10, wait=wait), [], waited=waited)

    (alarm,) = check(0.4, 4.0)
    assert alarm.kind == "slow_data" and "40%" in alarm.text and not alarm.stops
    assert check(0.05, 4.0) == [] and check(0.4, 0.1) == []


# What a loss spike is


def test_noise_and_a_falling_loss_are_no_spikes():
    assert [spikes(noisy(300, seed)) for seed in range(5)] == [[]] * 5


def test_one_spike_is_one_alarm_and_a_later_one_another():
    losses = noisy(120)
    for i in (50, 51, 52, 90):
        losses[i] += 3
    assert spikes(losses) == [510, 910]
    close = noisy(120)
    close[50] += 3
    close[52] += 3
    assert spikes(close) == [510]  # too soon for a second one
    assert QUIET_STEPS <= 910 - 510


def test_a_loss_without_a_past_has_no_spike():
    assert spikes([8.0] * 9 + [20.0]) == [] and spikes([8.0] * 10 + [20.0]) == [110]


def test_a_resumed_run_raises_the_same_alarms():
    losses = noisy(120)
    for i in (50, 51, 90):
        losses[i] += 3
    for cut in (49, 51, 60):
        first, second = Alarms(nn.Linear(1, 1), []), Alarms(nn.Linear(1, 1), [])
        before = [alarm.step for i in range(cut) for alarm in first.check(line(10 * (i + 1), losses[i]), [])]
        second.load_tensors({name: tensor.clone() for name, tensor in first.tensors().items()})
        after = [a.step for i in range(cut, 120) for a in second.check(line(10 * (i + 1), losses[i]), [])]
        assert before + after == spikes(losses)


@pytest.fixture
def at():
    """Return which alarms go off at a step where the largest bias is `value`."""
    trainer = make_trainer(model=TinyLM(loss_free(DIM, 8, 4)))
    alarms, bias = Alarms(trainer.model, [0]), trainer.model.moe.router.balancer.bias

    def check(step, value):
        bias[0] = value
        return [alarm.kind for alarm in alarms.check(line(step), [])]

    return check


def test_a_fault_that_comes_back_is_raised_again(at):
    assert at(10, 5.0) == ["growing_bias"] and at(20, 5.0) == [] and at(30, 0.0) == []
    assert at(40, 5.0) == []  # too soon
    assert at(50, 0.0) == [] and at(10 + QUIET_STEPS, 5.0) == ["growing_bias"]


def test_a_fault_that_comes_back_too_soon_and_stays_is_raised_when_it_may(at):
    assert at(10, 5.0) == ["growing_bias"] and at(20, 0.0) == []
    seen = {step: at(step, 5.0) for step in range(30, 2 * QUIET_STEPS + 60, 10)}
    assert [step for step, kinds in seen.items() if kinds] == [10 + QUIET_STEPS]  # and once


# Where NaN and infinity begin


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return self.linear(x)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def found(model, forward=None):
    place = find_nonfinite(model, forward)
    return place and str(place)


def test_the_first_bad_weight_in_forward_order():
    model = Stack()
    assert found(model) is None
    model.head.weight.data[0, 0] = float("nan")
    assert found(model) == "the weight of head.weight"
    model.layers[1].linear.bias.data[0] = float("inf")
    assert found(model) == "the weight of layers.1.linear.bias (layer 1)"


def test_the_first_bad_output_in_forward_order():
    model = Stack()
    model.layers[1].linear.weight.data.fill_(3e38)
    x = torch.full((1, 2), 10.0)
    assert found(model) is None
    assert found(model, lambda: model(x)) == "the output of layers.1.linear (layer 1)"
    assert not any(module._forward_hooks for module in model.modules())


def test_the_gradient_where_backward_went_wrong():
    model = Stack()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for layer in model.layers[:2]:  # backward runs from the head: layer 1 came before layer 0
        layer.linear.weight.grad.fill_(float("nan"))
    assert found(model, lambda: model(torch.ones(1, 2))) == "the gradient of layers.1.linear.weight (layer 1)"
