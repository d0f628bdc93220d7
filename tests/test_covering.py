"""The choice of the cases that fast tests take from a product of parameters (``covering`` in ``conftest.py``)."""

import runpy
from itertools import combinations, product
from pathlib import Path

import pytest

covered = runpy.run_path(str(Path(__file__).parent / "conftest.py"))["covered"]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_all_combinations_that_occur_are_covered(strength: int) -> None:
    cases = [case for case in product("abcd", "xyz", "01", "pq") if case[:2] != ("a", "x")]  # not a full product
    kept = [cases[k] for k in sorted(covered(cases, strength))]
    of_all, of_kept = (
        {group for case in some for group in combinations(tuple(enumerate(case)), strength)} for some in (cases, kept)
    )
    assert of_kept == of_all
    assert len(kept) <= {1: 5, 2: 15, 3: 32}[strength] < len(cases)
    assert covered(cases, strength) == covered(cases, strength)  # the workers of xdist have to agree


def test_more_parameters_asked_for_than_there_are() -> None:
    assert covered([("a",), ("b",), ("c",)], 2) == {0, 1, 2}
