"""Leading singular vectors against full decompositions: gaps, repeated and graded values, zeros, every dtype."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structlin.projection import _leading
from structlin.projection._leading import leading

DTYPES = ["float64", "float32", "complex128", "complex64"]


def gaussian(rng, shape, dtype):
    values = rng.standard_normal(shape)
    return (values + 1j * rng.standard_normal(shape) if "complex" in dtype else values).astype(dtype)


def check(matrices, count):
    """Orthonormal, and no farther from the matrices than the best approximations are."""
    basis = leading(matrices, count)
    eps = np.finfo(matrices.dtype).eps
    assert basis.shape == (*matrices.shape[:2], count)
    assert basis.dtype == matrices.dtype
    adjoint = basis.conj().swapaxes(-1, -2)
    np.testing.assert_allclose(
        adjoint @ basis, np.broadcast_to(np.eye(count), (*adjoint.shape[:2], count)), atol=50 * eps
    )
    wide = matrices.astype(np.result_type(matrices.dtype, np.float64))
    error = np.linalg.norm(wide - basis.astype(wide.dtype) @ (adjoint.astype(wide.dtype) @ wide))
    best = np.linalg.norm(np.linalg.svd(wide, compute_uv=False)[:, count:])
    assert error <= best * (1 + 100 * eps) + 50 * eps * np.linalg.norm(wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "count", "way"),
    [
        ((30, 40, 60), 1, "_by_squaring"),
        ((30, 60, 40), 1, "_by_squaring"),
        ((3, 60, 40), 5, "_by_eigenvectors"),
        ((1, 40, 60), 5, "_by_eigenvectors"),
        ((1, 520, 540), 2, "_by_lanczos"),
        ((1, 540, 520), 1, "_by_lanczos"),
        ((4, 40, 60), 30, None),
        ((4, 8, 60), 1, None),
    ],
)
def test_random_matrices_by_every_method(shape, count, way, dtype, monkeypatch):
    used = []
    for name in ("_by_squaring", "_by_eigenvectors", "_by_lanczos"):
        method = getattr(_leading, name)
        monkeypatch.setattr(_leading, name, lambda *a, m=method, n=name: used.append(n) or m(*a))
    check(gaussian(np.random.default_rng(0), shape, dtype), count)
    assert used[-1:] == ([way] if way else [])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6), st.integers(17, 40), st.integers(17, 40), st.integers(1, 9), st.sampled_from(DTYPES),
    st.lists(st.sampled_from([1.0, 1.0, 0.999999, 1e-3, 1e-5, 1e-9, 0.0]), min_size=1, max_size=12),
    st.integers(0, 99),
)  # fmt: skip
def test_graded_repeated_and_vanishing_singular_values(batch, m, n, count, dtype, values, seed):
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(gaussian(rng, (batch, m, len(values)), dtype))[0]
    right = np.linalg.qr(gaussian(rng, (batch, n, len(values)), dtype))[0]
    matrices = (left * np.array(values)) @ right.conj().swapaxes(-1, -2)
    check(matrices.astype(dtype), min(count, m, n))


@pytest.mark.parametrize("dtype", DTYPES)
def test_degenerate_stacks(dtype):
    check(np.zeros((1, 530, 530), dtype), 1)
    check(np.zeros((5, 30, 30), dtype), 1)
    check(np.eye(530, dtype=dtype)[None], 3)
    check(np.broadcast_to(np.eye(30, dtype=dtype), (6, 30, 30)).copy(), 1)
    check(np.concatenate([np.zeros((4, 30, 30)), np.ones((4, 30, 30))]).astype(dtype), 1)
    graded = np.diag(np.logspace(0, -12, 530)).astype(dtype)[None]
    check(graded, 3)
    check(graded, 200)
