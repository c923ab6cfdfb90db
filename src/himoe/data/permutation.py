"""A random order of n things that is computed place by place, in memory that does not grow with n.

A Feistel network on pairs (left, right), left < a and right < b, where a·b is n or little more: every round adds a
keyed hash of one half to the other, which can be undone, so that the whole is a bijection of the a·b pairs. What falls
beyond n is sent through again until it does not ("cycle walking", Black and Rogaway, Ciphers with Arbitrary Finite
Domains, 2002); since a·b − n < a ≈ √n that is rare.
"""

import hashlib
import math

ROUNDS = 12  # with 8, the permutations of a handful of things are not yet equally likely
BITS = 2**64 - 1


class Permutation:
    """A bijection of 0 … n − 1, decided by `key`.

    >>> order = Permutation(5, key=b"seed 0")
    >>> sorted(order(place) for place in range(5))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, n: int, *, key: bytes) -> None:
        assert n >= 1
        self.n = n
        self.left = math.isqrt(n - 1) + 1  # ⌈√n⌉
        self.right = -(-n // self.left)
        keys = hashlib.shake_256(key).digest(8 * ROUNDS)
        self.keys = [int.from_bytes(keys[i : i + 8], "little") for i in range(0, len(keys), 8)]

    def __call__(self, place: int) -> int:
        """Return what stands at `place`."""
        assert 0 <= place < self.n
        while (place := self._pass(place)) >= self.n:
            pass
        return place

    def _pass(self, value: int) -> int:
        right, left = divmod(value, self.left)
        for first, second in zip(self.keys[::2], self.keys[1::2], strict=True):
            left = (left + _hash(right ^ first)) % self.left
            right = (right + _hash(left ^ second)) % self.right
        return right * self.left + left


def _hash(x: int) -> int:
    """Mix 64 bits (the finaliser of SplitMix64; Steele, Lea and Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & BITS
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & BITS
    return x ^ (x >> 31)
