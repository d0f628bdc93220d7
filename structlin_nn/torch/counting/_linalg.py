"""The operations of torch that call LAPACK or transform by FFT, by the FLOPs of :mod:`structlin_nn._flops`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from structlin_nn._flops import FLOPS, fft_flops
from structlin_nn.torch.counting._lists import Product, register_product

Arguments = Mapping[str, Any]


def _register(names: str) -> Callable[[Callable[[Arguments], Product]], None]:
    def add(formula: Callable[[Arguments], Product]) -> None:
        for name in names.split():
            register_product(f"aten::{name}")(lambda arguments, output: formula(arguments))

    return add


def _product(batch: int, *flops: Fraction | int) -> Product:
    return Product(round(batch * sum(flops) / 2), "linalg")


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Return number of matrices, rows, columns."""
    return math.prod(x.shape[:-2]), x.shape[-2], x.shape[-1]


def _right_sides(a: Tensor, b: Tensor, left: bool = True) -> tuple[int, int, int]:
    """Return number of systems, their size, and right-hand sides, each counted for its own system, broadcast."""
    n = a.shape[-1]
    if b.ndim == a.ndim - 1 or b.ndim == 1:  # vectors
        return math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-1])), n, 1
    return math.prod(torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])), n, b.shape[-1] if left else b.shape[-2]


# Operations of one matrix: the argument, and the FLOPs of (m, n), or of (n,) for square matrices alone.
_RECTANGULAR = {
    "linalg_lu linalg_lu_factor_ex _linalg_det _linalg_slogdet": ("A", "lu"),
    "geqrf": ("self", "qr"),
}
_SQUARE = {
    "linalg_inv_ex": ("A", "inverse"),
    "cholesky linalg_cholesky_ex": ("self", "cholesky"),
    "cholesky_inverse": ("self", "cholesky_inverse"),
    "linalg_ldl_factor_ex": ("self", "ldl"),
    "linalg_eigvals _linalg_eigvals": ("self", "eigvals"),
}

# Solutions by triangles: the arguments of the factors and of the right-hand sides, and the number of triangles.
_TRIANGLES = {
    "linalg_lu_solve": ("LU", "B", 2),
    "cholesky_solve": ("input2", "self", 2),
    "_cholesky_solve_helper": ("A", "self", 2),
    "linalg_ldl_solve": ("LD", "B", 2),
    "triangular_solve": ("A", "self", 1),
    "linalg_solve_triangular": ("self", "B", 1),
}


def _of_one(argument: str, name: str, axes: int) -> Callable[[Arguments], Product]:
    def formula(g: Arguments) -> Product:
        batch, *sizes = _shape(g[argument])
        return _product(batch, FLOPS[name](*sizes[-axes:]))

    return formula


def _of_triangles(factors: str, right: str, number: int) -> Callable[[Arguments], Product]:
    def formula(g: Arguments) -> Product:
        batch, n, columns = _right_sides(g[factors], g[right], g.get("left", True))
        return _product(batch, number * FLOPS["triangular_solve"](n, columns))

    return formula


for _names, (_argument, _name) in _RECTANGULAR.items():
    _register(_names)(_of_one(_argument, _name, 2))
for _names, (_argument, _name) in _SQUARE.items():
    _register(_names)(_of_one(_argument, _name, 1))
for _names, _solution in _TRIANGLES.items():
    _register(_names)(_of_triangles(*_solution))


@_register("_linalg_solve_ex")
def _(g: Arguments) -> Product:
    batch, n, columns = _right_sides(g["A"], g["B"], g["left"])
    factors = math.prod(g["A"].shape[:-2]) * FLOPS["lu"](n, n)
    return _product(1, factors, batch * FLOPS["lu_solve"](n, columns))


@_register("linalg_qr")
def _(g: Arguments) -> Product:
    batch, m, n = _shape(g["A"])
    k = min(m, n)
    columns = {"r": 0, "reduced": k, "complete": m}[g["mode"]]
    return _product(batch, FLOPS["qr"](m, n), FLOPS["householder_product"](m, columns, k) if columns else 0)


@_register("linalg_householder_product")
def _(g: Arguments) -> Product:
    batch, m, n = _shape(g["input"])
    return _product(batch, FLOPS["householder_product"](m, n, g["tau"].shape[-1]))


@_register("ormqr")
def _(g: Arguments) -> Product:
    batch, m, n = _shape(g["input3"])
    length, columns = (m, n) if g["left"] else (n, m)
    return _product(batch, FLOPS["householder_apply"](length, columns, g["input2"].shape[-1]))


