"""The conformance checks themselves can fail."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import structlin
from structlin import Structure, design, random_factors, structure_class
from structlin._counted import Counts, counted
from structlin.structure import AbstractStructure, Factor
from structlin.testing import check_instance, check_structure, dense_matrix, random_chain, to_numpy, unit_roundoff


@dataclass(frozen=True)
class Doubling(AbstractStructure):
    """A dense matrix with one flaw, named by ``flaw``; none: sound."""

    d_out: int
    d_in: int
    flaw: str = ""

    @property
    def factors(self):
        return (Factor("W", (self.d_out, self.d_in), self.d_in, self.d_out),)

    @property
    def num_params(self):
        return self.d_out * self.d_in + (self.flaw == "params")

    @property
    def macs(self):
        return self.d_out * self.d_in * (2 if self.flaw == "macs" and self.d_out < self.d_in else 1)

    @property
    def flops(self):
        return 2 * self.macs + (self.flaw == "flops")

    @property
    def rank_bound(self):
        return min(self.shape) - (self.flaw == "rank")

    def transpose(self):
        return Doubling(self.d_in, self.d_out, "" if self.flaw == "forgotten" else self.flaw)

    def transpose_factors(self, factors):
        w = factors[0].swapaxes(0, 1)
        return (2 * w if self.flaw == "transpose" else w,)

    def dense(self, factors):
        return None if self.flaw == "oracle" else np.array([list(row) for row in factors[0]])

    def _rows(self, factors, x, xp):
        y = x @ factors[0].swapaxes(0, 1)
        if self.flaw == "rows":
            return y + 1e-3
        if self.flaw == "dtype":
            return y.astype("float32")
        return y

    def _columns(self, factors, x, xp):
        y = factors[0] @ x
        return y + 1e-6 if self.flaw == "columns" else y


def broken(flaw, **attributes):
    def make(shape):
        return Doubling(*shape, flaw)

    usual = {"formula": "y = W x", "parameters": "d_in d_out", "source": "-", "examples": (((2, 3), {}),)}
    return type("Broken", (structlin.NamedOperator,), {**usual, "design": staticmethod(make), **attributes})


def test_a_sound_structure_passes():
    check_structure(broken(""))


@pytest.mark.parametrize(
    ("flaw", "message"),
    [
        ("params", "states 7 parameters, has 6"),
        ("macs", r"states 12 MACs for a vector, but computes 18 for 3 vectors"),
        ("flops", "states 13 FLOPs, its parts add up to 12"),
        ("rank", "has rank 2, above its bound 1"),
        ("rows", "rows of shape .* is off by up to"),
        ("columns", "columns of shape .* is off by up to"),
        ("dtype", "has dtype float32"),
        ("transpose", "<A x, y> = .* but <x, A. y> ="),
        ("forgotten", "transposed twice is"),
    ],
)
def test_a_flaw_is_found(flaw, message):
    with pytest.raises(AssertionError, match=message):
        check_structure(broken(flaw))


def test_a_structure_without_an_oracle_is_refused():
    with pytest.raises(ValueError, match="is not a chain, so it must implement `dense`"):
        check_structure(broken("oracle"))


@dataclass(frozen=True)
class Scaled(AbstractStructure):
    """Claims ``y = w x``, with a vector w, and no product. With ``squared`` it computes ``w w^T x`` all the same."""

    d_in: int
    squared: bool = True
    honest: bool = False  # the oracle says what is computed

    @property
    def d_out(self):
        return self.d_in

    @property
    def factors(self):
        return (Factor("w", (self.d_in,), 1, 1, blocks=self.d_in),)

    macs = 0
    other_flops = property(lambda self: {"elementwise": self.d_in})

    def transpose(self):
        return self

    def transpose_factors(self, factors):
        return tuple(factors)

    def dense(self, factors):
        return np.outer(factors[0], factors[0]) if self.honest else np.diag(factors[0])

    def _rows(self, factors, x, xp):
        (w,) = factors
        return (x @ w)[:, None] * w if self.squared else x * w

    def _columns(self, factors, x, xp):
        return self._rows(factors, x.swapaxes(0, 1), xp).swapaxes(0, 1)


def test_a_structure_that_computes_something_else_than_it_claims_is_found():
    check_instance(Scaled(4, squared=False))
    with pytest.raises(AssertionError, match=r"states 0 MACs for a vector, but computes 12 for 3 vectors"):
        check_instance(Scaled(4, honest=True))
    with pytest.raises(AssertionError, match=r"states 0 MACs for a vector, but computes 12 for 3 vectors"):
        check_instance(Scaled(4))


def test_an_oracle_that_contradicts_the_products_is_found(monkeypatch):
    monkeypatch.setattr("structlin.testing._check_products", lambda *_: None)
    with pytest.raises(AssertionError, match="is off by up to"):
        check_instance(Scaled(4))


class Hidden(Scaled):
    def _rows(self, factors, x, xp):
        return (x[:, None, :] * factors[0]).sum(-1) * factors[0]


def test_products_hidden_in_elementwise_work_are_found():
    with pytest.raises(AssertionError, match=r"states 12 FLOPs other than MACs for 3 vectors, but computes"):
        check_instance(Hidden(4, honest=True))


def test_counted_products_of_numpy():
    a, b, v = np.ones((2, 3)), np.ones((3, 4)), np.ones(3)
    for function, arrays, macs in (
        (lambda a, b: a @ b, (a, b), 24),
        (lambda a, v: a @ v, (a, v), 6),
        (lambda v: v @ v, (v,), 3),
        (np.dot, (a, b), 24),
        (lambda a, b: a.dot(b), (a, b), 24),
        (lambda a, v: np.inner(a, v), (a, v), 6),
        (np.vdot, (a, a), 6),
        (lambda a, b: np.tensordot(a, b, 1), (a, b), 24),
        (lambda a, b: np.einsum("ij,jk->ik", a, b), (a, b), 24),
        (lambda a, b: (a[None] @ b)[0].T.copy().reshape(-1) @ np.ones(8), (a, b), 32),
        (lambda a: np.fft.irfft(np.fft.rfft(a)), (a,), 0),
    ):
        assert counted(function, *arrays).macs == macs
    assert counted(lambda a: 2 * a / 3, a) == Counts(0, 12)
    assert counted(np.outer, v, v) == Counts(0, 9)
    assert counted(lambda f, x: f[0] * x, (v,), v) == Counts(0, 3)


def test_other_flaws_are_found():
    with pytest.raises(ValueError, match="Broken has no examples"):
        check_structure(broken("", examples=()))
    with pytest.raises(AssertionError, match="has no formula"):
        check_structure(broken("", formula=""))
    with pytest.raises(AssertionError, match=r"must take its options by name only, without \*\*, got \*\*rest"):
        check_structure(broken("", design=staticmethod(lambda shape, **rest: Doubling(*shape))))
    with pytest.raises(AssertionError, match=r"has shape \(3, 2\), not \(2, 3\)"):
        check_structure(broken("", design=staticmethod(lambda shape: Doubling(*shape[::-1]))))


def test_the_checks_compare_chains_with_the_oracle(monkeypatch):
    """A contraction that is wrong everywhere, and so agrees with itself, is still found."""
    right = Structure._columns, Structure._rows
    monkeypatch.setattr(Structure, "_columns", lambda self, f, x, xp: 2 * right[0](self, f, x, xp))
    monkeypatch.setattr(Structure, "_rows", lambda self, f, x, xp: 2 * right[1](self, f, x, xp))
    with pytest.raises(AssertionError, match="is off by up to"):
        check_structure(structure_class("low_rank"))


def test_the_checks_count_the_macs_of_chains_themselves(monkeypatch):
    monkeypatch.setattr(Structure, "macs", property(lambda self: self.num_params))
    check_structure(structure_class("block_tensor_train"))
    with pytest.raises(AssertionError, match=r"states \d+ MACs, its einsums have \d+"):
        check_structure(structure_class("kronecker"))


def test_the_checks_cover_the_scale(monkeypatch):
    monkeypatch.setattr("structlin.testing.lr_multipliers", lambda s, **_: (1.0,) * len(s.factors))
    with pytest.raises(AssertionError, match="do not double with base_d_in"):
        check_structure(structure_class("dense"))
    monkeypatch.setattr("structlin.testing.init_std", lambda s, **_: (0.0,) * len(s.factors))
    with pytest.raises(AssertionError, match="deviations"):
        check_structure(structure_class("dense"))


def test_random_chains_have_every_feature():
    chains = [random_chain(np.random.default_rng(seed)) for seed in range(200)]
    steps = [step for s in chains for step in s.steps]
    assert len(set(chains)) > 190
    for role in ("contracted", "free", "batch", "carried"):
        assert {bool(getattr(step, role)) for step in steps} == {True, False}
    assert {len(s.steps) for s in chains} == {1, 2, 3, 4}
    assert {s.padding[0] > 0 for s in chains} == {s.padding[1] > 0 for s in chains} == {True, False}
    assert any(a.output != b.input for s in chains for a, b in zip(s.steps, s.steps[1:], strict=False))
    assert random_chain(np.random.default_rng(7)) == random_chain(np.random.default_rng(7))


def test_the_oracle_takes_factors_of_any_library_and_dtype():
    s = design("block_tensor_train", (35, 6), rank=2)
    wanted = np.einsum("ferp,pfra->fepa", *random_factors(s, seed=0)[::-1]).reshape(35, 6)
    for backend in ("numpy", "torch", "jax"):
        for dtype in ("float32", "complex64"):
            factors = random_factors(s, backend=backend, dtype=dtype, seed=0)
            matrix = dense_matrix(s, factors)
            assert matrix.dtype == ("complex128" if "complex" in dtype else "float64")
            if "complex" not in dtype:
                np.testing.assert_allclose(matrix, wanted, atol=1e-6)


def test_conversion_to_numpy_is_exact():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.complex64):
        x = torch.randn(5, dtype=dtype)
        assert np.array_equal(to_numpy(x), to_numpy(x.to(torch.complex128 if dtype.is_complex else torch.float64)))
    assert np.array_equal(to_numpy(torch.tensor([1 + 2j]).conj()), [1 - 2j])
    assert to_numpy(torch.tensor([3])).dtype == np.int64


def test_unit_roundoff():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert 2 * unit_roundoff(dtype) == torch.finfo(dtype).eps
    assert unit_roundoff("complex64") == unit_roundoff(np.float32) == 2**-24
    with pytest.raises(KeyError):
        unit_roundoff("int64")


def test_a_transformation_is_checked_too():
    s = Structure.parse("i,ri->r; r,or->o", i=7, r=2, o=5)
    calls = []

    def watched(apply):
        def call(factors, x):
            calls.append(x.shape)
            return apply(factors, x)

        return call

    check_instance(s, transform=watched, quick=True)
    assert calls == [(3, 7), (7, 3), (3, 7), (3, 5)]
    with pytest.raises(AssertionError, match="is off by up to"):
        check_instance(s, transform=lambda apply: lambda factors, x: apply(factors, x) + 1e-9)
