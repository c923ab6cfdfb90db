"""A sound gate, and one broken in each way that the conformance suite must catch, with the words that name it."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from himoe.functional.precision import accumulation_dtype, without_autocast


class Plain(nn.Module):
    """A sound noisy gate, to be broken in one place each."""

    def __init__(self, dim, num_experts):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self):
        for weight in (self.weight, self.noise_weight):
            nn.init.normal_(weight, std=1 / math.sqrt(weight.shape[1]))

    def linear(self, x, weight):
        dtype = accumulation_dtype(x.dtype)
        with without_autocast(x.device):
            return F.linear(x.to(dtype), weight.to(dtype))

    def forward(self, x):
        return self.linear(x, self.weight)

    def noise_std(self, x):
        return F.softplus(self.linear(x, self.noise_weight))


class FlattensItsTokens(Plain):
    def forward(self, x):
        return super().forward(x).flatten()


class LosesAnExpert(Plain):
    def forward(self, x):
        return super().forward(x)[:, 1:]


class OneNoisePerToken(Plain):
    def noise_std(self, x):
        return super().noise_std(x)[:, :1]


class Autocast(Plain):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class AutocastThenCast(Plain):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype)).float()


class NoiseUnderAutocast(Plain):
    def noise_std(self, x):
        return F.softplus(F.linear(x, self.noise_weight.to(x.dtype)))


class HalfInAHalfModel(Plain):
    def linear(self, x, weight):
        with without_autocast(x.device):
            return F.linear(x, weight)


class AlwaysSingle(Plain):
    def linear(self, x, weight):
        return super().linear(x.float(), weight.float())


class DetachesItsNoise(Plain):
    def noise_std(self, x):
        return super().noise_std(x).detach() + 0 * x.sum()


class OnlyTheLastExpert(Plain):
    def forward(self, x):
        logits = super().forward(x)
        return logits * (torch.arange(logits.shape[-1]) == logits.shape[-1] - 1)


class LogitsAreNotLearned(Plain):
    def forward(self, x):
        return super().forward(x).detach()

    def noise_std(self, x):
        return super().noise_std(x) + self.linear(x, self.weight).square()


class Explodes(Plain):
    def forward(self, x):
        return super().forward(x).exp()


class DividesByTheNorm(Plain):
    def forward(self, x):
        return super().forward(x) / x.to(accumulation_dtype(x.dtype)).norm(dim=-1, keepdim=True)


class RootOfZero(Plain):
    def forward(self, x):
        logits = super().forward(x)
        return logits.abs().sqrt() * logits.sign()


class CentresOverTheBatch(Plain):
    def forward(self, x):
        logits = super().forward(x)
        return logits - logits.mean(0) if len(x) else logits


class NoiseOverTheBatch(Plain):
    def noise_std(self, x):
        std = super().noise_std(x)
        return std / (1 + std.mean(0)) if len(x) else std


class NoisyLogits(Plain):
    def forward(self, x):
        logits = super().forward(x)
        return logits + torch.randn_like(logits) if self.training and len(x) > 2 else logits


class NoisyInEval(Plain):
    def forward(self, x):
        logits = super().forward(x)
        return logits if self.training else logits + 1e-7 * torch.randn_like(logits)


class NegativeNoise(Plain):
    def noise_std(self, x):
        return self.linear(x, self.noise_weight)


class SharperInEval(Plain):
    def forward(self, x):
        return super().forward(x) * (1 if self.training else 1.001)


class CannotBeReset(Plain):
    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return super().forward(x) * self.scale.to(accumulation_dtype(x.dtype))


class ResetsToAnotherSize(Plain):
    def __init__(self, dim, num_experts):
        super().__init__(dim, num_experts)
        with torch.no_grad():
            self.weight.mul_(0.1)


class ReadsBack(Plain):
    def forward(self, x):
        return super().forward(x) * (1.0 if x.sum().item() < 1e30 else 0.5)


BROKEN = {
    FlattensItsTokens: "logits is (104,), must be (13, 8)",
    LosesAnExpert: "logits is (13, 7), must be (13, 8)",
    OneNoisePerToken: "noise_std is (13, 1), must be (13, 8)",
    Autocast: "autocast reaches logits",
    AutocastThenCast: "autocast reaches logits",
    NoiseUnderAutocast: "autocast reaches noise_std",
    HalfInAHalfModel: "logits is torch.bfloat16 in a bf16 model",
    AlwaysSingle: "logits is torch.float32 in an fp64 model",
    DetachesItsNoise: "no gradient reaches noise_weight",
    OnlyTheLastExpert: "no gradient reaches any parameter from the logits of expert 0",
    LogitsAreNotLearned: "no gradient reaches any parameter from the logits of expert 0",
    Explodes: "huge tokens: logits is not finite",
    DividesByTheNorm: "tokens of zeros: logits is not finite",
    RootOfZero: "tokens of zeros: the gradient of weight is not finite",
    CentresOverTheBatch: "logits of a token depends on other tokens",
    NoiseOverTheBatch: "noise_std of a token depends on other tokens",
    NoisyLogits: "the logits are drawn at random",
    NoisyInEval: "the logits are drawn at random; noise belongs into a method noise_std",
    NegativeNoise: "noise_std is negative",
    SharperInEval: "the logits differ between training and eval",
    CannotBeReset: "does not bring scale back",
    ResetsToAnotherSize: "does not bring weight back",
    ReadsBack: "logits does not compile as one graph",
}