@_register("linalg_lstsq")
def _(g: Arguments) -> Product:
    """Count QR, its Q times the right-hand sides, and a triangular solve; gelsd and gelss use the SVD."""
    batch, m, n = _shape(g["self"])
    _, _, columns = _right_sides(g["self"].mT, g["b"])
    k, long = min(m, n), max(m, n)
    if g["driver"] in ("gelsd", "gelss"):
        return _product(batch, FLOPS["svd"](long, k), 2 * columns * k * (m + n))
    return _product(
        batch, FLOPS["qr"](m, n), FLOPS["householder_apply"](long, columns, k), FLOPS["triangular_solve"](k, columns)
    )


@_register("linalg_pinv")
def _(g: Arguments) -> Product:
    """Return the SVD (of a Hermitian matrix the eigenvectors), and the product of its factors."""
    batch, m, n = _shape(g["self"])
    k, long = min(m, n), max(m, n)
    return _product(batch, FLOPS["eigh"](n) if g["hermitian"] else FLOPS["svd"](long, k), 2 * m * n * k)


@_register("_linalg_eigh")
def _(g: Arguments) -> Product:
    batch, n, _ = _shape(g["A"])
    return _product(batch, FLOPS["eigh" if g["compute_v"] and not g.get("values_only") else "eigvalsh"](n))


@_register("linalg_eig")
def _(g: Arguments) -> Product:
    batch, n, _ = _shape(g["self"])
    return _product(batch, FLOPS["eigvals" if g.get("values_only") else "eig"](n))


@_register("_linalg_svd")
def _(g: Arguments) -> Product:
    batch, m, n = _shape(g["A"])
    name = "svdvals" if g.get("values_only") or not g["compute_uv"] else "svd_full" if g["full_matrices"] else "svd"
    return _product(batch, FLOPS[name](max(m, n), min(m, n)))


# Bader, Blanes and Casas, *Computing the matrix exponential with an optimized Taylor polynomial approximation* (2019):
# products for the degrees 1, 2, 4, 8, 12 and 18, and the norms up to which torch takes each.
_DEGREES = (0, 1, 2, 3, 4, 5)
_NORMS = {
    torch.float32: (1.192092800768788e-07, 5.978858893805233e-04, 5.116619363445086e-02, 5.800524627688768e-01,
                    1.461661507209034e+00, 3.010066362817634e+00),
    torch.float64: (2.220446049250313e-16, 2.580956802971767e-08, 3.397168839976962e-04, 4.991228871115323e-02,
                    2.996158913811580e-01, 1.090863719290036e+00),
}  # fmt: skip


def matrix_exp_products(norm: float, dtype: torch.dtype) -> int:
    """Return the number of n x n products in the exponential of a matrix of this 1-norm: Taylor, then squarings.

    Examples
    --------
    >>> [matrix_exp_products(norm, torch.float64) for norm in (0.0, 1.0, 2.0, 100.0)]
    [0, 5, 6, 12]
    """
    single = dtype in (torch.float32, torch.complex64, torch.float16, torch.bfloat16)
    bounds = _NORMS[torch.float32 if single else torch.float64]
    for products, bound in zip(_DEGREES, bounds, strict=True):
        if norm <= bound:
            return products
    return _DEGREES[-1] + math.ceil(math.log2(norm / bounds[-1]))


@_register("linalg_matrix_exp")
def _(g: Arguments) -> Product:
    """Count by the norms; without finite values (meta) degree 18 without squarings, which is five products."""
    x = g["self"]
    batch, n, _ = _shape(x)
    norms = [math.nan] * batch
    if n and x.device.type != "meta":
        norms = x.detach().abs().sum(-2).amax(-1).reshape(-1).tolist()
    products = [matrix_exp_products(norm, x.dtype) if math.isfinite(norm) else _DEGREES[-1] for norm in norms]
    return Product(sum(products) * n**3, "linalg")


# -- Fourier transforms --------------------------------------------------------------------------------------------


def _transforms(x: Tensor, axes: list[int], real: bool) -> Product:
    n = math.prod(x.shape[axis] for axis in axes)
    batch = x.numel() // n if n else 0
    return Product(0, "fft", other_flops=batch * fft_flops(n, real))


register_product("aten::_fft_c2c")(lambda g, output: _transforms(g["self"], g["dim"], False))
register_product("aten::_fft_r2c")(lambda g, output: _transforms(g["self"], g["dim"], True))
register_product("aten::_fft_c2r")(lambda g, output: _transforms(output, g["dim"], True))
