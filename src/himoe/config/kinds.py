"""The kinds of values that the sections of a configuration share."""

from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

from himoe.errors import ConfigError, nearest
from himoe.registry import TABLES, check_name

STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def entry_of(table: str) -> AfterValidator:
    """Accept a name of the table, or somebody's own `"package.module:Class"`."""

    def check(name: str) -> str:
        try:
            check_name(table, name)
        except ConfigError:
            known = list(TABLES[table])
            allowed = f"must be one of {', '.join(known)}, or your own 'package.module:Class'"
            raise ValueError(allowed + nearest(name, known)) from None
        return name

    return AfterValidator(check)


LARGEST = 2**31 - 1  # of every count: far beyond what runs, small enough for every library below
MAX_THREADS = 1024
Count = Annotated[int, Field(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
