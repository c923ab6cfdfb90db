import math

import numpy as np
import pytest
import torch
from tiny_training import DIM, SEQ_LEN, VOCAB, TinyLM, equal, make_trainer, weights
from torch import nn

from himoe.data import ByteTokenizer
from himoe.errors import HimoeError
from himoe.presets import hi_moe, loss_free
from himoe.train.evaluate import Score, Text, evaluate, evaluate_domains

HOW = {"start_token": VOCAB - 1, "seq_len": SEQ_LEN, "batch_size": 3}


class Uniform(nn.Module):
    """Gives every id of its vocabulary the same probability, and remembers what it was asked."""

    def __init__(self, vocab_size):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(vocab_size))
        self.calls = []

    def forward(self, token_ids, mask=None):
        self.calls.append((token_ids, mask, self.training, torch.is_grad_enabled()))
        return self.logit.expand(*token_ids.shape, -1), []


def test_bits_per_byte_of_a_uniform_model_over_bytes():
    # 257 ids, so every token costs log2(257) bits: 5 bytes of text and the ends of 2 documents are 7 tokens.
    tokenizer = ByteTokenizer()
    text = Text.encode(["né", "ab"], tokenizer)
    assert text.num_bytes == 5 and len(text.tokens) == 7
    score = evaluate(Uniform(257), text, start_token=256, seq_len=4, batch_size=2)
    assert score.bits_per_byte == pytest.approx(7 * math.log2(257) / 5, rel=1e-6)
    assert score.perplexity == pytest.approx(257, rel=1e-6)
    assert score.loss == pytest.approx(math.log(257), rel=1e-6)


@pytest.mark.parametrize("length", [1, SEQ_LEN, SEQ_LEN + 1, 3 * SEQ_LEN, 7 * SEQ_LEN + 5])
def test_every_token_is_predicted_once_from_the_one_before_it(length):
    model, tokens = Uniform(VOCAB), np.arange(length) % (VOCAB - 1)
    score = evaluate(model, Text(tokens, length), **HOW)
    inputs = torch.cat([ids[mask] if mask is not None else ids.flatten() for ids, mask, *_ in model.calls])
    assert inputs.tolist() == [VOCAB - 1, *tokens[:-1].tolist()]
    assert score.tokens == length
    assert score.nats == pytest.approx(length * math.log(VOCAB), rel=1e-6)
    assert not any(training or grad for *_, training, grad in model.calls)
    assert model.training


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_that_of_the_call_whatever_stands_around_it(precision, outer):
    seen = []
    model = TinyLM()
    model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        evaluate(model, Text(np.arange(20) % VOCAB, 20), **HOW, precision=precision)
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_windows_equal_one_long_sequence_for_a_model_that_sees_one_token():
    # TinyLM has no attention, so the cut into windows and their padding must not change the sum.
    torch.manual_seed(0)
    model, tokens = TinyLM(), np.random.default_rng(0).integers(VOCAB - 1, size=29)
    score = evaluate(model, Text(tokens, 29), **HOW)
    with torch.no_grad():
        logits, _ = model.eval()(torch.tensor([[VOCAB - 1, *tokens[:-1].tolist()]]))
    expected = -logits[0].log_softmax(-1).gather(-1, torch.from_numpy(tokens)[:, None]).sum()
    assert score.nats == pytest.approx(expected.item(), rel=1e-5)


def test_a_prefix_counts_the_bytes_of_its_own_tokens():
    text = Text(np.array([0, 1, 2, 1], dtype=np.uint16), num_bytes=10)
    lengths = np.array([1, 4, 0])
    assert text.prefix(3, lengths).num_bytes == 5
    assert len(text.prefix(3, lengths).tokens) == 3
    assert text.prefix(None, lengths) is text and text.prefix(4, lengths) is text


def test_domains_add_up_by_bytes_and_tokens():
    result = evaluate_domains(Uniform(VOCAB), {"a": Text(np.zeros(8, int), 2), "b": Text(np.zeros(4, int), 4)}, **HOW)
    assert result["domains"]["a"]["bits_per_byte"] == pytest.approx(4 * 5)
    assert result["domains"]["b"]["bits_per_byte"] == pytest.approx(5)
    assert result["bits_per_byte"] == pytest.approx(12 * 5 / 6)
    assert result["loss"] == pytest.approx(math.log(VOCAB))


def test_a_hopeless_loss_still_gives_a_finite_perplexity():
    assert math.isfinite(Score(nats=1e6, tokens=1, num_bytes=1).perplexity)


def test_a_loss_that_is_no_number_is_an_error_of_one_line():
    model = Uniform(VOCAB)
    model.logit.data[3] = float("nan")
    with pytest.raises(HimoeError, match="held-out loss is nan"):
        evaluate(model, Text(np.zeros(8, int), 8), **HOW)


def test_auxiliary_terms_do_not_enter_the_loss():
    text = Text(np.arange(20) % VOCAB, 20)
    found = []
    for weight in (0.01, 1e4):
        torch.manual_seed(0)
        router = hi_moe(DIM, 8, 4, num_groups=4, alpha=weight, lambda_intra=weight, lambda_inter=weight)
        found.append(evaluate(TinyLM(router), text, **HOW).nats)
    assert found[0] == found[1]


def test_evaluation_in_the_middle_leaves_training_as_it_was():
    def trained(evaluate_after):
        trainer = make_trainer(model=None)
        for step in range(4):
            trainer.step()
            if step in evaluate_after:
                before = torch.get_rng_state()
                evaluate(trainer.model, Text(np.arange(50) % VOCAB, 50), **HOW)
                assert torch.equal(torch.get_rng_state(), before)
        return weights(trainer)

    assert equal(trained(()), trained((0, 2)))


def test_evaluation_moves_no_balancer():
    model = TinyLM(loss_free(DIM, 8, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, Text(np.arange(50) % VOCAB, 50), **HOW)
    assert equal(before, model.state_dict())
