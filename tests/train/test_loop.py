import pytest
import torch
from tiny_training import SEQ_LEN, TinyLM, equal, make_trainer, weights

from himoe.errors import HimoeError
from himoe.nn import moe_layers
from himoe.presets import loss_free, moge


def balancer_state(trainer):
    return {name: buffer.clone() for name, buffer in trainer.model.moe.router.balancer.named_buffers()}


# Routers without a term that sees its micro-batch only, as those with the load share f do.
LINEAR = {"moge": lambda: moge(16, 8, 4, num_groups=4, alpha=0.0), "loss_free": lambda: loss_free(16, 8, 4)}


@pytest.mark.parametrize("router", LINEAR)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_equal_the_whole_batch(accumulate, router):
    def trained(accumulate):
        torch.manual_seed(1)
        trainer = make_trainer(model=TinyLM(LINEAR[router]()), accumulate=accumulate)
        for _ in range(3):
            trainer.step()
        return trainer

    whole, parts = trained(1), trained(accumulate)
    for name, tensor in weights(whole).items():
        assert torch.allclose(tensor, weights(parts)[name], atol=1e-5), name
    assert parts.means.read()["loss"] == pytest.approx(whole.means.read()["loss"], abs=1e-5)
    assert parts.means.read()["grad_norm"] == pytest.approx(whole.means.read()["grad_norm"], rel=1e-4)
    assert parts.tokens_done == whole.tokens_done == 3 * 8 * SEQ_LEN


@pytest.mark.filterwarnings("ignore:LossFree. the bias moves:himoe.errors.HimoeWarning")  # a rate that shows
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_balancer_moves_once_per_optimizer_step(accumulate):
    model = TinyLM(loss_free(16, 8, 4, rate=0.25))
    trainer = make_trainer(model=model, accumulate=accumulate)
    before = balancer_state(trainer)
    trainer.step()
    bias = trainer.model.moe.router.balancer.state_dict()
    (moved,) = [value - before[name] for name, value in bias.items() if value.shape == (8,)]
    assert set(moved.abs().tolist()) <= {0.0, 0.25} and moved.abs().max() == 0.25


def test_the_loss_is_cross_entropy_and_the_terms_stand_apart():
    trainer = make_trainer()
    tokens = torch.stack([torch.from_numpy(trainer.batches.order.sample(i)) for i in range(8)])
    with torch.no_grad():
        logits, _ = trainer.model(tokens[:, :-1])
        expected = -logits.log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    trainer.step()
    means = trainer.means.read()
    assert means["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert {name for name in means if name.startswith("aux/")}


def test_the_gradient_is_clipped_over_all_parameters_together():
    trainer = make_trainer(grad_clip=1e-3)
    seen = []
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append(torch.stack([p.grad.norm() for p in trainer.model.parameters()]).norm().item())
    )
    trainer.step()
    assert seen == [pytest.approx(1e-3, rel=1e-3)]
    assert trainer.means.read()["grad_norm"] > 1e-3


def test_training_lowers_the_loss():
    trainer = make_trainer(steps=60)
    losses = []
    for _ in range(60):
        trainer.step()
        losses.append(trainer.means.read()["loss"])
        trainer.means.reset()
    assert losses[-1] < 0.8 * losses[0]


def test_bf16_autocast_keeps_weights_and_balancer_state_in_fp32_and_stays_close():
    full, half = make_trainer(), make_trainer(precision="bf16")
    for trainer in (full, half):
        trainer.step()
    assert {tensor.dtype for tensor in half.model.state_dict().values() if tensor.is_floating_point()} == {
        torch.float32
    }
    assert half.means.read()["loss"] == pytest.approx(full.means.read()["loss"], rel=0.02)
    assert not equal(weights(full), weights(half))


def test_a_loss_that_is_no_number_stops_the_run_and_spares_the_weights():
    trainer = make_trainer()
    trainer.step()
    with torch.no_grad():
        trainer.model.norm.weight[0] = float("nan")
    before = weights(trainer)
    with pytest.raises(HimoeError, match=r"diverged at step 2: loss nan.*the weight of norm\.weight") as error:
        trainer.step()
    assert "\n" not in str(error.value) and error.value.alarm.kind == "not_finite"
    after = weights(trainer)
    assert all(torch.equal(tensor.nan_to_num(), after[name].nan_to_num()) for name, tensor in before.items())
    assert trainer.steps_done == 1


def test_a_gradient_that_is_no_number_is_named_before_clipping_spreads_it():
    trainer = make_trainer()
    trainer.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(HimoeError, match=r"gradient norm (inf|nan).*the gradient of norm\.weight"):
        trainer.step()


def test_the_borders_of_documents_reach_the_model():
    class Spy(TinyLM):
        def forward(self, token_ids, mask=None, document_ids=None, targets=None):
            seen.append((token_ids, document_ids))
            return super().forward(token_ids, mask, targets=targets)

    seen, ends = [], 3
    trainer = make_trainer(model=Spy(), batch_size=64, accumulate=2)
    trainer.batches.end_of_document = ends
    trainer.step()
    for token_ids, document_ids in seen:
        assert torch.equal(document_ids, (token_ids == ends).cumsum(1))
    trainer.batches.cross_documents = True
    trainer.step()  # read ahead, still with borders
    trainer.step()
    assert [ids is None for _, ids in seen] == [False] * 4 + [True] * 2


def test_waiting_for_data_is_part_of_the_time_of_the_steps():
    trainer = make_trainer()
    trainer.step()
    assert 0 < trainer.data_seconds < trainer.step_seconds


def test_measuring_leaves_training_alone():
    plain, measured = (make_trainer(accumulate=2) for _ in range(2))
    for _ in range(3):
        plain.step()
        measured.step(measure=True)
    assert equal(weights(plain), weights(measured))
    norms = measured.monitor.norms.read()
    assert norms["experts"]["grad"] > 0 and plain.monitor.norms.read() is None


def test_a_model_without_experts_trains():
    class Dense(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(32, 32)

        def forward(self, token_ids, targets):
            return torch.nn.functional.cross_entropy(self.table(token_ids).flatten(0, 1), targets.flatten()), []

    trainer = make_trainer(model=Dense())
    trainer.step(measure=True)
    assert not moe_layers(trainer.model)
    assert trainer.statistics.read() == []
