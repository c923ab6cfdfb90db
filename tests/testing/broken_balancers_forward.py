"""Balancers broken in what `himoe.testing.balancer_forward` checks: later tokens, sums that ranks add up, the host."""

import torch
from broken_balancers import Bias, E

from himoe.functional.stats import selected_load


class Still(Bias):
    """Sound too, with a state that never moves."""

    def step(self):
        """Stay."""


class LooksAhead(Still):
    """Corrects by the mean over the real tokens of the batch that it routes."""

    def adjust_logits(self, logits, context):
        real = logits if context.mask is None else logits.where(context.mask[:, None], 0)
        count = len(real) if context.mask is None else context.mask.sum().clamp(min=1)
        return logits - real.sum(0) / count


class LooksAheadInChoice(Still):
    def adjust_choice(self, scores, context):
        real = scores if context.mask is None else scores.where(context.mask[:, None], 0)
        return scores - real.amax(0) if context.training else scores


class KeepsCountsToItself(Bias):
    def observe(self, routing):
        self.mine = getattr(self, "mine", 0) + selected_load(routing)

    def step(self):
        counts = getattr(self, "mine", torch.zeros(E)).float()
        self.bias.add_(0.001 * (counts.mean() - counts))
        self.mine = torch.zeros(E)


class CountsInHalf(Bias):
    def observe(self, routing):
        self.accumulate("counts", selected_load(routing).bfloat16())


class CountsInFp32(Bias):
    def observe(self, routing):
        self.accumulate("counts", selected_load(routing).float())


class FailsWithoutTokens(Bias):
    def observe(self, routing):
        super().observe(routing)
        self.accumulate("largest", routing.logits.amax().double())


class SilentWithoutTokens(Bias):
    def observe(self, routing):
        if len(routing.logits):
            super().observe(routing)


class MovesWithoutTokens(Bias):
    def observe(self, routing):
        super().observe(routing)
        self.accumulate("layers", torch.tensor(0 if len(routing.logits) else 1))

    def step(self):
        super().step()
        if self.sums:
            self.bias.add_(self.sums["layers"])


class LooksAtTheGate(Bias):
    def observe(self, routing):
        super().observe(routing)
        if routing.context.gate_weight is not None:
            self.accumulate("norm", routing.context.gate_weight.double().norm())


class ReadsBackInLosses(Bias):
    def losses(self, routing):
        total = routing.selected.sum().item()
        return {"z": routing.logits.where(routing.selected.any(-1, keepdim=True), 0).square().sum() / max(total, 1)}


class ReadsBackInChoice(Bias):
    def adjust_choice(self, scores, context):
        return scores + self.bias if self.bias.abs().sum().item() > 0 else scores


class CutsOutPaddingInObserve(Bias):
    def observe(self, routing):
        ids = routing.expert_ids[routing.selected]
        self.accumulate("counts", (ids[:, None] == torch.arange(E)).sum(0))


class BreaksTheGraph(Bias):
    def losses(self, routing):
        torch._dynamo.graph_break()
        return {}


class DiffersWhenCompiled(Bias):
    def adjust_choice(self, scores, context):
        return scores - self.bias if torch.compiler.is_compiling() else scores + self.bias


BROKEN = {
    LooksAhead: "later tokens change adjust_logits() of earlier ones: set causal = False, or mend it",
    LooksAheadInChoice: "later tokens change adjust_choice() of earlier ones: set causal = False, or mend it",
    KeepsCountsToItself: "step() uses what observe() kept outside accumulate()",
    CountsInHalf: "observe() sums counts in torch.bfloat16, must be torch.int64 or torch.float64",
    CountsInFp32: "observe() sums counts in torch.float32, must be torch.int64 or torch.float64",
    FailsWithoutTokens: "observe() of no tokens fails with RuntimeError: amax()",
    SilentWithoutTokens: "observe() sums nothing for no tokens and counts (8,) torch.int64 for some: must be alike",
    MovesWithoutTokens: "a step that saw no tokens moved the state",
    LooksAtTheGate: "observe() sums counts (8,) torch.int64 for no tokens and counts (8,) torch.int64, norm ()",
    ReadsBackInLosses: "losses(): a value is read back to the host, for which a GPU waits",
    ReadsBackInChoice: "adjust_choice(): a value is read back to the host, for which a GPU waits",
    CutsOutPaddingInObserve: "observe(): the size of a tensor depends on values (index), for which a GPU waits",
    BreaksTheGraph: "losses() does not compile as one graph",
    DiffersWhenCompiled: "adjust_choice() gives something else when compiled",
}
