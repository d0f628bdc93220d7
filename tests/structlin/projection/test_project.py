"""The function: libraries, choice of the rank, errors."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.arrays import MAKE, TYPES, gaussian, on_host

import structlin
from structlin import AbstractStructure, Factor, NamedOperator, Structure, design, register, unregister
from structlin.conversion import exact_rank
from structlin.projection import Problem, Projection, estimated_error, project, solve, spectrum

CASES = {
    "low_rank": {"rank": 2}, "kronecker": {}, "block_tensor_train": {"cores": 3}, "monarch": {"blocks": 3},
    "blast": {"rank": 3}, "butterfly": {}, "circulant": {}, "permutation": {},
}  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("dtype", ["float64", "complex128", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_libraries_agree(name, dtype, backend):
    W = gaussian((16, 16), complex_=dtype.startswith("complex")).astype(dtype)
    want, found = project(W, name, **CASES[name]), project(MAKE[backend](W), name, **CASES[name])
    for field in dataclasses.fields(Projection):
        if field.name != "operator":
            assert getattr(found, field.name) == getattr(want, field.name)
    assert all(isinstance(f, TYPES[backend]) for f in found.operator.factors)
    assert str(found.operator.dtype).removeprefix("torch.") == dtype
    assert type(found.operator) is type(want.operator) is structlin.structure_class(name)
    for a, b in zip(found.operator.factors, want.operator.factors, strict=True):
        np.testing.assert_array_equal(on_host(a), b)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_half_precision_in_and_out(backend):
    W = MAKE[backend](gaussian((12, 10)))
    W = W.to(torch.bfloat16) if backend == "torch" else W.astype(jnp.bfloat16)
    found = project(W, "low_rank", rank=4)
    assert found.operator.dtype == W.dtype
    exact = project(MAKE[backend](np.array(W.tolist())), "low_rank", rank=4)
    assert found.relative_error == pytest.approx(exact.relative_error, rel=1e-6)
    assert project(W.T[:10, :10], "permutation").operator.dtype == W.dtype


def test_gradients_and_layout_do_not_matter():
    W = torch.randn(8, 12, dtype=torch.float64, requires_grad=True)
    found = project(W, "low_rank", rank=3)
    assert not any(f.requires_grad for f in found.operator.factors)
    turned = project(W.detach().T.contiguous().T, "low_rank", rank=3)
    assert turned.relative_error == pytest.approx(found.relative_error, rel=1e-12)
    conjugated = project(torch.randn(6, 6, dtype=torch.complex128).conj(), "circulant")
    assert np.isfinite(conjugated.relative_error)


def test_on_the_device_of_the_matrix():
    device = jax.devices()[-1]
    W = jax.device_put(jnp.asarray(gaussian((8, 12))), device)
    assert project(W, "low_rank", rank=2).operator.device == device


def test_equal_seeds_give_equal_results():
    W = gaussian((15, 6), 4)
    one, two, other = (project(W, "blast", blocks=3, rank=3, seed=s, max_sweeps=40).operator for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one.factors, two.factors, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one.factors, other.factors, strict=True))


# -- choice of the rank ------------------------------------------------------------------------------------------------

RANKED = [
    ("low_rank", {}),
    ("tensor_train", {}),
    ("block_tensor_train", {"factorization": "greedy"}),
    ("block_tensor_train", {"cores": 3}),
    ("blast", {"blocks": 3}),
]


def decaying(shape, seed=0):
    rng = np.random.default_rng(seed)
    n = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((m, n)))[0] for m in shape)
    return (u * np.exp(-0.3 * np.arange(n))) @ v.T


def rank_of(name, structure):
    """The uniform rank that was requested of a structure."""
    bonds = {"low_rank": 0, "tensor_train": -1, "block_tensor_train": -3, "blast": 1}
    if name == "block_tensor_train":
        return max(f.shape[len(structure.factors)] for f in structure.factors[:-1])
    return max(f.shape[bonds[name]] for f in structure.factors[:-1])


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [(name, options, target) for name, options in RANKED[:4] for target in (0.4, 0.1, 1e-7)]
    + [("blast", {"blocks": 3, "restarts": 0, "max_sweeps": 60}, 0.3)],
)
def test_smallest_rank_for_an_error(name, options, target):
    W = decaying((24, 36))
    found = project(W, name, target_error=target, **options)
    assert found.relative_error <= target
    rank = rank_of(name, found.operator.structure)
    if rank > 1:
        limits = exact_rank(name, W.shape, **options) if name != "blast" else (99,)
        limits = (limits,) if isinstance(limits, int) else limits
        below = tuple(min(rank - 1, n) for n in limits)
        below = below if name in ("tensor_train", "block_tensor_train") else below[0]
        assert project(W, name, rank=below, **options).relative_error > target


@pytest.mark.parametrize(("name", "options"), RANKED)
def test_largest_rank_in_a_budget(name, options):
    W = decaying((24, 36))
    least = design(name, W.shape, rank=1, **options).macs
    for budget in (least, 2 * least + 1, 3 * least + 7):
        found = project(W, name, max_macs=budget, max_sweeps=20, **options).operator.structure
        assert found.macs <= budget
        more = rank_of(name, found) + 1
        limits = exact_rank(name, W.shape, **options) if name != "blast" else 24
        bonds = tuple(min(more, n) for n in limits) if isinstance(limits, tuple) else more
        assert design(name, W.shape, rank=bonds, **options).macs > budget or bonds == limits
    with pytest.raises(ValueError, match=f"rank 1 needs {least} MACs"):
        project(W, name, max_macs=least - 1, **options)


def test_a_budget_beyond_the_dense_matrix_gives_the_exact_rank():
    W = gaussian((24, 36))
    for name in ("low_rank", "tensor_train", "block_tensor_train"):
        found = project(W, name, max_macs=10**9)
        assert found.relative_error < 1e-13
        assert found.operator.structure == design(name, W.shape, rank=exact_rank(name, W.shape))


def test_ranks_of_a_structure_registered_outside():
    @register("doubled")
    class Doubled(NamedOperator):
        """Low rank of twice the rank."""

        formula = "i,rsi->rs; rs,ors->o"

        @staticmethod
        def design(shape, *, rank=1):
            return Structure.parse(Doubled.formula, i=shape[1], r=rank, s=2, o=shape[0])

    try:
        W = decaying((12, 16))
        found = project(W, "doubled", target_error=0.1)
        assert type(found.operator) is Doubled
        low = project(W, "low_rank", target_error=0.1).operator.structure.factors[0].shape[0]
        assert found.operator.structure.factors[0].shape[0] == -(-low // 2)
        assert found.relative_error == pytest.approx(project(W, "low_rank", rank=2 * -(-low // 2)).relative_error)
    finally:
        unregister("doubled")


# -- errors ------------------------------------------------------------------------------------------------------------

W = np.arange(1.0, 13.0).reshape(3, 4)


@pytest.mark.parametrize(("matrix", "structure", "options", "words"), [
    (W[0], "low_rank", {}, "must be a matrix"),
    (W[:0], "low_rank", {}, "with entries"),
    (np.arange(12).reshape(3, 4), "low_rank", {}, "floating or complex, got int64"),
    (np.where(W == 5, np.nan, W), "low_rank", {}, "1 entries that are not finite"),
    (np.where(W > 10, np.inf, W), "low_rank", {}, "2 entries that are not finite"),
    (W, "lowrank", {}, "unknown structure 'lowrank'"),
    (W, "low_rank", {"ranks": 2}, "no option 'ranks'"),
    (W, "circulant", {}, "square"),
    (W, "low_rank", {"rank": 1, "target_error": 0.1}, "give one of rank, target_error and max_macs"),
    (W, "low_rank", {"rank_fraction": 0.5, "max_macs": 9}, "got rank_fraction, max_macs"),
    (W, "low_rank", {"target_error": 0.1, "max_macs": 9}, "got target_error, max_macs"),
    (W, "low_rank", {"target_error": -0.1}, "at least 0"),
    (W, "low_rank", {"max_macs": 9.5}, "an integer"),
    (W, "kronecker", {"target_error": 0.1}, "has no rank to choose; its options are cores, factorization"),
    (W, "dense", {"max_macs": 9}, "its options are none"),
    (W, "low_rank", {"restarts": -1}, "restarts must be an integer of at least 0"),
    (W, "low_rank", {"max_sweeps": 0}, "max_sweeps must be an integer of at least 1"),
    (W, "low_rank", {"tolerance": 1.0}, "tolerance"),
    (W, design("low_rank", (4, 3), rank=1), {}, r"the structure has shape \(4, 3\), W has shape \(3, 4\)"),
    (W, design("low_rank", (3, 4), rank=1), {"rank": 2}, "a structure includes its rank"),
    (W, design("low_rank", (3, 4), rank=1), {"target_error": 0.1}, "a structure includes its rank"),
    (np.random.default_rng(0).standard_normal((3, 4)), "low_rank", {"target_error": 1e-30}, "no rank of 'low_rank' up"),
])  # fmt: skip
def test_bad_values(matrix, structure, options, words):
    with pytest.raises(ValueError, match=words):
        project(matrix, structure, **options)


@dataclass(frozen=True)
class Unknown(AbstractStructure):
    d_in: int = 4
    d_out: int = 3

    @property
    def factors(self):
        return (Factor("x", (3,), 1, 1),)

    macs = 0

    def transpose(self):
        return self

    def transpose_factors(self, factors):
        return factors

    def _rows(self, factors, x, xp):
        return x

    _columns = _rows


@pytest.mark.parametrize(("matrix", "structure", "words"), [
    (W.tolist(), "low_rank", "expected a NumPy array"),
    (W, 3, "must be a name"),
    (W, dict, "must be a name"),
    (W, Unknown(), "not a chain of einsums and does not implement `nearest`"),
])  # fmt: skip
def test_bad_types(matrix, structure, words):
    with pytest.raises(TypeError, match=words):
        project(matrix, structure)


# -- scale and dtype -----------------------------------------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("scale", [1e160, 1e-160, 1e-200, 1e300])
@pytest.mark.parametrize(("name", "options"), [
    ("low_rank", {"rank": 2}), ("kronecker", {}), ("monarch", {"blocks": 3}), ("block_diagonal", {"blocks": 2}),
    ("tensor_train", {"cores": 3, "rank": 2, "factorization": ((2, 2, 2), (2, 2, 2))}), ("toeplitz", {}),
    ("circulant", {}), ("diagonal", {}), ("blast", {"blocks": 2, "rank": 2}),
])  # fmt: skip
def test_neither_huge_nor_tiny_matrices_lose_their_error(name, options, scale):
    """The squares of such entries overflow or vanish."""
    target = gaussian((8, 8), seed=3)
    plain, scaled = (project(s * target, name, **options) for s in (1.0, scale))
    assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
    assert (scaled.error_bound or 0) == pytest.approx(plain.error_bound or 0, rel=1e-6)
    loose = 1e-2 if plain.iterations else 1e-12  # the tolerance of the iteration is one of the error
    np.testing.assert_allclose(scaled.operator.to_dense() / scale, plain.operator.to_dense(), rtol=loose, atol=loose)


@pytest.mark.parametrize("scale", [1e160, 1e-200, 1e300])
@pytest.mark.parametrize("name", ["low_rank", "block_tensor_train", "tensor_train"])
def test_the_spectrum_and_the_rank_of_huge_and_tiny_matrices(name, scale, covariance):
    target, C = gaussian((24, 36), seed=5), covariance(36)[0]
    shape = design(name, (24, 36), rank=1)
    for weights in ((), (C,)):
        options = {"input_covariance": C} if weights else {}
        plain, scaled = (project(s * target, name, target_error=0.5, **options) for s in (1.0, scale))
        assert scaled.operator.structure == plain.operator.structure
        assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-3)
        plain, scaled = (spectrum(shape, Problem(s * target, *weights)) for s in (1.0, scale))
        assert plain is not None or weights
        if plain is not None:
            np.testing.assert_allclose(scaled / scale, plain, rtol=1e-9, atol=1e-12)
    plain, scaled = (estimated_error(shape, Problem(s * target, C), 30) for s in (1.0, scale))
    assert scaled / scale == pytest.approx(plain, rel=1e-3)
    single = spectrum(shape, Problem((1e30 * target).astype(np.float32)))
    np.testing.assert_allclose(single / 1e30, spectrum(shape, Problem(target)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e160, 1e-200])
def test_a_scaled_covariance_changes_nothing(scale, covariance):
    target, C = gaussian((6, 8), seed=4), covariance(8)[0]
    for name, options in (("low_rank", {"rank": 2}), ("block_tensor_train", {"tolerance": 1e-12}), ("toeplitz", {})):
        plain = project(target, name, input_covariance=C, **options)
        scaled = project(target / scale, name, input_covariance=C * scale, **options)
        assert scaled.relative_error == pytest.approx(plain.relative_error, rel=1e-6)
        np.testing.assert_allclose(scaled.operator.to_dense() * scale, plain.operator.to_dense(), rtol=1e-4, atol=1e-6)


def test_the_error_of_a_permutation_far_from_all_of_them():
    found = project(1e160 * np.eye(4)[[2, 0, 3, 1]], "permutation")
    assert found.relative_error == pytest.approx(1.0)
    np.testing.assert_array_equal(found.operator.factors[0], [2, 0, 3, 1])
    assert project(1e-200 * np.eye(4), "permutation").relative_error == pytest.approx(1e200)


def test_lazy_views_of_torch():
    W = torch.tensor(gaussian((6, 5)) + 1j * gaussian((6, 5), seed=1))
    for view in (W.conj().imag, W.conj(), W.mH):
        assert view.is_neg() or view.is_conj()
        found, plain = (project(x, "low_rank", rank=2) for x in (view, view.resolve_conj().resolve_neg()))
        assert found.relative_error == plain.relative_error
        torch.testing.assert_close(found.operator.to_dense(), plain.operator.to_dense())
    view = W.conj().imag[0]
    np.testing.assert_array_equal(structlin.interop.to_numpy(structlin.Diagonal(view)).diagonal(), -W[0].imag.numpy())
    found = structlin.linalg.lsmr(structlin.Diagonal(1 + 0 * view), view, tolerance=1e-14)
    torch.testing.assert_close(found, -W[0].imag)


def test_closed_forms_keep_the_dtype_and_iterations_are_in_double():
    target = gaussian((12, 12)).astype(np.float32)
    for name, options, dtype in (
        ("kronecker", {}, np.float32), ("low_rank", {"rank": 3}, np.float32), ("monarch", {"blocks": 3}, np.float32),
        ("block_tensor_train", {}, np.float32), ("blast", {"blocks": 2, "rank": 2}, np.float64),
    ):  # fmt: skip
        found = solve(design(name, (12, 12), **options), Problem(target))
        assert {f.dtype for f in found.factors} == {np.dtype(dtype)}
        double = solve(design(name, (12, 12), **options), Problem(target.astype(float)))
        assert found.error == pytest.approx(double.error, rel=1e-5)


def test_a_structure_of_no_chain_gives_an_operator_of_its_class():
    for name in ("toeplitz", "circulant", "diagonal", "permutation"):
        found = project(gaussian((5, 5)), design(name, (5, 5)))
        assert type(found.operator) is structlin.structure_class(name)
