import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import DIM, SEQ_LEN, VOCAB, TinyLM, equal, make_trainer, weights
from torch import nn

from himoe.data import ByteTokenizer
from himoe.errors import HimoeError
from himoe.functional.groups import Groups
from himoe.models import DecoderLM
from himoe.nn import SwiGLU
from himoe.presets import hi_moe, loss_free
from himoe.train.evaluate import Reading, evaluate_domains, evaluate_pieces
from himoe.train.scores import Score
from himoe.train.texts import Text
from himoe.train.usage import Usage

INFORMATION = ("domain_information", "domain_information_maximum", "domain_information_floor")
HOW = Reading(VOCAB - 1, seq_len=SEQ_LEN, batch_size=3)


def score_text(model, text, reading):
    """Return all that an evaluation tells of one text."""
    found = evaluate_domains(model, {"": text}, reading)
    one = found["domains"][""]
    buckets = {key: found[key] for key in ("by_context", "by_length")}
    return SimpleNamespace(**one, **buckets, nats=one["loss"] * one["tokens"])


class Uniform(nn.Module):
    """Gives every id of its vocabulary the same probability, and remembers what it was asked."""

    def __init__(self, vocab_size):
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(vocab_size))
        self.calls = []

    def forward(self, token_ids, mask=None, *, document_ids=None):
        self.calls.append((token_ids, mask, self.training, torch.is_grad_enabled()))
        return self.logit.expand(*token_ids.shape, -1), []


def test_bits_per_byte_of_a_uniform_model_over_bytes():
    # 257 ids, so every token costs log2(257) bits: 5 bytes of text and the ends of 2 documents are 7 tokens.
    tokenizer = ByteTokenizer()
    text = Text.encode(["né", "ab"], tokenizer)
    assert text.num_bytes == 5 and len(text.tokens) == 7
    score = score_text(Uniform(257), text, Reading(256, seq_len=4, batch_size=2))
    assert score.bits_per_byte == pytest.approx(7 * math.log2(257) / 5, rel=1e-6)
    assert score.perplexity == pytest.approx(257, rel=1e-6)
    assert score.loss == pytest.approx(math.log(257), rel=1e-6)


@pytest.mark.parametrize("length", [1, SEQ_LEN, SEQ_LEN + 1, 3 * SEQ_LEN, 7 * SEQ_LEN + 5])
def test_every_token_is_predicted_once_from_the_one_before_it(length):
    model, tokens = Uniform(VOCAB), np.arange(length) % (VOCAB - 1)
    score = score_text(model, Text(tokens, length), HOW)
    inputs = torch.cat([ids[mask] if mask is not None else ids.flatten() for ids, mask, *_ in model.calls])
    assert inputs.tolist() == [VOCAB - 1, *tokens[:-1].tolist()]
    assert score.tokens == length
    assert score.nats == pytest.approx(length * math.log(VOCAB), rel=1e-6)
    assert not any(training or grad for *_, training, grad in model.calls)
    assert model.training


def test_a_window_is_no_longer_than_the_text():
    model = Uniform(VOCAB)
    score_text(model, Text(np.zeros(5, int), 5), Reading(VOCAB - 1, seq_len=1000, batch_size=2))
    assert [(tuple(ids.shape), mask) for ids, mask, *_ in model.calls] == [((1, 5), None)]


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_is_that_of_the_call_whatever_stands_around_it(precision, outer):
    seen = []
    model = TinyLM()
    model.head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=outer):
        score_text(model, Text(np.arange(20) % VOCAB, 20), dataclasses.replace(HOW, precision=precision))
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_windows_equal_one_long_sequence_for_a_model_that_sees_one_token():
    # TinyLM has no attention, so the cut into windows and their padding must not change the sum.
    torch.manual_seed(0)
    model, tokens = TinyLM(), np.random.default_rng(0).integers(VOCAB - 1, size=29)
    score = score_text(model, Text(tokens, 29), HOW)
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
    result = evaluate_domains(Uniform(VOCAB), {"a": Text(np.zeros(8, int), 2), "b": Text(np.zeros(4, int), 4)}, HOW)
    assert result["domains"]["a"]["bits_per_byte"] == pytest.approx(4 * 5)
    assert result["domains"]["b"]["bits_per_byte"] == pytest.approx(5)
    assert result["bits_per_byte"] == pytest.approx(12 * 5 / 6)
    assert result["loss"] == pytest.approx(math.log(VOCAB))


