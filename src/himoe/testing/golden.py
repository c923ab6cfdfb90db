"""Replay golden numbers: `python -m himoe.testing.golden FILE.json`.

A file holds cases, a case holds calls that follow one another on one state. Inputs are in closed form: the gate's
weight[i] = scale·sin(a·i + b) over its flat (E, D) index, the tokens' x[i] = cos(a·i + phase) over their flat (T, D)
index, computed in fp64 and cast to fp32. `kind` is `hi_moe` (two-level terms, correction, capacity) or `loss_free`.
Prints the largest deviation of every field and exits 1 above the tolerance, 2 on a file it cannot read.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from himoe.balance import Balancer, Chain, LogitCorrection, LossFree, Schedule, TwoLevelTerms, step_balancers
from himoe.errors import DataError, HimoeError
from himoe.functional import losses, scores, stats
from himoe.functional.dispatch import capacity
from himoe.functional.groups import Groups
from himoe.functional.selection import top_k, top_k_per_group
from himoe.nn import Capacity, Gate, Router
from himoe.types import Routing

TOLERANCE = 1e-5
Case = dict[str, Any]
Deviations = Iterator[tuple[str, float]]

OURS = {  # the authors' names → ours
    "raw": "raw",
    "selection": "corrected",
    "global": "global",
    "group_conditional": "group_conditional",
    "dense_group_mass": "dense",
    "sparse_group_mass": "sparse",
    "selected_l2": "selected",
}


def gate_weight(case: Case) -> Tensor:
    """Return scale·sin(a·i + b) as the gate's (E, D) weight."""
    a, b, scale = case["gate_sin"]
    index = torch.arange(case["num_experts"] * case["width"], dtype=torch.float64)
    return (scale * torch.sin(a * index + b)).float().view(case["num_experts"], case["width"])


def tokens(case: Case, call: Case) -> Tensor:
    """Return cos(a·i + phase) as (T, D)."""
    index = torch.arange(case["tokens"] * case["width"], dtype=torch.float64)
    return torch.cos(case["x_cos"][0] * index + call["x_phase"]).float().view(case["tokens"], case["width"])


def deviation(found: Tensor | float, expected: Any) -> float:
    """Return the largest absolute difference; infinite when the sizes differ or a value is not a number."""
    found = torch.as_tensor(found, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64).view(-1)
    if found.numel() != expected.numel():
        return float("inf")
    difference = (found.flatten() - expected).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    return difference.amax().item() if found.numel() else 0.0


def _router(case: Case, selector: Callable, balancer: Balancer, score: Callable) -> Router:
    gate = Gate(case["width"], case["num_experts"])
    with torch.no_grad():
        gate.weight.copy_(gate_weight(case))
    return Router(gate, selector, num_experts=case["num_experts"], score=score, balancer=balancer)


def _hi_moe_terms(case: Case, groups: Groups) -> TwoLevelTerms:
    shannon = case["entropy"] == "shannon"
    regularize = float(case["regularize"])
    return TwoLevelTerms(
        case["num_experts"],
        groups,
        lambda_intra=regularize * case["lambda_intra"],
        lambda_inter=regularize * case["lambda_inter"],
        intra="entropy" if shannon else OURS[case["intra_mode"]],
        inter="entropy" if shannon else OURS[case["inter_mode"]],
        source=OURS[case["intra_source"]],
    )


def replay_hi_moe(case: Case) -> Deviations:
    """Yield (field, deviation) for every value of a `hi_moe` case."""
    groups = Groups.equal(case["num_experts"], case["num_groups"])
    terms = _hi_moe_terms(case, groups)
    schedule = Schedule(terms, "warmup", steps=max(case["warmup_steps"], 1), only=("intra",))
    options = {name: case[name] for name in ("tau", "beta", "temperature")}
    correction = LogitCorrection(case["num_experts"], mean_from="same_batch", **options) if case["penalty"] else None
    balancer = Chain(*([correction] if correction else []), schedule)
    selector = partial(top_k_per_group, groups=groups, k=case["top_k_per_group"])
    router = _router(case, selector, balancer, scores.softmax)
    dispatcher = Capacity(case["capacity_factor"], order="column_major", multiple=2, drop_in_eval=True)
    for call in case["calls"]:
        schedule.num_steps.fill_(case["warmup_step"] if case["warmup_steps"] else 1)
        router.train(call["mode"] == "train")
        x = tokens(case, call).requires_grad_()
        routing = dispatcher(x, router(x), lambda x, *_: x)[1]
        yield from _compare_hi_moe(case, call, router, routing, x)
        if router.training:
            with torch.no_grad():
                balancer.observe(routing)
            step_balancers([balancer])
        if correction:
            yield "mean_logits", deviation(correction.mean_logits, call["mean_logits"])


