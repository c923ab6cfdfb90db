import copy

import pytest
import torch
from tiny_training import TinyLM, equal, make_trainer, weights

from himoe.train.ema import WeightAverage


def set_all(model, value):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
def test_it_is_the_weighted_mean_of_the_weights_after_each_step(decay):
    model, values = TinyLM(), [3.0, -1.0, 2.0, 5.0, 0.5]
    average = WeightAverage(model, decay)
    for count, value in enumerate(values, 1):
        set_all(model, value)
        average.update()
        shares = [decay ** (count - 1 - s) for s in range(count)]
        expected = sum(share * v for share, v in zip(shares, values, strict=False)) / sum(shares)
        for name, tensor in average.tensors().items():
            assert torch.allclose(tensor, torch.tensor(expected), atol=1e-6), name


def test_it_equals_torchs_own_average_once_the_start_is_forgotten():
    model = TinyLM()
    mine = WeightAverage(model, 0.6)
    function = torch.optim.swa_utils.get_ema_multi_avg_fn(0.6)
    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=function)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(generator=generator)
        mine.update()
        theirs.update_parameters(model)
    expected = dict(theirs.module.named_parameters())
    for name, tensor in mine.tensors().items():
        assert torch.allclose(tensor, expected[name], atol=1e-6), name


def test_only_parameters_are_averaged_each_tied_weight_once_and_in_fp32():
    model = TinyLM().to(torch.bfloat16)
    tensors = WeightAverage(model, 0.9).tensors()
    assert set(tensors) == {name for name, _ in model.named_parameters()}
    assert "head.weight" not in tensors and not any("balancer" in name for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_small_steps_of_bf16_weights_are_not_lost():
    model = torch.nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    average = WeightAverage(model, 0.999)
    for value in (1.0, *[1.0078125] * 50):  # one bf16 step apart
        set_all(model, value)
        average.update()
    (tensor,) = average.tensors().values()
    assert 1.0 < tensor.min() < 1.0078125


def test_the_swap_is_exact_also_after_an_error():
    model = TinyLM()
    average = WeightAverage(model, 0.9)
    set_all(model, 1 / 3)
    average.update()
    set_all(model, 0.1)
    before, kept = copy.deepcopy(model.state_dict()), {k: t.clone() for k, t in average.tensors().items()}
    with average.in_place():
        assert torch.equal(model.head.weight, torch.full_like(model.head.weight, 1 / 3))  # the tied one too
    assert equal(before, model.state_dict())
    with pytest.raises(ZeroDivisionError), average.in_place():
        raise ZeroDivisionError
    assert equal(before, model.state_dict()) and equal(kept, average.tensors())


def test_other_tensors_are_refused():
    average = WeightAverage(TinyLM(), 0.9)
    tensors = average.tensors()
    with pytest.raises(ValueError, match=r"the average of norm\.weight is \(3,\), must be \(16,\)"):
        average.load_tensors({**tensors, "norm.weight": torch.ones(3)}, 1)
    del tensors["norm.weight"]
    with pytest.raises(ValueError, match=r"the average of norm\.weight is None"):
        average.load_tensors(tensors, 1)


def test_averaging_and_using_the_average_leave_training_alone():
    plain, averaged = make_trainer(), make_trainer(ema_decay=0.9)
    for _ in range(4):
        plain.step()
        averaged.step()
        with averaged.ema.in_place():
            pass
    assert equal(weights(plain), weights(averaged))
    assert averaged.ema.updates == 4
    assert plain.ema is None
