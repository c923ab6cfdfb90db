"""Numbers as people read them; a dash where a run has none."""

from __future__ import annotations

from html import escape
from typing import Any

from himoe.report.read import number

NOTHING = "–"


def text_of(value: Any) -> str:
    """Return anything as text that is safe in HTML."""
    return escape(str(value))


def show(value: Any, digits: int = 3) -> str:
    """Return a number with so many decimals, or a dash when there is none."""
    given = number(value)
    return NOTHING if given is None else f"{given:,.{digits}f}".replace("-", "−")


def three_digits(value: float) -> str:
    """Return a positive number with three significant digits, or all digits of a larger one; never an exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def count(value: Any) -> str:
    """Return a count for people: 950, 12.3k, 4.10M, 1.05B."""
    given = number(value)
    if given is None:
        return NOTHING
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(given) >= limit:
            return f"{three_digits(given / (1e3 if unit == 'k' else limit))}{unit}"
    return f"{given:,.0f}"


def size(value: Any) -> str:
    """Return bytes for people, in units of 1024."""
    given = number(value)
    if given is None:
        return NOTHING
    for unit in ("bytes", "KiB", "MiB"):
        if given < 1024:
            return f"{given:.0f} {unit}" if unit == "bytes" else f"{three_digits(given)} {unit}"
        given /= 1024
    return f"{three_digits(given)} GiB"


def duration(value: Any) -> str:
    """Return seconds for people: 42 s, 3 min 12 s, 2 h 5 min."""
    minutes, seconds = divmod(round(number(value) or 0), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def saved(bits: Any, baseline: Any) -> str:
    """Return by how many percent `bits` is under `baseline`."""
    ours, theirs = number(bits), number(baseline)
    return NOTHING if ours is None or not theirs else show(100 * (1 - ours / theirs), 1) + " %"
