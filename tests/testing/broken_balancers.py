"""A sound balancer, and one broken in each way that the conformance suite must catch, with the words that name it."""

import torch
from torch import nn

from himoe.balance import Balancer
from himoe.functional.stats import count_pairs, selected_load

E = 8


class Bias(Balancer):
    """A sound bias balancer, to be broken in one place each."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(E))

    def reset_parameters(self):
        self.bias.zero_()

    def adjust_choice(self, scores, context):
        return scores + self.bias

    def observe(self, routing):
        self.accumulate("counts", selected_load(routing))

    def step(self):
        if self.sums:
            counts = self.sums["counts"].float()
            self.bias.add_(0.001 * (counts.mean() - counts))


class WritesInForward(Bias):
    def adjust_choice(self, scores, context):
        self.bias.add_(0.001)
        return scores + self.bias


class WritesInEvalOnly(Bias):
    def adjust_choice(self, scores, context):
        if not context.training:
            self.bias.add_(0.001)
        return scores + self.bias


class WritesInLosses(Bias):
    def losses(self, routing):
        self.bias.add_(0.001)
        return {}


class ObservesInForward(Bias):
    def losses(self, routing):
        self.observe(routing)
        return {}


class CountsPadding(Bias):
    def observe(self, routing):
        everything = torch.ones_like(routing.selected)
        self.accumulate("counts", count_pairs(routing.expert_ids, everything, E))


class LossOverPadding(Bias):
    def losses(self, routing):
        return {"z": routing.logits.logsumexp(-1).square().mean()}


class CorrectsByPadding(Bias):
    def adjust_logits(self, logits, context):
        return logits - 5 * logits.detach().mean(0)


class HasParameters(Bias):
    def __init__(self) -> None:
        super().__init__()
        del self.bias
        self.bias = nn.Parameter(torch.zeros(E), requires_grad=False)


class CastToBf16(Bias):
    def _apply(self, fn, recurse=True):
        return nn.Module._apply(self, fn, recurse)


class CastWhileStill(CastToBf16):
    def step(self):
        """Stay at 0, which bf16 holds exactly."""


class ReplacesItsBuffer(Bias):
    def step(self):
        if self.sums:
            self.bias = self.bias + 0.001 * (self.sums["counts"].float().mean() - self.sums["counts"])


class MovesInObserve(Bias):
    def observe(self, routing):
        self.bias.add_(0.001 * (routing.top_k - selected_load(routing)))


class MovesWithEveryMicroBatch(Bias):
    def observe(self, routing):
        super().observe(routing)
        self.accumulate("batches", torch.ones(()))

    def step(self):
        if self.sums:
            super().step()
            self.bias.mul_(self.sums["batches"])


class AveragesMeansOfMicroBatches(Bias):
    def observe(self, routing):
        self.accumulate("share", selected_load(routing).double() / routing.selected.sum().clamp(min=1))
        self.accumulate("batches", torch.ones((), dtype=torch.float64))

    def step(self):
        if self.sums:
            self.bias.sub_((self.sums["share"] / self.sums["batches"]).float())


class NotANumberOnEmpty(Bias):
    def step(self):
        if self.sums:
            counts = self.sums["counts"].float()
            self.bias.add_(0.001 * (counts.mean() - counts) / counts.sum())


class CountsWhatIsKept(Bias):
    def observe(self, routing):
        self.accumulate("counts", count_pairs(routing.expert_ids, routing.kept, E))


class LossOfWhatIsKept(Bias):
    def losses(self, routing):
        load = count_pairs(routing.expert_ids, routing.kept, E) / routing.selected.sum().clamp(min=1)
        real = routing.scores.where(routing.selected.any(-1, keepdim=True), 0)
        return {"kept": (load * real.sum(0)).sum() / routing.selected.any(-1).sum().clamp(min=1)}


class DetachesTheLogits(Bias):
    def adjust_logits(self, logits, context):
        return logits.detach()


class StopsTheGradient(Bias):
    def adjust_logits(self, logits, context):
        return logits.detach() + 0 * logits


class NotANumberOnOneToken(Bias):
    def losses(self, routing):
        mask = routing.context.mask
        return {"spread": (routing.logits if mask is None else routing.logits[mask]).var(0).sum()}


class Overflows(Bias):
    def losses(self, routing):
        mask = routing.context.mask
        return {"exp": (routing.logits if mask is None else routing.logits[mask]).exp().sum()}


class DecaysWithoutTokens(Bias):
    def step(self):
        super().step()
        if self.sums:
            self.bias.sub_(0.01)


class CannotBeReset(Bias):
    def reset_parameters(self):
        """Forget to do it."""


class NotSaved(Bias):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(E), persistent=False)


class HiddenState(Bias):
    def __init__(self) -> None:
        super().__init__()
        del self.bias
        self.bias = torch.zeros(E)

    def reset_parameters(self):
        self.bias = torch.zeros(E)


class ChangesItsInput(Bias):
    def adjust_choice(self, scores, context):
        return scores.detach().add_(1.0)


class ChangesTheLogits(Bias):
    def adjust_logits(self, logits, context):
        return logits.mul_(2)


class VectorLoss(Bias):
    def losses(self, routing):
        return {"p": routing.scores.sum(0)}


class HalfLoss(Bias):
    def losses(self, routing):
        return {"p": routing.scores.sum().bfloat16()}


class LossWithoutGradient(Bias):
    def losses(self, routing):
        return {"p": routing.scores.detach().sum()}


class TrainsNothing(Bias):
    def losses(self, routing):
        return {"p": routing.scores.detach().sum() + 0 * routing.scores.sum()}


class InfiniteGradient(Bias):
    def losses(self, routing):
        return {"p": (routing.logits.sum() * 0).sqrt()}


BROKEN = {
    WritesInForward: "a forward pass or losses() changed the state",
    WritesInEvalOnly: "a forward pass or losses() changed the state",
    WritesInLosses: "a forward pass or losses() changed the state",
    ObservesInForward: "a forward pass observed",
    CountsPadding: "padding changed the state",
    LossOverPadding: "padding changed the losses",
    CorrectsByPadding: "padding changed the routing",
    HasParameters: "state must be buffers; parameters would be given to the optimizer",
    CastToBf16: ".to(torch.bfloat16) changed the state's values",
    CastWhileStill: ".to(torch.bfloat16) cast the state",
    ReplacesItsBuffer: "step() replaced a buffer instead of moving it in place",
    MovesInObserve: "observe() moved the state",
    MovesWithEveryMicroBatch: "three micro-batches move the state elsewhere than one whole batch",
    AveragesMeansOfMicroBatches: "three micro-batches move the state elsewhere than one whole batch",
    CountsWhatIsKept: "dropped pairs change the state: it must follow `selected`, not `kept`",
    LossOfWhatIsKept: "dropped pairs change the losses: they must follow `selected`, not `kept`",
    DetachesTheLogits: "no gradient reaches the gate: adjust_logits() must not detach",
    StopsTheGradient: "no gradient reaches the gate: adjust_logits() must not detach",
    NotANumberOnEmpty: "a step that saw only padding moved the state",
    DecaysWithoutTokens: "a step that saw only padding moved the state",
    NotANumberOnOneToken: "one token: loss or gradient is not finite",
    Overflows: "huge logits: loss or gradient is not finite",
    CannotBeReset: "reset_parameters() after to_empty() is not the starting state",
    NotSaved: "the same step after save and load gives another state",
    HiddenState: "acts otherwise after save and load",
    ChangesItsInput: "adjust_choice() changed its input in place",
    ChangesTheLogits: "adjust_logits() changed its input in place",
    VectorLoss: "loss p is not a finite scalar",
    HalfLoss: "loss p is torch.bfloat16, not fp32",
    LossWithoutGradient: "the losses carry no gradient",
    TrainsNothing: "the losses are not 0 and the gate's gradient is, so they train nothing",
    InfiniteGradient: "a loss gives the gate a gradient that is not finite",
}
