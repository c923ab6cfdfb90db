"""Which columns of a table are read, and what their values may be: text, and a name of a domain."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from himoe.errors import nearest

SHOWN = 12  # columns named in an error
LONGEST = 200  # characters of a domain's name
UNFIT = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
)  # in one: ends of lines, control, half surrogate pairs


class UnusableError(Exception):
    """What is wrong with a row or a table; whoever reads it says where and makes it a `DataError`."""


@dataclass(frozen=True)
class Columns:
    """The column of the text, and that of the domain where files do not decide it."""

    text: str = "text"
    domain: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        return [self.text] if self.domain is None else [self.text, self.domain]

    def check(self, present: Sequence[str]) -> None:
        """Raise `UnusableError` unless the columns are among those present."""
        for key, column in (("text_column", self.text), ("domain_column", self.domain)):
            if column is not None and column not in present:
                there = ", ".join(map(repr, present[:SHOWN])) + (", …" if len(present) > SHOWN else "")
                raise UnusableError(
                    f"no column {column!r}, there are {there or 'none'}; give the right one as data.{key}"
                    f"{nearest(column, present)}"
                )

    def read(self, text: object, domain: object = None) -> tuple[str | None, str]:
        """Return (domain, text) of a row, None where files decide the domain; raises `UnusableError` for other types.

        >>> Columns(domain="year").read("Once upon a time", 1984)
        ('1984', 'Once upon a time')
        """
        if not isinstance(text, str):
            raise UnusableError(f"column {self.text!r} holds {_described(text)}, not text")
        if self.domain is None:
            return None, text
        if domain == "" or isinstance(domain, bool) or not isinstance(domain, str | int):
            raise UnusableError(f"column {self.domain!r} holds {_described(domain)}, not a domain's name or number")
        if len(str(domain)) > LONGEST or UNFIT.search(str(domain)):
            raise UnusableError(
                f"column {self.domain!r} holds {str(domain)[:30]!r}…, not a domain's name: "
                f"one line of at most {LONGEST} characters"
            )
        return str(domain), text


def _described(value: object) -> str:
    """Say in words what kind of value this is."""
    match value:
        case None:
            return "nothing (null)"
        case "":
            return "an empty text"
        case bool() | int() | float():
            return f"{'the truth value' if isinstance(value, bool) else 'the number'} {value}"
        case list() | tuple():
            return "a list"
        case dict():
            return "an object"
    return f"a value of type {type(value).__name__}"
