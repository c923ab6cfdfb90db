"""What the shares of a mixture must be: one for every domain, together 1. Configuration and data both ask this."""

from collections.abc import Collection, Mapping

from himoe.errors import nearest

ROUNDING = 1e-5  # that shares written with six digits may add up to; they are normalised


def domains_fault(shares: Mapping[str, float], domains: Collection[str]) -> str | None:
    """Return what is wrong with the names, None where every domain has a share and nothing else has one.

    >>> domains_fault({"web": 0.5, "cod": 0.5}, ["web", "code"])
    "there is no domain 'cod', only web, code; did you mean 'code'?"
    """
    for name in shares:
        if name not in domains:
            return f"there is no domain {name!r}, only {', '.join(domains)}{nearest(name, list(domains))}"
    if missing := [name for name in domains if name not in shares]:
        return f"no share for {', '.join(missing)}; give every domain one, 0 leaves a domain out"
    return None


def sum_fault(shares: Mapping[str, float]) -> str | None:
    """Return what the shares are in proportion, None where their sum is 1.

    >>> sum_fault({"web": 3, "code": 1})
    'the shares must sum to 1, these sum to 4; in proportion: web = 0.75, code = 0.25'
    """
    total = sum(shares.values())
    if abs(total - 1) <= ROUNDING:
        return None
    fair = ", ".join(f"{name} = {share / total:.6g}" for name, share in shares.items()) if total else ""
    return f"the shares must sum to 1, these sum to {total:.6g}" + (f"; in proportion: {fair}" if fair else "")
