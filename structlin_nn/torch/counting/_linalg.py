"""The operations of torch that call LAPACK or transform by FFT, by the FLOPs of :mod:`structlin_nn._flops`."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from structlin_nn._flops import FLOPS, fft_flops, qr_flops, svd_flops
from structlin_nn.torch.counting._lists import Formula, Product, register_table

Arguments = Mapping[str, Any]


def _product(flops: Fraction | int) -> Product:
    return Product(round(flops / 2), "linalg")


def _right_sides(a: Tensor, b: Tensor, left: bool = True) -> tuple[int, int, int]:
    """Return number of systems, their size, and right-hand sides, each counted for its own system, broadcast."""
    n = a.shape[-1]
    if b.ndim == a.ndim - 1 or b.ndim == 1:  # vectors
        return math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-1])), n, 1
    return math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])), n, b.shape[-1] if left else b.shape[-2]


def _of_one(argument: str, flops: Callable[[Arguments, int, int], Fraction | int]) -> Formula:
    """Count FLOPs of one matrix, a function of the arguments and the sizes m x n of the matrix ``argument``."""

    def formula(g: Arguments, output: Any) -> Product:
        *batch, m, n = g[argument].shape
        return _product(math.prod(batch) * flops(g, m, n))

    return formula


def _least_squares(g: Arguments, m: int, n: int) -> Fraction | int:
    """Count QR, its Q times the right-hand sides, and a triangular solve; gelsd and gelss use the SVD."""
    _, _, columns = _right_sides(g["self"].mT, g["b"])
    k, long = min(m, n), max(m, n)
    if g["driver"] in ("gelsd", "gelss"):
        return FLOPS["svd"](long, k) + 2 * columns * k * (m + n)
    return FLOPS["qr"](m, n) + FLOPS["householder_apply"](long, columns, k) + FLOPS["triangular_solve"](k, columns)


def _pseudoinverse(g: Arguments, m: int, n: int) -> Fraction | int:
    """Count the SVD (of a Hermitian matrix the eigenvectors), and the product of its factors."""
    factors = FLOPS["eigh"](n) if g["hermitian"] else svd_flops(m, n, True, False)
    return factors + 2 * m * n * min(m, n)


def _of_triangles(factors: str, right: str, number: int) -> Formula:
    """Count a solution by triangles: the arguments of the factors and of the right-hand sides, and their number."""

    def formula(g: Arguments, output: Any) -> Product:
        batch, n, columns = _right_sides(g[factors], g[right], g.get("left", True))
        return _product(batch * number * FLOPS["triangular_solve"](n, columns))

    return formula


def _solution_by_lu(g: Arguments, output: Any) -> Product:
    batch, n, columns = _right_sides(g["A"], g["B"], g["left"])
    return _product(math.prod(g["A"].shape[:-2]) * FLOPS["lu"](n, n) + batch * FLOPS["lu_solve"](n, columns))


def _reflections(g: Arguments, output: Any) -> Product:
    *batch, m, n = g["input3"].shape
    length, columns = (m, n) if g["left"] else (n, m)
    return _product(math.prod(batch) * FLOPS["householder_apply"](length, columns, g["input2"].shape[-1]))


# -- matrix exponential --------------------------------------------------------------------------------------------

# Bader, Blanes and Casas, *Computing the matrix exponential with an optimized Taylor polynomial approximation* (2019):
# the norms up to which torch takes the degrees 1, 2, 4, 8, 12 and 18, which need 0 to 5 products.
_NORMS = {
    torch.float32: (1.192092800768788e-07, 5.978858893805233e-04, 5.116619363445086e-02, 5.800524627688768e-01,
                    1.461661507209034e+00, 3.010066362817634e+00),
    torch.float64: (2.220446049250313e-16, 2.580956802971767e-08, 3.397168839976962e-04, 4.991228871115323e-02,
                    2.996158913811580e-01, 1.090863719290036e+00),
}  # fmt: skip


def matrix_exp_products(norm: float, dtype: torch.dtype) -> int:
    """Return the number of n x n products in the exponential of a matrix of this 1-norm: Taylor, then squarings."""
    single = dtype in (torch.float32, torch.complex64, torch.float16, torch.bfloat16)
    bounds = _NORMS[torch.float32 if single else torch.float64]
    if norm <= bounds[-1]:
        return bisect_left(bounds, norm)
    return len(bounds) - 1 + math.ceil(math.log2(norm / bounds[-1]))


def _exponential(g: Arguments, output: Any) -> Product:
    """Count by the norms; without finite values (meta) degree 18 without squarings, which is five products."""
    x = g["self"]
    n, norms = x.shape[-1], [math.nan] * math.prod(x.shape[:-2])
    if n and x.device.type != "meta":
        norms = x.detach().abs().sum(-2).amax(-1).reshape(-1).tolist()
    products = [matrix_exp_products(norm, x.dtype) if math.isfinite(norm) else 5 for norm in norms]
    return Product(sum(products) * n**3, "linalg")


def _transforms(x: Tensor, axes: list[int], real: bool) -> Product:
    n = math.prod(x.shape[axis] for axis in axes)
    batch = x.numel() // n if n else 0
    return Product(0, "fft", other_flops=batch * fft_flops(n, real))


register_table({
    "linalg_lu linalg_lu_factor_ex _linalg_det _linalg_slogdet": _of_one("A", lambda g, m, n: FLOPS["lu"](m, n)),
    "geqrf": _of_one("self", lambda g, m, n: FLOPS["qr"](m, n)),
    "linalg_inv_ex": _of_one("A", lambda g, m, n: FLOPS["inverse"](n)),
    "cholesky linalg_cholesky_ex": _of_one("self", lambda g, m, n: FLOPS["cholesky"](n)),
    "cholesky_inverse": _of_one("self", lambda g, m, n: FLOPS["cholesky_inverse"](n)),
    "linalg_ldl_factor_ex": _of_one("self", lambda g, m, n: FLOPS["ldl"](n)),
    "linalg_eigvals _linalg_eigvals": _of_one("self", lambda g, m, n: FLOPS["eigvals"](n)),
    "linalg_eig": _of_one("self", lambda g, m, n: FLOPS["eigvals" if g.get("values_only") else "eig"](n)),
    "_linalg_eigh": _of_one(
        "A", lambda g, m, n: FLOPS["eigh" if g["compute_v"] and not g.get("values_only") else "eigvalsh"](n)
    ),
    "_linalg_svd": _of_one(
        "A", lambda g, m, n: svd_flops(m, n, g["compute_uv"] and not g.get("values_only"), g["full_matrices"])
    ),
    "linalg_qr": _of_one(
        "A", lambda g, m, n: qr_flops(m, n, {"r": 0, "reduced": min(m, n), "complete": m}[g["mode"]])
    ),
    "linalg_householder_product": _of_one(
        "input", lambda g, m, n: FLOPS["householder_product"](m, n, g["tau"].shape[-1])
    ),
    "linalg_lstsq": _of_one("self", _least_squares),
    "linalg_pinv": _of_one("self", _pseudoinverse),
    "linalg_lu_solve": _of_triangles("LU", "B", 2),
    "cholesky_solve": _of_triangles("input2", "self", 2),
    "_cholesky_solve_helper": _of_triangles("A", "self", 2),
    "linalg_ldl_solve": _of_triangles("LD", "B", 2),
    "triangular_solve": _of_triangles("A", "self", 1),
    "linalg_solve_triangular": _of_triangles("self", "B", 1),
    "_linalg_solve_ex": _solution_by_lu,
    "ormqr": _reflections,
    "linalg_matrix_exp": _exponential,
    "_fft_c2c": lambda g, output: _transforms(g["self"], g["dim"], False),
    "_fft_r2c": lambda g, output: _transforms(g["self"], g["dim"], True),
    "_fft_c2r": lambda g, output: _transforms(output, g["dim"], True),
})  # fmt: skip
