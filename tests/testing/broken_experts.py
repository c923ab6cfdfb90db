"""Sound experts, and some broken in each way that the conformance suite must catch, with the words that name it."""

import torch
from torch import nn

E, D = 3, 4


class Matrices(nn.Module):
    """Sound experts y = W_e·x, to be broken in one place each."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts = E
        self.matrix = nn.Parameter(torch.empty(E, D, D))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.matrix)

    def forward(self, x, expert_ids, weights, kept):
        return self.add_up(self.real(x, kept), expert_ids, self.of_kept(weights, kept).to(x.dtype))

    def real(self, x, kept):
        return x.where(kept.any(-1, keepdim=True), 0)

    def of_kept(self, weights, kept):
        return weights.where(kept, 0)

    def add_up(self, x, expert_ids, weights):
        return torch.einsum("td,tkcd,tk->tc", x, self.matrix[expert_ids], weights)


class NoNumber(Matrices):
    def __init__(self) -> None:
        super().__init__()
        del self.num_experts


class NumberAsTensor(Matrices):
    def __init__(self) -> None:
        super().__init__()
        self.num_experts = torch.tensor(E)


class ComputesEveryPair(Matrices):
    def of_kept(self, weights, kept):
        return weights


class ForgetsTheWeights(Matrices):
    def of_kept(self, weights, kept):
        return kept.to(weights.dtype)


class SquaresTheWeights(Matrices):
    def of_kept(self, weights, kept):
        return weights.where(kept, 0).square()


class RenormalisesTheWeights(Matrices):
    def of_kept(self, weights, kept):
        weights = weights.where(kept, 0)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)


class DetachesTheWeights(Matrices):
    def of_kept(self, weights, kept):
        return weights.where(kept, 0).detach()


class FirstChoiceAlone(Matrices):
    def add_up(self, x, expert_ids, weights):
        return super().add_up(x, expert_ids[:, :1], weights[:, :1])


class AddsABiasToAll(Matrices):
    def forward(self, x, expert_ids, weights, kept):
        return super().forward(x, expert_ids, weights, kept) + self.matrix[0, 0]


class MeanOverTheBatch(Matrices):
    def real(self, x, kept):
        return super().real(x, kept) - x.mean(0)


class DropsWhenCrowded(Matrices):
    def forward(self, x, expert_ids, weights, kept):
        mine = kept[..., None] & (expert_ids[..., None] == torch.arange(E))
        crowd = mine.flatten(0, 1).cumsum(0).view_as(mine)
        return super().forward(x, expert_ids, weights, (mine & (crowd <= 6)).any(-1))


class HasRoomForSixteenPairs(Matrices):
    """Far more than any small batch brings."""

    def forward(self, x, expert_ids, weights, kept):
        mine = kept[..., None] & (expert_ids[..., None] == torch.arange(E))
        place = mine.flatten(0, 1).cumsum(0).view_as(mine)
        return super().forward(x, expert_ids, weights, (mine & (place <= 16)).any(-1))


class HalvesLargeBatches(Matrices):
    def add_up(self, x, expert_ids, weights):
        return super().add_up(x, expert_ids, weights) / (2 if len(x) > 200 else 1)


class GivesARowForNoToken(Matrices):
    def add_up(self, x, expert_ids, weights):
        y = super().add_up(x, expert_ids, weights)
        return y if len(x) else x.new_zeros(1, D)


class MultipliesPaddingByZero(Matrices):
    def real(self, x, kept):
        return x * kept.any(-1, keepdim=True)


class MultipliesWeightsByZero(Matrices):
    def of_kept(self, weights, kept):
        return weights * kept


class LetsPaddingIntoGradients(Matrices):
    def forward(self, x, expert_ids, weights, kept):
        y = self.add_up(x, expert_ids, self.of_kept(weights, kept).to(x.dtype))
        return y.where(kept.any(-1, keepdim=True), 0)


class TurnsTheTwelfthToken(Matrices):
    def add_up(self, x, expert_ids, weights):
        sign = torch.ones(len(x), 1, dtype=x.dtype)
        sign[11:] = -1
        return super().add_up(x, expert_ids, weights) * sign


class ScalesByTheLargest(Matrices):
    def real(self, x, kept):
        x = super().real(x, kept)
        return x / (x.abs().max().clamp(min=6) / 6) if len(x) else x


class FirstExpertForAll(Matrices):
    def add_up(self, x, expert_ids, weights):
        return super().add_up(x, torch.zeros_like(expert_ids), weights)


class SparesAnExpert(Matrices):
    def add_up(self, x, expert_ids, weights):
        return super().add_up(x, expert_ids.clamp(max=E - 2), weights)


class OneNetworkForAll(Matrices):
    """Of a shape that says nothing of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.empty(1, D, D))
        self.reset_parameters()

    def add_up(self, x, expert_ids, weights):
        return super().add_up(x, torch.zeros_like(expert_ids), weights)


class SpareParameter(Matrices):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.zeros(D))


class CountsCalls(Matrices):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def real(self, x, kept):
        self.calls += 1
        return super().real(x, kept)


class ChangesItsInput(Matrices):
    def forward(self, x, expert_ids, weights, kept):
        y = super().forward(x, expert_ids, weights, kept.clone())
        kept.zero_()
        return y


