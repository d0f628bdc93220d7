"""Which chains are left to the BLAS, and how tokens are dealt out."""

import pytest

import structlin as sl
from structlin.execution.compiled import _rules
from structlin.execution.compiled._limits import Limits
from structlin.execution.machine import Caches


@pytest.mark.parametrize(
    ("registers", "threads", "least"), [(32, 1, 1 << 21), (32, 2, 1 << 19), (16, 1, 1 << 18), (16, 2, 1 << 18)]
)
def test_large_blocks(registers, threads, least, monkeypatch):
    """Of the smallest product of a step."""
    monkeypatch.setattr(_rules.ChainRules, "registers", registers)
    monkeypatch.setattr(_rules, "limits", lambda: Limits.of(Caches(32 << 10, 1 << 20, 16 << 20)))
    for free, large in ((least // 64, True), (least // 64 - 1, False)):
        structure = sl.Structure.parse("pa,pfa->pf; pf,epf->pe", p=3, a=64, f=free, e=70)
        chain = _rules.ChainRules(structure.steps, structure.sizes, structure.d_in, structure.d_out, True)
        assert chain.large_blocks(threads) == large


@pytest.mark.parametrize(("count", "cuts"), [(1, [48, 101]), (2, [48, 80, 101]), (3, [48, 64, 80, 101])])
def test_cuts(count, cuts):
    assert _rules.cuts(range(48, 101), 16, count) == cuts
