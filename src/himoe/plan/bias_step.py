"""Whether a selection bias moves too fast for its scores: what `presets/guards.py` warns of, known without a model."""

from collections.abc import Callable, Iterator
from typing import Any

from himoe.bounds import SPREAD_LOGITS, step_fault
from himoe.config import MoEConfig
from himoe.registry import fact


def step_faults(moe: MoEConfig) -> Iterator[str]:
    """Yield a line for every bias whose step is not small beside the spread of the scores that it is added to."""
    score = moe.score if moe.preset is None else fact("presets", moe.preset, "score", "softmax")
    own_score = moe.preset is not None and (":" in moe.preset or moe.options.get("second") == "random")
    biases = list(_biases(moe))
    if own_score or score not in SCORES or not biases:
        return
    mean, spread = score_spread(score, moe.num_experts)
    for name, rate, multiplies in biases:
        if fault := step_fault(rate, mean, spread, score=score, num_experts=moe.num_experts, multiplies=multiplies):
            yield f"{name}: {fault}"


def _biases(moe: MoEConfig) -> Iterator[tuple[str, float, bool]]:
    """Yield where a bias comes from, its rate, and whether it multiplies."""
    entries = [
        (f"moe.balancers[{i}] {entry.name!r}", entry.name, entry.options) for i, entry in enumerate(moe.balancers)
    ]
    found = [(where, fact("balancers", name, "bias_rate"), options) for where, name, options in entries]
    found.insert(0, (f"moe.preset {moe.preset!r}", fact("presets", moe.preset, "bias_rate"), moe.options))
    for where, default, options in found:
        if default is not None:
            yield where, options.get("rate", default), bool(options.get("multiplicative", False))


def score_spread(score: str, num_experts: int) -> tuple[float, float]:
    """Return mean and standard deviation over experts of the scores of unit-normal logits, which a fresh gate gives."""
    import numpy as np  # a tenth of a second that most plans do without

    rows = -(-SPREAD_LOGITS // num_experts)
    scores = SCORES[score](np.random.default_rng(0).standard_normal((rows, num_experts)))
    return float(scores.mean()), float(scores.std(-1).mean())


def _over_largest(logits: Any) -> Any:
    import numpy as np

    return np.exp(logits - logits.max(-1, keepdims=True))


def _softmax(logits: Any) -> Any:
    scores = _over_largest(logits)
    return scores / scores.sum(-1, keepdims=True)


def _sigmoid(logits: Any) -> Any:
    import numpy as np

    return 1 / (1 + np.exp(-logits))


def _sqrt_softplus(logits: Any) -> Any:
    import numpy as np

    return np.sqrt(np.logaddexp(0, logits))


SCORES: dict[str, Callable[[Any], Any]] = {
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "sqrt_softplus": _sqrt_softplus,
    "relu": lambda logits: logits.clip(min=0),
    "softmax_over_selected": _over_largest,
}
"""`functional/scores.py` in numpy; without `softmax_per_group`, which depends on more than the number of
experts. The steps of a bias that is added to other scores are not judged."""