class Noisy(Matrices):
    def forward(self, x, expert_ids, weights, kept):
        return super().forward(x, expert_ids, weights, kept) * (1 + 1e-6 * torch.rand(()))


class PromotesToFp32(Matrices):
    def forward(self, x, expert_ids, weights, kept):
        y = super().forward(x, expert_ids, weights, kept)
        return y.float() if y.dtype == torch.bfloat16 else y


class CoarseInHalf(Matrices):
    def forward(self, x, expert_ids, weights, kept):
        y = super().forward(x, expert_ids, weights, kept)
        return (y / 4).round() * 4 if y.dtype == torch.bfloat16 else y


class NotFiniteInHalf(Matrices):
    def add_up(self, x, expert_ids, weights):
        y = super().add_up(x, expert_ids, weights)
        return y + (y * 0).abs().sqrt() if y.dtype == torch.bfloat16 else y


class NotSaved(Matrices):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.rand(D), persistent=False)

    def real(self, x, kept):
        return super().real(x + self.shift, kept)


class CannotBeReset(Matrices):
    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.matrix)

    def reset_parameters(self):
        """Forget to do it."""


class ResetsToAnotherSpread(Matrices):
    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.matrix, std=0.1)


class DetachesTheTokens(Matrices):
    def real(self, x, kept):
        return super().real(x, kept).detach()


class HalvesTheGradientOfTheTokens(Matrices):
    """Wrong in the gradient alone, by the same factor however many pairs there are."""

    def real(self, x, kept):
        x = super().real(x, kept)
        return (x + x.detach()) / 2


class LowRank(Matrices):
    """Sound: a frozen matrix and the product of two that are trained, one of which starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.empty(E, 2, D)), nn.Parameter(torch.empty(E, D, 2))
        self.matrix.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self):
        super().reset_parameters()
        if hasattr(self, "up"):
            nn.init.normal_(self.down)
            nn.init.zeros_(self.up)

    def add_up(self, x, expert_ids, weights):
        change = torch.einsum("td,tkrd,tkcr,tk->tc", x, self.down[expert_ids], self.up[expert_ids], weights)
        return super().add_up(x, expert_ids, weights) + change


class BreaksTheGraph(Matrices):
    def real(self, x, kept):
        torch._dynamo.graph_break()
        return super().real(x, kept)


class DiffersWhenCompiled(Matrices):
    def real(self, x, kept):
        return super().real(-x if torch.compiler.is_compiling() else x, kept)


BROKEN = {
    NoNumber: "num_experts must be a whole number ≥ 1, is None",
    NumberAsTensor: "num_experts must be a whole number ≥ 1, is tensor(3)",
    ComputesEveryPair: "some pairs kept: the output is not that of one pair at a time",
    ForgetsTheWeights: "some pairs kept: the output is not that of one pair at a time",
    SquaresTheWeights: "some pairs kept: the output is not that of one pair at a time",
    RenormalisesTheWeights: "some pairs kept: the output is not that of one pair at a time",
    DetachesTheWeights: "some pairs kept: the gradient of the weights is not that of one pair at a time",
    FirstChoiceAlone: "some pairs kept: the output is not that of one pair at a time",
    AddsABiasToAll: "some pairs kept: the output is not that of one pair at a time",
    MeanOverTheBatch: "some pairs kept: the output is not that of one pair at a time",
    DropsWhenCrowded: "all tokens to one expert: the output is not that of one pair at a time",
    HasRoomForSixteenPairs: "300 tokens: the output is not that of the same tokens in small batches",
    HalvesLargeBatches: "300 tokens: the output is not that of the same tokens in small batches",
    GivesARowForNoToken: "no token: the output is not that of one pair at a time",
    MultipliesPaddingByZero: "a token without kept pairs has an output other than 0",
    MultipliesWeightsByZero: "a token without kept pairs has an output other than 0",
    LetsPaddingIntoGradients: "what stands in the place of an unkept pair changes a gradient",
    TurnsTheTwelfthToken: "the order of the tokens changes their outputs",
    ScalesByTheLargest: "other tokens change a token's output",
    DetachesTheTokens: "the output depends on x, and x has no gradient",
    FirstExpertForAll: "parameter matrix gets no gradient where expert 1 has its share of it",
    SparesAnExpert: "parameter matrix gets no gradient where expert 2 has its share of it",
    OneNetworkForAll: "every token goes to another expert, and the output is the same",
    SpareParameter: "parameter spare gets no finite gradient other than 0",
    CountsCalls: "a forward pass changed a parameter or buffer",
    ChangesItsInput: "a forward pass changed its input in place",
    Noisy: "the same call twice gives two results",
    PromotesToFp32: "in bf16 the output is torch.float32",
    CoarseInHalf: "in bf16 the output is far from the exact one",
    NotFiniteInHalf: "in bf16 a gradient is not finite",
    NotSaved: "acts otherwise after save and load: unsaved state",
    CannotBeReset: "reset_parameters() after to_empty() does not start matrix as the constructor does",
    ResetsToAnotherSpread: "reset_parameters() after to_empty() does not start matrix as the constructor does",
    BreaksTheGraph: "does not compile as one graph: ",
    DiffersWhenCompiled: "the output differs when compiled",
}