def _compare_hi_moe(case: Case, call: Case, router: Router, routing: Routing, x: Tensor) -> Deviations:
    weights = routing.weights * routing.kept
    found = {"intra": torch.zeros(()), "inter": torch.zeros(())} | router.balancer.losses(routing)
    load_loss = routing.top_k * losses.load_balance(routing, "raw")  # f summing to K
    z = losses.z_loss(routing)
    task = (weights.flatten() * torch.cos(0.9 * torch.arange(weights.numel(), dtype=torch.float64)).float()).sum()
    total = case["alpha"] * load_loss + found["intra"] + found["inter"] + 0.001 * z + task
    gate: Tensor = router.gate.weight  # type: ignore[assignment]
    grad_gate, grad_x = torch.autograd.grad(total, (gate, x))
    places = capacity(x.shape[0], routing.num_experts, routing.top_k, case["capacity_factor"], multiple=2)
    yield "expert_ids", deviation(routing.expert_ids, call["expert_ids"])
    yield "weights_after_capacity", deviation(weights, call["weights_after_capacity"])
    yield "kept", deviation(routing.kept, call["kept"])
    yield "capacity", deviation(places, call["capacity"])
    yield "load_kept", deviation(stats.load(routing), call["load_kept"])
    yield "load_loss", deviation(load_loss, call["load_loss"])
    yield "intra", deviation(found["intra"], call["intra"])
    yield "inter", deviation(found["inter"], call["inter"])
    yield "z", deviation(z, call["z"])
    yield "total", deviation(total, call["total"])
    yield "grad_gate", deviation(grad_gate, call["grad_gate"])
    yield "grad_x_norm", deviation(grad_x.norm(), call["grad_x_norm"])


def replay_loss_free(case: Case) -> Deviations:
    """Yield (field, deviation) for every value of a `loss_free` case."""
    balancer = LossFree(case["num_experts"], rate=case["rate"])
    router = _router(case, partial(top_k, k=case["top_k"]), balancer, scores.sigmoid)
    for call in case["calls"]:
        with torch.no_grad():
            routing = router(tokens(case, call))
            balancer.observe(routing)
        step_balancers([balancer])
        expert_ids, order = routing.expert_ids.sort(dim=-1)
        yield "expert_ids_sorted", deviation(expert_ids, call["expert_ids_sorted"])
        yield "weights", deviation(routing.weights.gather(-1, order), call["weights"])
        yield "load", deviation(stats.load(routing), call["load"])
        yield "bias_after", deviation(balancer.bias, call["bias_after"])


REPLAY: dict[str, Callable[[Case], Deviations]] = {"hi_moe": replay_hi_moe, "loss_free": replay_loss_free}


def replay(document: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Replay every case of a document.

    Returns:
        `kind.field` → (largest deviation, number of values compared).

    Raises:
        DataError: the document has not the described form.
    """
    result: dict[str, tuple[float, int]] = {}
    try:
        for case in document["cases"]:
            for field, value in REPLAY[case["kind"]](case):
                worst, count = result.get(f"{case['kind']}.{field}", (0.0, 0))
                result[f"{case['kind']}.{field}"] = (max(worst, value), count + 1)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # torch raises RuntimeError
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise DataError(f"not a golden file of the known form: {reason}") from error
    if not result:
        raise DataError("the golden file holds no case")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Replay one file and print a line per field."""
    parser = argparse.ArgumentParser(prog="python -m himoe.testing.golden", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="golden numbers, JSON")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest allowed absolute deviation")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        result = replay(json.loads(options.file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, HimoeError) as error:
        print(f"golden: {options.file}: {error}", file=sys.stderr)
        return 2
    for field, (worst, count) in result.items():
        print(
            f"{field:32s} {count:4d} calls   largest deviation {worst:.1e}{'' if worst <= options.tolerance else '  ✗'}"
        )
    failed = [field for field, (worst, _) in result.items() if not worst <= options.tolerance]
    print(f"{len(result)} fields, {len(failed)} above {options.tolerance:g}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