def test_a_hopeless_loss_still_gives_a_finite_perplexity():
    assert math.isfinite(Score(nats=1e6, tokens=1, num_bytes=1).perplexity)


def test_a_loss_that_is_no_number_is_an_error_of_one_line():
    model = Uniform(VOCAB)
    model.logit.data[3] = float("nan")
    with pytest.raises(HimoeError, match=r"held-out loss is nan \(first not finite: the weight of logit\)"):
        score_text(model, Text(np.zeros(8, int), 8), HOW)


def test_auxiliary_terms_do_not_enter_the_loss():
    text = Text(np.arange(20) % VOCAB, 20)
    found = []
    for weight in (0.01, 1e4):
        torch.manual_seed(0)
        router = hi_moe(DIM, 8, 4, num_groups=4, alpha=weight, lambda_intra=weight, lambda_inter=weight)
        found.append(score_text(TinyLM(router), text, HOW).nats)
    assert found[0] == found[1]


def test_evaluation_in_the_middle_leaves_training_as_it_was():
    def trained(evaluate_after):
        trainer = make_trainer(model=None)
        for step in range(4):
            trainer.step()
            if step in evaluate_after:
                before = torch.get_rng_state()
                score_text(trainer.model, Text(np.arange(50) % VOCAB, 50), HOW)
                assert torch.equal(torch.get_rng_state(), before)
        return weights(trainer)

    assert equal(trained(()), trained((0, 2)))


