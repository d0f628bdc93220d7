"""Splitting a size into factors by a named rule.

The rule ``balanced`` gives the factors with the smallest ratio of the largest to the smallest. The rule ``greedy`` is
that of *Compute Better Spent* (Qiu et al., ICML 2024): it takes the prime factors in ascending order and multiplies the
factor that is smallest so far by each. Both rules return the factors in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

RULES = ("balanced", "greedy")
MOST_PARTS = 64  # largest number of parts for which an error names the nearest sizes that can be split
SEARCHED = 4096  # number of sizes below and above that are searched for the nearest one
MAX_RATIO = 16  # largest ratio of factors that `balanced` accepts


def factorize(n: int, parts: int, rule: str | Sequence[int] = "balanced") -> tuple[int, ...]:
    """Split ``n`` into ``parts`` factors by a rule, or check explicit factors.

    Parameters
    ----------
    n
        Size to split.
    parts
        Number of factors.
    rule
        ``balanced``, ``greedy``, or the factors themselves.

    Returns
    -------
    tuple of int
        The factors: in ascending order from a rule, otherwise as given.

    Raises
    ------
    ValueError
        If ``n`` has no split into factors above 1; for ``balanced``, into factors with a ratio of at most 16. The
        message names the nearest sizes that have one. Also if the product of explicit factors is not ``n``.

    Examples
    --------
    >>> factorize(768, 2), factorize(3072, 2), factorize(3072, 2, "greedy")
    ((24, 32), (48, 64), (32, 96))
    >>> factorize(12, 2, (6, 2))
    (6, 2)
    >>> factorize(101, 2)
    Traceback (most recent call last):
    ...
    ValueError: 101 cannot be split into 2 factors by rule 'balanced'; the nearest sizes that can are 100 and 102
    """
    if isinstance(n, bool) or not hasattr(n, "__index__") or n < 1:
        raise ValueError(f"the size to split must be a positive integer, got {n!r}")
    if isinstance(parts, bool) or not hasattr(parts, "__index__") or parts < 1:
        raise ValueError(f"the number of factors must be a positive integer, got {parts!r}")
    if not isinstance(rule, str):
        explicit = tuple(rule)
        product = 1
        for k in explicit:
            if isinstance(k, bool) or not hasattr(k, "__index__") or k < 1:
                raise ValueError(f"explicit factors must be positive integers, got {explicit}")
            product *= k
        if len(explicit) != parts or product != n:
            raise ValueError(f"{parts} factors with product {n} are needed, got {explicit} with product {product}")
        return tuple(int(k) for k in explicit)
    if rule not in RULES:
        raise ValueError(f"unknown factorization {rule!r}; one of {', '.join(RULES)}, or the factors themselves")
    n, parts = int(n), int(parts)
    found = _split(n, parts, rule)
    if found is None and parts > MOST_PARTS:
        raise ValueError(
            f"{n} cannot be split into {parts} factors above 1; the smallest size that can is 2^{parts}, and {n} has "
            f"{len(list(_primes(n)))} prime factors"
        )
    if found is None:
        near = " and ".join(map(str, nearest_sizes(n, parts, rule)))
        raise ValueError(
            f"{n} cannot be split into {parts} factors by rule {rule!r}; the nearest sizes that can are {near}"
        )
    return found


def nearest_sizes(n: int, parts: int, rule: str = "balanced") -> tuple[int, ...]:
    """Return the nearest size below ``n`` that can be split, if there is one, and the nearest above.

    If none of the 4096 sizes next to ``n`` can be split, the nearest power of two takes its place.

    Parameters
    ----------
    n, parts, rule
        As for :func:`factorize`, without explicit factors.

    Returns
    -------
    tuple of int
        One or two sizes, in ascending order.

    Examples
    --------
    >>> nearest_sizes(47, 2)
    (46, 48)
    >>> nearest_sizes(1, 3)
    (8,)
    """
    low, start = 2**parts, max(n + 1, 2**parts)
    below = next((k for k in range(n - 1, max(n - SEARCHED, low) - 1, -1) if _split(k, parts, rule)), None)
    if below is None and (power := 1 << ((n - 1).bit_length() - 1 if n > 1 else 0)) >= low:
        below = power
    above = next((k for k in range(start, start + SEARCHED) if _split(k, parts, rule)), 1 << start.bit_length())
    return (above,) if below is None else (below, above)


@lru_cache(maxsize=4096)
def _split(n: int, parts: int, rule: str) -> tuple[int, ...] | None:
    if parts > 1 and not _has_factors(n, parts):
        return None
    found = _greedy(n, parts) if rule == "greedy" else _balanced(n, parts)
    if parts > 1 and (found is None or found[0] == 1):
        return None
    return found


def _has_factors(n: int, parts: int) -> bool:
    """Return whether ``n`` has at least ``parts`` prime factors, without finding all of them."""
    if parts >= n.bit_length():
        return False
    p, left = 2, parts
    while left > 1 and p**left <= n:
        if n % p:
            p += 1
        else:
            n, left = n // p, left - 1
    return left == 1 and n > 1


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """Return all divisors of a positive integer in ascending order.

    Parameters
    ----------
    n
        A positive integer.

    Returns
    -------
    tuple of int
        The divisors, from 1 to ``n``.

    Examples
    --------
    >>> divisors(12)
    (1, 2, 3, 4, 6, 12)
    """
    found = {1}
    for p in _primes(n):
        found |= {d * p for d in found}
    return tuple(sorted(found))


def _primes(n: int) -> Iterator[int]:
    p = 2
    while p * p <= n:
        while n % p == 0:
            yield p
            n //= p
        p += 1
    if n > 1:
        yield n


def _greedy(n: int, parts: int) -> tuple[int, ...]:
    numbers = [1] * parts
    for p in _primes(n):
        numbers[numbers.index(min(numbers))] *= p
    return tuple(sorted(numbers))


def _balanced(n: int, parts: int) -> tuple[int, ...] | None:
    """Search ascending divisors depth-first; prune where the ratio cannot become smaller than the best."""
    best: tuple[int, ...] | None = None

    def ratio(split: tuple[int, ...]) -> float:
        return split[-1] / split[0]

    def search(rest: int, left: int, chosen: tuple[int, ...]) -> None:
        nonlocal best
        if left == 1:
            split = (*chosen, rest)
            if rest >= chosen[-1] and (ratio(split) < ratio(best) if best else ratio(split) <= MAX_RATIO):
                best = split
            return
        for d in reversed(divisors(n)):
            if d**left > rest or rest % d:
                continue
            if chosen and d < chosen[-1]:
                break
            smallest = chosen[0] if chosen else d
            largest_at_least = (rest // d) ** (1 / (left - 1))
            if largest_at_least / smallest < (ratio(best) if best else MAX_RATIO) * (1 + 1e-9):
                search(rest // d, left - 1, (*chosen, d))

    if parts == 1:
        return (n,)
    search(n, parts, ())
    return best if best is not None and best[0] > 1 else None
