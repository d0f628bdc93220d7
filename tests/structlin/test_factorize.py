"""Factor sizes against their definitions, by brute force."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from structlin import factorize, nearest_sizes
from structlin.factorize import MAX_RATIO, divisors

LIMIT = 300
ALL = [(n, parts) for n in range(1, LIMIT) for parts in (2, 3)]


def splits(n, parts):
    """Every ascending factorisation of n into ``parts`` integers, 1 allowed."""
    ranges = itertools.combinations_with_replacement([k for k in range(1, n + 1) if n % k == 0], parts)
    return [s for s in ranges if math.prod(s) == n]


def greedy_by_definition(n, parts):
    """Prime factors in ascending order, each multiplied onto the currently smallest number, then sorted."""
    numbers, p = [1] * parts, 2
    while n > 1:
        while n % p:
            p += 1
        n //= p
        numbers.sort()
        numbers[0] *= p
    return tuple(sorted(numbers))


def ratio(split):
    return max(split) / min(split)


def balanced_by_search(n, parts):
    """The smallest largest-to-smallest ratio, or None where that is above the limit or needs a factor 1."""
    proper = [s for s in splits(n, parts) if min(s) > 1]
    best = min(map(ratio, proper), default=math.inf)
    return {s for s in proper if ratio(s) == best} if best <= MAX_RATIO else None


def wanted(n, parts, rule):
    if rule == "balanced":
        return balanced_by_search(n, parts)
    found = greedy_by_definition(n, parts)
    return {found} if found[0] > 1 else None


WANTED = {(n, parts, rule): wanted(n, parts, rule) for n, parts in ALL for rule in ("balanced", "greedy")}


@pytest.mark.parametrize("rule", ["balanced", "greedy"])
@pytest.mark.parametrize("parts", [2, 3])
def test_every_size_below_300(rule, parts):
    splittable = 0
    for n in range(1, LIMIT):
        expected = WANTED[n, parts, rule]
        if expected is None:
            with pytest.raises(ValueError, match=f"^{n} cannot be split into {parts} factors by rule '{rule}'"):
                factorize(n, parts, rule)
        else:
            assert factorize(n, parts, rule) in expected
            splittable += 1
    assert splittable > 100


@pytest.mark.parametrize("rule", ["balanced", "greedy"])
@pytest.mark.parametrize("parts", [2, 3])
def test_nearest_sizes_are_the_nearest(rule, parts):
    for n in range(1, 200):
        below = [k for k in range(1, n) if WANTED[k, parts, rule]][-1:]
        above = next(k for k in range(n + 1, LIMIT) if WANTED[k, parts, rule])
        assert nearest_sizes(n, parts, rule) == (*below, above)
        if WANTED[n, parts, rule] is None:
            near = " and ".join(map(str, (*below, above)))
            with pytest.raises(ValueError, match=f"the nearest sizes that can are {near}$"):
                factorize(n, parts, rule)


def test_sizes_of_the_paper_and_of_common_networks():
    assert factorize(768, 2) == (24, 32)
    assert factorize(768, 2, "greedy") == (16, 48)
    assert factorize(3072, 2, "greedy") == (32, 96)
    assert factorize(3072, 2) == (48, 64)
    assert factorize(4096, 3) == (16, 16, 16)
    assert factorize(50304, 2) == (192, 262)


@given(st.lists(st.integers(2, 60), min_size=1, max_size=4))
def test_balanced_is_no_worse_than_any_known_split(known):
    n = math.prod(known)
    if ratio(known) <= MAX_RATIO:
        found = factorize(n, len(known))
        assert math.prod(found) == n
        assert list(found) == sorted(found)
        assert ratio(found) <= ratio(known)


def test_large_sizes_are_split_in_no_time():
    assert factorize(2**40, 4) == (1024,) * 4
    assert factorize(720720 * 720720, 2) == (720720, 720720)
    assert factorize(1000003 * 1000033, 2) == (1000003, 1000033)


def test_one_factor_and_explicit_factors():
    for rule in ("balanced", "greedy"):
        assert factorize(101, 1, rule) == (101,)
        assert factorize(1, 1, rule) == (1,)
    assert factorize(12, 2, (6, 2)) == (6, 2)
    assert factorize(12, 2, [12, 1]) == (12, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2), "must be a positive integer, got 0"),
        ((-4, 2), "must be a positive integer, got -4"),
        ((4.0, 2), "must be a positive integer, got 4.0"),
        ((True, 2), "must be a positive integer, got True"),
        ((4, 0), "number of factors must be a positive integer, got 0"),
        ((4, 2.0), "number of factors must be a positive integer, got 2.0"),
        ((4, True), "number of factors must be a positive integer, got True"),
        ((12, 2, "best"), "unknown factorization 'best'; one of balanced, greedy, or the factors themselves"),
        ((12, 2, (3, 5)), r"2 factors with product 12 are needed, got \(3, 5\) with product 15"),
        ((12, 2, (2, 2, 3)), r"2 factors with product 12 are needed, got \(2, 2, 3\)"),
        ((12, 2, (-3, -4)), r"explicit factors must be positive integers, got \(-3, -4\)"),
        ((12, 2, (3.0, 4)), r"explicit factors must be positive integers, got \(3.0, 4\)"),
        ((12, 2, (True, 12)), r"explicit factors must be positive integers, got \(True, 12\)"),
        ((101, 2), "101 cannot be split into 2 factors by rule 'balanced'; the nearest sizes that can are 100 and 102"),
        ((2 * 37, 2), "74 cannot be split into 2 factors by rule 'balanced'; the nearest sizes that can are 72 and 75"),
        ((1, 3, "greedy"), "the nearest sizes that can are 8$"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        factorize(*arguments)


def test_divisors_by_definition():
    for n in range(1, LIMIT):
        assert divisors(n) == tuple(k for k in range(1, n + 1) if n % k == 0)


@pytest.mark.parametrize("rule", ["balanced", "greedy"])
def test_large_sizes_and_many_parts_take_no_time(rule):
    """Each of these took minutes, or all memory."""
    assert factorize(2**60, 20, rule) == (8,) * 20
    assert math.prod(factorize(735134400, 8, rule)) == 735134400
    assert nearest_sizes(2**31 - 1, 5, rule) == (2**31 - 2, 2**31)
    assert nearest_sizes(2**31 - 1, 29, rule) == (2**30, 2**31)  # powers of two: none is near
    with pytest.raises(ValueError, match=r"smallest size that can is 2\^1000000000, and 12 has 3 prime factors"):
        factorize(12, 10**9, rule)
