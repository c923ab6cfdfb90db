"""What a rule about keys is, and the wording that several share."""

from collections.abc import Callable, Mapping
from typing import Any

from himoe.config.problems import Problem

Rule = Callable[..., str | None]


class Rulebook:
    """Rules on the keys of a configuration, each a small function behind `@rule("its", "keys")`.

    A rule takes the values of its keys in order and returns what is allowed, or None when all is well; the first key
    is the one that is reported. A rule is skipped when one of its keys has a problem of its own.
    """

    def __init__(self) -> None:
        self._rules: list[tuple[tuple[str, ...], Rule]] = []

    def __call__(self, *keys: str) -> Callable[[Rule], Rule]:
        """Register a rule on `keys`."""

        def register(check: Rule) -> Rule:
            self._rules.append((keys, check))
            return check

        return register

    def broken(self, values: Mapping[str, Any]) -> list[Problem]:
        """Return a problem for every rule that `values`, by full key, break."""
        problems = []
        for keys, check in self._rules:
            if all(key in values for key in keys):
                text = check(*(values[key] for key in keys))
                if text:
                    problems.append(Problem(keys[0], text, values[keys[0]], keys[0]))
        return problems


def multiple(value: int, factor: int, of: str) -> str | None:
    """Say that `value` must be a multiple of `factor`, with the nearest ones."""
    if value % factor == 0:
        return None
    below, above = value // factor * factor, (value // factor + 1) * factor
    return f"must be a multiple of {of} ({factor}), such as {f'{below} or {above}' if below else above}"