def test_evaluation_moves_no_balancer():
    model = TinyLM(loss_free(DIM, 8, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score_text(model, Text(np.arange(50) % VOCAB, 50), HOW)
    assert equal(before, model.state_dict())


class Recorder(Uniform):
    """Notes the documents that it is told."""

    def forward(self, token_ids, mask=None, *, document_ids=None):
        self.documents = [*getattr(self, "documents", []), document_ids]
        return super().forward(token_ids, mask)


def test_borders_are_those_of_training_unless_documents_may_be_crossed():
    tokens, end = np.array([1, 2, 31, 3, 4, 5, 6, 7, 31, 8, 9, 10]), VOCAB - 1
    model = Recorder(VOCAB)
    score_text(model, Text(tokens, 12), Reading(end, seq_len=4, batch_size=1))
    # inputs: 31 1 2 31 | 3 4 5 6 | 7 31 8 9; an end opens the document that it is followed by
    found = [ids if ids is None else ids.tolist() for ids in model.documents]
    assert found == [[[1, 1, 1, 2]], None, [[0, 1, 1, 1]]]
    model = Recorder(VOCAB)
    score_text(model, Text(tokens, 12), Reading(end, seq_len=4, batch_size=1, cross_documents=True))
    assert model.documents == [None, None, None]


def test_a_document_scores_the_same_whatever_stands_before_it_in_its_window():
    torch.manual_seed(0)
    model = DecoderLM(vocab_size=VOCAB, dim=16, num_layers=2, num_heads=2, feed_forward=lambda _: SwiGLU(16, 32))
    first, other = np.array([1, 2, 3, 31]), np.array([9, 8, 7, 31])
    last = np.arange(10, 18)
    crossing = Reading(VOCAB - 1, seq_len=12, batch_size=1, cross_documents=True)
    for reading, equal_scores in ((dataclasses.replace(crossing, cross_documents=False), True), (crossing, False)):
        nats = [
            score_text(model, Text(np.concatenate([before, last]), 12), reading).nats
            - score_text(model, Text(before, 4), reading).nats
            for before in (first, other)
        ]
        assert (nats[0] == pytest.approx(nats[1], rel=1e-6)) is equal_scores


class Costly(nn.Module):
    """Charges i + 1 bits for the target i, whatever it is told."""

    def __init__(self, vocab_size):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.costs = -torch.arange(1, vocab_size + 1) * math.log(2)

    def forward(self, token_ids, mask=None, *, document_ids=None):
        rest = torch.log1p(-self.costs.exp().sum()).expand(1)  # all probabilities together make 1
        return torch.cat([self.costs, rest]).expand(*token_ids.shape, -1), []


def test_scores_by_context_and_by_length_of_the_document():
    # Two documents, of 18 and of 3 tokens, in windows of 20: the second one begins in the first window.
    end, lengths = 2, np.array([1, 2, 0])
    text = Text(np.array([0] * 17 + [1, end] + [1, 1, 0, end]), 17 + 2 + 5)
    scored = score_text(Costly(3), text, Reading(end, seq_len=20, batch_size=1, byte_lengths=lengths))
    context, length = scored.by_context, scored.by_length
    # Bits: 1 for id 0, 2 for id 1, 3 for the end. Two tokens, which end the first document, have a context above 16.
    sizes = [[(row["from"], row["to"], row["tokens"], row["bytes"]) for row in rows] for rows in (context, length)]
    assert sizes == [[(0, 16, 21, 22), (17, 64, 2, 2)], [(0, 16, 4, 5), (17, 64, 19, 19)]]
    assert [row["bits_per_byte"] for row in context] == pytest.approx([(17 + 2 + 2 + 1 + 3) / 22, (2 + 3) / 2])
    assert [row["bits_per_byte"] for row in length] == pytest.approx([(2 + 2 + 1 + 3) / 5, (17 + 2 + 3) / 19])


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_document_keeps_its_length_over_windows_batches_and_pieces(batch_size):
    end, tokens = VOCAB - 1, np.array([1] * 70 + [31] + [2] * 5 + [31] + [3] * 20)
    reading = Reading(end, seq_len=SEQ_LEN, batch_size=batch_size)
    whole = score_text(Uniform(VOCAB), Text(tokens, 97), reading)
    assert [(row["from"], row["tokens"]) for row in whole.by_length] == [(0, 6), (17, 20), (65, 71)]
    pieces = (("a", tokens[i : i + 7], 7) for i in range(0, 97, 7))
    result = evaluate_pieces(Uniform(VOCAB), pieces, reading, lambda: Usage([], Groups.equal(8, 4)))
    assert result["by_length"] == whole.by_length
    assert result["by_context"] == whole.by_context
    assert result["domains"]["a"]["bytes"] == 98


def test_domains_may_come_in_any_order():
    torch.manual_seed(0)
    model, tokens = TinyLM(), np.random.default_rng(0).integers(VOCAB, size=60)
    texts = {"a": Text(tokens[:40], 40), "b": Text(tokens[40:], 20)}
    pieces = [("a", tokens[:10], 10), ("b", tokens[40:45], 5), ("a", tokens[10:40], 30), ("b", tokens[45:], 15)]
    mixed = evaluate_pieces(model, pieces, HOW, new_usage)
    plain = evaluate_domains(model, texts, HOW)
    assert {name: mixed["domains"][name]["loss"] for name in texts} == pytest.approx(
        {name: plain["domains"][name]["loss"] for name in texts}
    )
    assert mixed["bits_per_byte"] == pytest.approx(plain["bits_per_byte"])


def new_usage():
    return Usage([0], Groups.equal(8, 4))


def test_the_load_counts_every_real_token_and_no_padding():
    # 13 tokens in windows of 8: three places of padding. Every token has 4 experts.
    result = evaluate_pieces(TinyLM(), [("a", np.arange(13), 13)], HOW, new_usage)
    (layer,) = result["domains"]["a"]["layers"]
    assert sum(layer["load"]) == 13 * 4
    assert (layer["layer"], layer["drop_rate"]) == (0, 0)
    assert result["layers"][0] == {**layer, **dict.fromkeys(INFORMATION)}
