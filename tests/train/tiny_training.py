"""A language model of a few thousand parameters with one MoE layer and a tied head, and a trainer around it."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from himoe.functional.groups import Groups
from himoe.nn import MoE, SwiGLUExperts, moe_layers
from himoe.presets import hi_moe
from himoe.train.batches import Batches
from himoe.train.loop import Trainer
from himoe.train.optimizer import build_optimizer
from himoe.train.schedule import learning_rate_schedule
from himoe.train.statistics import Statistics

VOCAB, DIM, SEQ_LEN = 32, 16, 8


class TinyLM(nn.Module):
    def __init__(self, router=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.norm = nn.RMSNorm(DIM)
        router = router or hi_moe(DIM, 8, 4, num_groups=4, expert_scale=True)
        self.moe = MoE(router, SwiGLUExperts(8, DIM, 16))
        self.head = nn.Linear(DIM, VOCAB, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, token_ids, mask=None, *, document_ids=None, targets=None):
        x = self.embedding(token_ids)
        y, routing = self.moe(self.norm(x), mask)
        logits = self.head(x + y)
        if targets is None:
            return logits, [routing]
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), [routing]


class Samples:
    """Sample i is a function of i alone: a noisy counter, so there is something to learn."""

    def sample(self, i):
        generator = np.random.default_rng(i)
        tokens = (generator.integers(VOCAB) + np.arange(SEQ_LEN + 1)) % VOCAB
        noise = generator.integers(VOCAB, size=SEQ_LEN + 1)
        return np.where(generator.random(SEQ_LEN + 1) < 0.1, noise, tokens)


def make_trainer(
    *, model=None, seed=0, steps=20, batch_size=8, accumulate=1, learning_rate=1e-2, optimizer="adamw", **options
):
    """`options` go to the trainer."""
    torch.manual_seed(seed)
    model = model or TinyLM()
    layers = list(range(len(moe_layers(model))))
    return Trainer(
        model,
        Batches(Samples(), batch_size=batch_size, accumulate=accumulate, end_of_document=VOCAB),
        optimizer=build_optimizer(model, learning_rate, optimizer=optimizer),
        learning_rate=learning_rate_schedule("cosine", learning_rate, steps=steps, warmup_steps=3),
        statistics=Statistics(layers, Groups.equal(8, 4), window=5),
        **options,
    )


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
