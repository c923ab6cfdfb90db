"""What every selector must satisfy, as one call: `check_selector(partial(my_selector, k=2), num_experts=8)`.

Each check is a function below; together they are the contract of `himoe.functional.selection`.
"""

from collections.abc import Callable
from itertools import count as count_up

import torch
from torch import Tensor

from himoe.functional.bound import name_of, unbound
from himoe.functional.stats import count_pairs, max_vio
from himoe.types import RouterContext

Selector = Callable[[Tensor, RouterContext], tuple[Tensor, Tensor]]
TOKENS = 23


class _Bench:
    """A selector, and scores to choose from."""

    def __init__(self, selector: Selector, num_experts: int, batch_dims: int = 1) -> None:
        self.unseeded, self.num_experts, self.batch_dims = selector, num_experts, batch_dims
        self.function = unbound(selector)
        self._turn = count_up()  # in eval every call has other random numbers, and must not care
        self.random = self.claims("random", False)
        # where other tokens stand, other numbers are drawn for a token
        self.modes_that_compare = (False,) if self.random else (True, False)
        self.name = name_of(self.function)

    def selector(self, scores: Tensor, context: RouterContext) -> tuple[Tensor, Tensor]:
        """Choose; from the same random numbers every time, if the selector says that it draws some."""
        if not self.random:
            return self.unseeded(scores, context)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if context.training else int(scores.numel()) + next(self._turn))
            return self.unseeded(scores, context)

    def scores(self, count: int = TOKENS, seed: int = 0, skew: float = 1.0) -> Tensor:
        """Softmax scores that favour the later experts."""
        generator = torch.Generator().manual_seed(seed)
        favour = skew * torch.linspace(0, 2, self.num_experts)
        return (torch.randn(count, self.num_experts, generator=generator) + favour).softmax(-1)

    def context(
        self, count: int = TOKENS, *, training: bool = True, mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> RouterContext:
        ids = torch.arange(count) * 7 % 1009 if token_ids is None else token_ids
        shape = (1,) * (self.batch_dims - 1) + (count,)
        return RouterContext(mask=mask, batch_shape=shape, token_ids=ids, training=training)

    def claims(self, attribute: str, default: bool) -> bool:
        return getattr(self.function, attribute, default)

    def expect(self, condition: bool, text: str) -> None:
        if not condition:
            raise AssertionError(f"{self.name}: {text}")


def _choice(selection: tuple[Tensor, Tensor]) -> Tensor:
    """Return the ids with -1 in unused places, whose ids mean nothing."""
    expert_ids, selected = selection
    return expert_ids.where(selected, -1)


def _check_result(bench: _Bench, scores: Tensor, case: str, context: RouterContext | None = None) -> Tensor:
    """Choose once, look at shapes, dtypes, range and repetitions, and return what is selected."""
    count = scores.shape[0]
    try:
        result = bench.selector(scores, context or bench.context(count))
    except Exception as error:
        raise AssertionError(f"{bench.name}: {case}: fails with {type(error).__name__}: {error}") from error
    bench.expect(isinstance(result, tuple) and len(result) == 2, f"{case}: must return (expert_ids, selected)")
    expert_ids, selected = result
    shape, places = tuple(expert_ids.shape), expert_ids.shape[-1]
    fits = len(shape) == 2 and shape[0] == count and selected.shape == expert_ids.shape and places >= 1
    bench.expect(
        fits, f"{case}: expert_ids is {shape} and selected {tuple(selected.shape)}, both must be ({count}, K), K ≥ 1"
    )
    bench.expect(
        expert_ids.dtype == torch.int64 and selected.dtype == torch.bool,
        f"{case}: expert_ids is {expert_ids.dtype} and selected {selected.dtype}, must be torch.int64 and torch.bool",
    )
    inside = (expert_ids >= 0) & (expert_ids < bench.num_experts)
    bench.expect(
        bool(inside.all()), f"{case}: an id is not between 0 and {bench.num_experts - 1} (unused places count too)"
    )
    cells = torch.arange(count)[:, None] * bench.num_experts + expert_ids
    times = count_pairs(cells, selected, count * bench.num_experts)
    bench.expect(bool((times <= 1).all()), f"{case}: a token has the same expert twice")
    return selected


def check_result(bench: _Bench) -> None:
    """Shapes, dtypes, ids in range, no expert twice, as many places whatever the number of tokens, some used."""
    widths = set()
    for mode, training in (("training", True), ("eval", False)):
        used = False
        for count in (TOKENS, 5, 1, 0):
            context = bench.context(count, training=training)
            selected = _check_result(bench, bench.scores(count), f"{count} tokens, {mode}", context)
            widths.add(selected.shape[-1])
            used |= bool(selected.any())
        bench.expect(used, f"{mode}: selects no expert for any token; if its options do that, check it with others")
    bench.expect(len(widths) == 1, f"the number of places changes with the tokens: {sorted(widths)}")
    _check_result(bench, bench.scores().double(), "fp64 scores")


def check_extremes(bench: _Bench) -> None:
    """Scores that are equal, huge, zero, of one expert alone or negative keep the result well formed."""
    shape = (9, bench.num_experts)
    one_expert = torch.zeros(shape)
    one_expert[:, -1] = 1.0
    cases = {
        "equal scores": torch.full(shape, 1 / bench.num_experts),
        "equal tokens": bench.scores(1).repeat(9, 1),
        "huge scores": bench.scores(9) * 1e30,
        "scores of zero": torch.zeros(shape),
        "one expert has it all": one_expert,
        "negative scores": bench.scores(9) - 1,
    }
    for case, scores in cases.items():
        for training in (True, False):
            _check_result(bench, scores, case, bench.context(9, training=training))
    nothing = torch.zeros(9, dtype=torch.bool)
    _check_result(bench, bench.scores(9), "only padding", bench.context(9, mask=nothing))


def check_pure(bench: _Bench) -> None:
    """The same input gives the same choice; the scores are left alone.

    Whatever the random generator, or where `random = True` admits that it draws in training, from the same numbers.
    """
    for training in (True, False):
        scores, context = bench.scores(), bench.context(training=training)
        before = scores.clone()
        with torch.random.fork_rng(devices=[]):
            choices = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                choices.append(_choice(bench.selector(scores, context)))
        bench.expect(torch.equal(*choices), "the same scores give another choice the second time")
        bench.expect(torch.equal(scores, before), "changed its scores in place")
        with_grad = _choice(bench.selector(scores.requires_grad_(), context))
        with torch.no_grad():
            without = _choice(bench.selector(scores, context))
        bench.expect(torch.equal(with_grad, without), "chooses otherwise where gradients are off")


def check_padding(bench: _Bench) -> None:
    """Padding, before, between and behind the tokens, changes no choice of a real one."""
    real = bench.scores()
    for place in (0, 11, TOKENS):
        mask = torch.ones(TOKENS + 6, dtype=torch.bool)
        mask[place : place + 6] = False
        padded, ids = torch.full((TOKENS + 6, bench.num_experts), 50.0), torch.zeros(TOKENS + 6, dtype=torch.int64)
        padded[mask], ids[mask] = real, bench.context().token_ids  # type: ignore[assignment]
        for training in bench.modes_that_compare:
            alone = _choice(bench.selector(real, bench.context(training=training)))
            context = bench.context(TOKENS + 6, mask=mask, token_ids=ids, training=training)
            among = _choice(bench.selector(padded, context))[mask]
            bench.expect(torch.equal(alone, among), "padding changed the choice of real tokens")


def check_causality(bench: _Bench) -> None:
    """Later tokens change nothing, unless `causal = False` admits it."""
    if not bench.claims("causal", True):
        return
    scores, others = bench.scores(), bench.scores(seed=8, skew=-3.0)
    ids: Tensor = bench.context().token_ids  # type: ignore[assignment]
    for training in (True, False):
        whole = _choice(bench.selector(scores, bench.context(training=training)))
        for cut in range(1, TOKENS, 4):
            changed = torch.cat([scores[:cut], others[cut:]])
            context = bench.context(training=training, token_ids=torch.cat([ids[:cut], ids[cut:] + 1]))
            choice = _choice(bench.selector(changed, context))
            bench.expect(
                torch.equal(whole[:cut], choice[:cut]),
                "later tokens change the experts of earlier ones: set causal = False on the function, or mend it",
            )


def check_claims(bench: _Bench) -> None:
    """`balances_load` halves MaxVio at least; `wanted` holds every selected expert, and only those without `max_k`."""
    scores, context = bench.scores(200, skew=2.0), bench.context(200)
    expert_ids, selected = bench.selector(scores, context)
    if bench.claims("balances_load", False):
        each = max(round(int(selected.sum()) / 200), 1)
        best = scores.topk(each, dim=-1).indices
        plain = float(max_vio(count_pairs(best, torch.ones_like(best, dtype=torch.bool), bench.num_experts)))
        found = float(max_vio(count_pairs(expert_ids, selected, bench.num_experts)))
        bench.expect(
            found <= plain / 2,
            f"balances_load = True, but MaxVio is {found:.2f} where the best {each} give {plain:.2f}",
        )
    if (rule := getattr(bench.function, "wanted", None)) is not None:
        options = {name: value for name, value in getattr(bench.unseeded, "keywords", {}).items() if name != "max_k"}
        wanted, chosen = rule(scores, context, **options), torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(-1, expert_ids, selected)
        bench.expect(not bool((chosen & ~wanted).any()), "selected an expert that wanted() does not name")
        if expert_ids.shape[-1] == bench.num_experts:
            bench.expect(
                torch.equal(chosen, wanted), "has room for all experts and leaves out some that wanted() names"
            )


def check_compiles(bench: _Bench) -> None:
    """Compiles as one graph, hence reads nothing back to the host, and chooses the same."""
    select = bench.unseeded

    def choose(scores: Tensor, mask: Tensor, ids: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        return select(scores, bench.context(TOKENS, mask=mask, token_ids=ids, training=training))

    mask, ids = torch.arange(TOKENS) % 5 != 0, torch.arange(TOKENS)
    torch.compiler.reset()
    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    for training in bench.modes_that_compare:
        eager = _choice(choose(bench.scores(), mask, ids, training))
        try:
            found = _choice(compiled(bench.scores(), mask, ids, training))
        except Exception as error:
            first = next(iter(str(error).splitlines()), type(error).__name__)
            raise AssertionError(f"{bench.name}: does not compile as one graph: {first}") from error
        bench.expect(torch.equal(eager, found), "chooses otherwise when compiled")


CHECKS = (
    check_result,
    check_extremes,
    check_pure,
    check_padding,
    check_causality,
    check_claims,
    check_compiles,
)


def check_selector(selector: Selector, *, num_experts: int = 8, batch_dims: int = 1) -> None:
    """Run every check on a selector whose options are bound.

    Args:
        selector: (scores (T, E), context) → (expert_ids (T, K), selected (T, K)). The context has token ids. What the
            function says of itself (`causal`, `balances_load`, `wanted`) is checked too. One that draws random numbers
            in training says `random = True`; in eval none may.
        num_experts: E, at least 4.
        batch_dims: 1 for a `context.batch_shape` (T,), 2 for (1, T), for a selector that needs to know sequences.

    Raises:
        AssertionError: the first contract that does not hold, with the selector's name.

    >>> from functools import partial
    >>> from himoe.functional.selection import top_k
    >>> check_selector(partial(top_k, k=2))
    """
    for check in CHECKS:
        check(_Bench(selector, num_experts, batch_dims))
