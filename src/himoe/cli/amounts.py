"""Numbers as people read them: thousands, millions and billions, bytes, FLOPs."""

COUNTS = ("", "K", "M", "B", "T")
BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
FLOPS = ("FLOP", "KFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP")


def count(number: float) -> str:
    """Return a count with four digits.

    >>> count(46702792704), count(257), count(12e15)
    ('46.70B', '257', '12000T')
    """
    return _scaled(number, 1000, COUNTS, "")


def size(number: float) -> str:
    """Return bytes in the binary unit that fits.

    >>> size(195574784)
    '186.5 MiB'
    """
    return _scaled(number, 1024, BYTES, " ")


def work(number: float) -> str:
    """Return FLOPs in the unit that fits.

    >>> work(5529600.0)
    '5.530 MFLOP'
    """
    return _scaled(number, 1000, FLOPS, " ")


def _scaled(number: float, base: int, units: tuple[str, ...], gap: str) -> str:
    power = 0
    while float(f"{number:.4g}") >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    if power == 0 or number >= 1000:
        text = f"{number:.0f}" if float(number).is_integer() or number >= 1000 else f"{number:.4g}"
    else:
        text = f"{number:.{3 - len(str(int(number))) + 1}f}"
    return f"{text}{gap}{units[power]}"
