"""How tokens are dealt out."""

import pytest

from structlin.execution.compiled import _rules


@pytest.mark.parametrize(("count", "cuts"), [(1, [48, 101]), (2, [48, 80, 101]), (3, [48, 64, 80, 101])])
def test_cuts(count, cuts):
    assert _rules.cuts(range(48, 101), 16, count) == cuts
