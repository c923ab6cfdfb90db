"""Bounds beyond which coefficients are known to fail: the guards of a router and `himoe plan` ask here."""

MAX_RATIO = 2.5  # λ_intra/α; on a toy, CV inside a group was .17 at 1, .28 at 2.5, and one expert took all at 10
MAX_STEP = 0.25
"""Bias step over the spread of the scores. With softmax scores u = 1e-3 did harm from E = 512 on, together with a large
auxiliary loss, and none at E = 256 (arXiv 2605.11689): that is 0.39 and 0.2 of the spread √(e − 1)/E of unit-normal
logits' scores. The bound lies between."""
SPREAD_LOGITS = 2**16  # unit-normal logits that a spread is measured on
TINY = 1e-300


def step_fault(  # the words of the warning, too, are the same wherever it is given
    step: float, mean: float, spread: float, *, score: str, num_experts: int, multiplies: bool = False
) -> str | None:
    """Return what is wrong with the step of a selection bias, None where it is small beside its scores.

    Args:
        step: how far the bias moves in an optimizer step.
        mean: of the scores.
        spread: their standard deviation over the experts of a token.
        score: name of the score function.
        num_experts: E.
        multiplies: whether scores are multiplied by the bias.
    """
    if multiplies and mean:
        spread /= mean
    if num_experts == 1 or step <= MAX_STEP * spread:
        return None
    relative = " relative to their mean" if multiplies else ""
    other = "" if score == "sigmoid" else ", or scores that lie further apart, such as sigmoid"
    return (
        f"the bias moves by {step:g} a step, {step / max(spread, TINY):.3g} times the spread{relative} {spread:.3g} of "
        f"{score} scores over {num_experts} experts (standard deviation, for unit-normal logits), so that it decides "
        f"instead of the score; use a rate below {MAX_STEP * spread:.2g}{other}"
    )
