"""Toeplitz matrices, applied by FFT."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import scipy.linalg
from cola.annotations import PSD
from cola.ops import Product, Sum
from scipy.fft import next_fast_len

from structlin import _spectra as spectra
from structlin._arrays import Array, backend_of, common_backend, ops, over_same_axes, to_backend
from structlin._implicit import Solver, nan_where_bad, solution
from structlin._iterations import bicgstab, conjugate_gradients, iterate
from structlin._lapack import as_tensors, eps, follows, is_known, lapack, needs_grad, require_precision, seen
from structlin.registry import NamedOperator, register
from structlin.structure import AbstractStructure, Factor
from structlin.structures import _levinson as levinson
from structlin.structures._convolution import fft_product, product_flops, real_fft_flops
from structlin.structures._vectors import tied_nearest
from structlin.verdicts import Answer, Determinant, Nearest, Verdict

LEAST = 256
"""Least number of rows at which the recursion for inverse and determinant is faster than LAPACK: 1 ms at 256."""

_PATIENCE = 1000  # steps of each run of the iteration that is the last resort under jax.jit, as of CoLA's
CLOSE = 3
"""Roundoff units of the backward error at which an iteration under jax.jit, in the dtype of b, is accepted."""
_LARGEST_DENSE = 8192  # largest number of rows for which a derivative may fall back to the dense matrix


@dataclass(frozen=True)
class ToeplitzStructure(AbstractStructure):
    """Structure of a (d_out, d_in) Toeplitz matrix, applied as part of a circulant matrix of size ``fft_size``.

    ``fft_size`` is the first length from d_out + d_in - 1 on with small prime factors. Counts hold for real data.
    """

    d_out: int
    d_in: int
    factors: tuple[Factor, ...] = field(init=False, compare=False, repr=False)
    fft_size: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        kernel = Factor("kernel", (self.d_out + self.d_in - 1,), fan_in=self.d_in, fan_out=self.d_out)
        object.__setattr__(self, "factors", (kernel,))
        # Not a property: torch.compile cannot trace into SciPy.
        object.__setattr__(self, "fft_size", next_fast_len(self.d_out + self.d_in - 1))

    @property
    def macs(self) -> int:
        """0: FFTs are counted in ``other_flops``."""
        return 0

    @property
    def other_flops(self) -> dict[str, int]:
        """FLOPs of two real FFTs and an elementwise product."""
        return product_flops(self.fft_size)

    @property
    def setup_flops(self) -> dict[str, int]:
        """FLOPs of the transform of the kernel."""
        return {"fft": real_fft_flops(self.fft_size)}

    def transpose(self) -> ToeplitzStructure:
        """Exchange the numbers of rows and columns."""
        return ToeplitzStructure(self.d_in, self.d_out)

    def transpose_factors(self, factors: Sequence[Array]) -> tuple[Array, ...]:
        """Reverse the kernel."""
        return (ops(backend_of(factors[0])).flip(factors[0]),)

    def _rows(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        y = fft_product(factors[0], x, self.fft_size, -1, xp)
        return y[:, self.d_in - 1 : self.d_in - 1 + self.d_out]

    def _columns(self, factors: Sequence[Array], x: Array, xp: SimpleNamespace) -> Array:
        y = fft_product(factors[0], x, self.fft_size, 0, xp)
        return y[self.d_in - 1 : self.d_in - 1 + self.d_out]

    # -- algebra: structlin.structures._levinson

    def inverse(self, A: Any) -> Answer[Any] | None:
        """Return the inverse by the formula of Gohberg and Semencul, from its first and last column."""
        found = columns(A)
        if found is None:
            return None
        kernel = A.factors[0]
        if needs_grad(kernel):
            ends = np.zeros((self.d_in, 2))
            ends[0, 0] = ends[-1, 1] = 1
            both = solution(A, to_backend(ends, "torch", kernel.dtype), _solver(kernel, found))
            return Answer(inverse_from(both[:, 0], both[:, 1]), Verdict.NOT_VERIFIED)
        made = inverse_from(_like(found.first, kernel), _like(found.last, kernel))
        return Answer(made, Verdict.NOT_VERIFIED)

    def solve(self, A: Any, b: Array) -> Answer[Array] | None:
        """Solve by a recursion or an iteration with a check of the residual, on the CPU or under ``jax.jit``."""
        kernel = A.factors[0]
        require_precision(kernel, "solving")
        n = self.d_in
        if n < levinson.LEAST:
            return None
        if backend_of(b) == "jax" and not (is_known(kernel) and is_known(b)):
            return Answer(_traced_solution(kernel, b)) if n >= LEAST else None
        numbers, right = _numbers(kernel), _numbers(b)
        if numbers is None or right is None:
            return None
        x = levinson.solve(numbers, right if right.ndim == 2 else right[:, None])
        if x is None:
            return None
        if follows(kernel) or follows(b):
            return Answer(solution(A, b, _solver(kernel)))
        return Answer(_like(x.reshape(right.shape), b))

    def slogdet(self, A: Any) -> Answer[Determinant] | None:
        """Multiply the pivots of Levinson's recursion."""
        found = columns(A)
        if found is None:
            return None
        kernel = A.factors[0]
        if needs_grad(kernel):
            return Answer(Determinant(*_determinant_function().apply(found, kernel)))
        sign, log = _determinant(found)
        return Answer(Determinant(_like(sign, kernel), _like(log, lapack(kernel).real(kernel))))

    def diagonal(self, A: Any, k: int) -> Answer[Array]:
        """Repeat the entry of the k-th diagonal."""
        kernel = A.factors[0]
        count = min(self.d_out + min(k, 0), self.d_in - max(k, 0))
        return Answer(kernel[self.d_in - 1 - k] + lapack(kernel).zeros((count,), kernel))

    def frobenius_norm(self, A: Any) -> Answer[Array]:
        """Return the norm of the kernel, weighted by how often each entry occurs."""
        kernel = A.factors[0]
        weights = lapack(kernel).index(np.sqrt(_repeats(self)), kernel)
        return Answer(lapack(kernel).norm(kernel * A.xnp.cast(weights, kernel.dtype)))

    def sum(self, A: Any, B: Any) -> Answer[Any] | None:
        """Add the kernels of two Toeplitz matrices."""
        if isinstance(B.structure, ToeplitzStructure):
            return Answer(Toeplitz.from_kernel(A.factors[0] + B.factors[0], self.d_out))
        return None

    def shifted(self, A: Any, value: Any) -> Answer[Any] | None:
        """Add a number to the entry of the main diagonal."""
        if getattr(value, "ndim", 0):
            return None
        kernel = A.factors[0]
        unit = lapack(kernel).index(np.arange(kernel.shape[0]) == self.d_in - 1, kernel)
        return Answer(Toeplitz.from_kernel(kernel + value * unit, self.d_out))

    def nearest(self, target: np.ndarray, covariance: np.ndarray | None) -> Nearest:
        """Average the entries of each diagonal; with a covariance, solve least squares."""
        index = np.arange(self.d_out)[:, None] - np.arange(self.d_in) + self.d_in - 1
        return tied_nearest(index, self.factors[0].numel, target, covariance)

    def dense(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the matrix with entries ``kernel[i - j + d_in - 1]``."""
        return factors[0][np.arange(self.d_out)[:, None] - np.arange(self.d_in) + self.d_in - 1]


@lru_cache(maxsize=1024)
def _structure(d_out: int, d_in: int) -> ToeplitzStructure:
    return ToeplitzStructure(d_out, d_in)


def _repeats(structure: ToeplitzStructure) -> np.ndarray:
    """Return how many entries of the matrix each entry of the kernel gives."""
    i = np.arange(structure.d_out + structure.d_in - 1)
    return np.minimum(np.minimum(i + 1, i[::-1] + 1), min(structure.d_out, structure.d_in))


@register("toeplitz")
class Toeplitz(NamedOperator):
    r"""Toeplitz matrix: constant along each diagonal, applied by FFT.

    .. math:: A_{ij} = \mathrm{kernel}_{i - j}

    The factor is an array of :math:`d_\text{out} + d_\text{in} - 1` parameters. It holds
    :math:`\mathrm{kernel}_{i - j}` at position :math:`i - j + d_\text{in} - 1`, so the upper right corner comes first.

    ``Toeplitz(column, row)`` takes the first column, of shape (d_out,), and the first row, of shape (d_in,). As in
    :func:`scipy.linalg.toeplitz`, the first entry of the row is ignored, and without a row the matrix is Hermitian.

    A product with a real vector costs two real FFTs of length N and an elementwise product. N is the first length from
    :math:`d_\text{out} + d_\text{in} - 1` on with small prime factors. The FFT of the kernel is computed once for each
    call. Initialisation and learning rates are those of a dense matrix, since each output is a sum over
    :math:`d_\text{in}` inputs.

    Parameters
    ----------
    column
        First column, of shape (d_out,).
    row
        First row, of shape (d_in,); the first entry is ignored. Default: the conjugate of the column.

    Examples
    --------
    >>> import numpy as np
    >>> Toeplitz(np.array([1.0, 4.0]), np.array([1.0, 2.0, 3.0])).to_dense().round()
    array([[1., 2., 3.],
           [4., 1., 2.]])
    """

    formula = "y_i = sum_j kernel_(i - j) x_j"
    parameters = "d_out + d_in - 1"
    source = "Gray (2006), Toeplitz and Circulant Matrices: A Review"
    examples = (((5, 7), {}), ((7, 4), {}), ((1, 3), {}))

    def __init__(self, column: Array, row: Array | None = None) -> None:
        xp = ops(backend_of(column) if row is None else common_backend((column, row)))
        row = xp.conj(column) if row is None else row
        if column.ndim != 1 or row.ndim != 1 or 0 in (column.shape[0], row.shape[0]):
            raise ValueError(
                f"Toeplitz takes a first column (d_out,) and a first row (d_in,) with one entry or more each, "
                f"got shapes {tuple(column.shape)} and {tuple(row.shape)}"
            )
        structure = _structure(column.shape[0], row.shape[0])
        super(NamedOperator, self).__init__(structure, (xp.concat([xp.flip(row[1:]), column]),))

    @classmethod
    def from_kernel(cls, kernel: Array, d_out: int) -> Self:
        """Return the matrix with entries ``kernel[i - j + d_in - 1]``.

        Parameters
        ----------
        kernel
            Entries of all diagonals, from the upper right corner to the lower left: shape (d_out + d_in - 1,).
        d_out
            Number of rows. The number of columns follows from the length of the kernel.

        Returns
        -------
        Toeplitz
            An operator that shares the memory of ``kernel``.

        Raises
        ------
        ValueError
            If ``kernel`` is not a vector or has fewer than ``d_out`` entries.

        Examples
        --------
        >>> import numpy as np
        >>> Toeplitz.from_kernel(np.array([3.0, 2.0, 1.0, 4.0]), d_out=2).to_dense().round()
        array([[1., 2., 3.],
               [4., 1., 2.]])
        """
        if kernel.ndim != 1 or not 1 <= d_out <= kernel.shape[0]:
            raise ValueError(
                f"kernel must be a vector of at least d_out = {d_out} >= 1 entries, got shape {tuple(kernel.shape)}"
            )
        structure = _structure(d_out, kernel.shape[0] - d_out + 1)
        structure.check((kernel,))
        return cls._build(structure, (kernel,))

    @staticmethod
    def design(shape: tuple[int, int], /) -> ToeplitzStructure:
        """Return the structure of a (d_out, d_in) Toeplitz matrix. There are no options.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.

        Returns
        -------
        AbstractStructure
            The structure, without arrays.
        """
        return ToeplitzStructure(*shape)


# -- the inverse -------------------------------------------------------------------------------------------------------


def inverse_from(first: Array, last: Array) -> Any:
    """Return the inverse from its first and last column, as an operator: the formula of Gohberg and Semencul."""
    xp = ops(backend_of(first))
    none = first[1:] * 0
    scaled, zero = first / first[0], first[:1] * 0
    from_kernel, n = Toeplitz.from_kernel, first.shape[0]
    left = Product(from_kernel(xp.concat([none, scaled]), n), from_kernel(xp.concat([last, none]), n))
    shifted = xp.concat([zero, last[:-1] / -first[0]])
    right = Product(from_kernel(xp.concat([none, shifted]), n), from_kernel(xp.concat([first[1:], zero, none]), n))
    return Sum(left, right)


def columns(A: Any) -> levinson.Columns | None:
    """Return the first and last column of the inverse.

    Return None if the matrix has too few or too many rows, if its values are not available on the CPU (a GPU, a
    transformation), or if the result is not accurate.
    """
    kernel = A.factors[0]
    require_precision(kernel, "an inverse")
    n = A.shape[0]
    numbers = _numbers(kernel) if LEAST <= n <= levinson.LONGEST else None
    found = None if numbers is None else levinson.recursion(numbers)
    if numbers is None or found is None:
        return None
    spectra.require_positive(found.pivots, A.isa(PSD))  # ratios of leading determinants
    probe = np.random.default_rng(0).standard_normal((n, 1))
    return None if levinson.solve(numbers, probe, found) is None else found


def _solver(kernel: Array, found: levinson.Columns | None = None) -> Solver:
    """Return a solver for the values of a kernel; it uses the dense matrix where the recursion is not accurate."""
    numbers = _double(kernel)

    def using(kernel: np.ndarray, found: levinson.Columns | None) -> Any:
        def solve(b: Array) -> Array:
            right = _double(b)
            wide = right if right.ndim == 2 else right[:, None]
            x = levinson.solve(kernel, wide, found)
            n = len(right)
            if x is None and n > _LARGEST_DENSE:
                raise np.linalg.LinAlgError(
                    f"a Toeplitz matrix of {n} rows is too ill-conditioned for the fast recursion, and too large for "
                    f"the dense solution (at most {_LARGEST_DENSE} rows)"
                )
            if x is None:
                x = np.linalg.solve(scipy.linalg.toeplitz(kernel[n - 1 :], kernel[:n][::-1]), wide)
            return _like(x.reshape(right.shape), b)

        return solve

    return Solver(using(numbers, found), using(numbers[::-1].conj(), None if found is None else found.adjoint()))


def _determinant(found: levinson.Columns) -> tuple[np.ndarray, np.ndarray]:
    size = np.abs(found.pivots)
    return np.prod(found.pivots / size).reshape(()), np.log(size).sum().reshape(())


def _numbers(x: Array) -> np.ndarray | None:
    """Return the values in double precision; None if NumPy cannot read them without a copy between devices."""
    if isinstance(x, np.ndarray):
        return _double(x)
    if backend_of(x) == "jax" and not (is_known(x) and next(iter(x.devices())).platform == "cpu"):
        return None
    (x,) = seen(x)
    return None if backend_of(x) == "torch" else _double(x)


def _double(x: Array) -> np.ndarray:
    x = np.asarray(x.detach() if hasattr(x, "detach") else x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64, copy=False)


def _like(x: np.ndarray, example: Array) -> Array:
    """Return a new NumPy array as an array of the library and dtype of the example; torch shares its memory."""
    if backend_of(example) == "torch":
        return as_tensors(x)[0].to(example.dtype)
    if isinstance(example, np.ndarray):
        return np.asarray(x, dtype=example.dtype)
    return to_backend(np.array(x), backend_of(example), example.dtype)


# -- transformations of jax --------------------------------------------------------------------------------------------


def _traced_solution(kernel: Array, b: Array) -> Array:
    """Return the solution under transformations of jax; its derivatives are those of the linear system.

    The methods are tried in the order of :func:`structlin.structures._levinson.solve`, until one reaches a backward
    error at roundoff. Then follows the dense matrix, or, if that is too large, a longer iteration, with NaN in the
    columns whose relative residual exceeds the square root of the roundoff.
    """
    import jax.numpy as jnp
    from jax import lax

    n, tolerance = b.shape[0], levinson.SLACK * eps(b.dtype)
    norm = partial(jnp.linalg.norm, axis=0)

    def multiply(kernel: Array, x: Array) -> Array:
        return Toeplitz.from_kernel(kernel, n) @ x

    def growth(kernel: Array, x: Array) -> Array:
        return jnp.abs(kernel).sum() * norm(x)

    def largest(b: Array) -> Array:  # of the growth; beyond, roundoff of a singular matrix makes x
        return norm(b) * (0.1 / eps(b.dtype))

    def dense(kernel: Array, b: Array) -> Array:
        rows = jnp.arange(n)
        x = jnp.linalg.solve(kernel[rows[:, None] - rows + n - 1], b)
        return nan_where_bad(x, growth(kernel, x), largest(b))

    def is_good(kernel: Array, x: Array, b: Array, tolerance: float) -> Array:
        size, residual = growth(kernel, x), norm(b - multiply(kernel, x))
        return jnp.all((residual <= tolerance * (size + norm(b))) & (size <= largest(b)))

    def patient(kernel: Array, b: Array) -> Array:
        x = _traced_iteration(kernel, b, _PATIENCE)
        return nan_where_bad(x, norm(b - multiply(kernel, x)), eps(b.dtype) ** 0.5 * norm(b))

    last = dense if n <= _LARGEST_DENSE else patient

    def recursive(kernel: Array, b: Array) -> Array:
        first, end, regular = _traced_recursion(kernel)
        inverse = inverse_from(first, end)
        x = inverse @ b
        x = x + inverse @ (b - multiply(kernel, x))
        return lax.cond(regular & is_good(kernel, x, b, tolerance), lambda: x, lambda: last(kernel, b))

    then = recursive if n <= levinson.LONGEST else last

    def iterative(kernel: Array, b: Array) -> Array:
        x = _traced_iteration(kernel, b, levinson.most_iterations(n))
        return lax.cond(is_good(kernel, x, b, CLOSE * eps(b.dtype)), lambda: x, lambda: then(kernel, b))

    fast = iterative if n >= levinson.ITERATED else recursive
    elsewhere = dense if n <= _LARGEST_DENSE else fast

    def solve(kernel: Array) -> Any:
        return lambda _, b: lax.platform_dependent(kernel, b, cpu=fast, default=elsewhere)

    return lax.custom_linear_solve(partial(multiply, kernel), b, solve(kernel), solve(kernel[::-1]))


def _traced_iteration(kernel: Array, b: Array, limit: int) -> Array:
    """Return the result of the preconditioned iteration of :mod:`structlin.structures._levinson`, not yet checked."""
    import jax.numpy as jnp
    from jax import lax

    kernel, b = kernel.astype(jnp.result_type(kernel, b)), b.astype(jnp.result_type(kernel, b))
    n, wide = b.shape[0], b.reshape((b.shape[0], -1))
    A = levinson.Convolution(kernel, n)
    values, precondition = levinson.circulant_preconditioner(kernel)
    norm, size = partial(jnp.linalg.norm, axis=0), jnp.abs(kernel).sum()

    def run(start: Any, r: Array) -> Array:
        (state, step), target = start(A, precondition, r), eps(b.dtype) ** 0.5 * norm(r)
        return iterate(step, lambda state: (norm(state[1]) > target).any(), state, limit, True)[0]

    positive = jnp.all(kernel == kernel[::-1].conj()) & jnp.all(values.real > 0)

    def unfinished(state: Any) -> Array:
        x, r = state[:2]
        return (norm(r) > 10 * eps(b.dtype) * (size * norm(x) + norm(wide))).any()

    def corrected(state: Any) -> Any:
        x, r = state
        x = x + lax.cond(positive, partial(run, conjugate_gradients), partial(run, bicgstab), r)
        return x, wide - A(x)

    return iterate(corrected, unfinished, (wide * 0, wide), levinson.RESTARTS, True)[0].reshape(b.shape)


def _traced_recursion(kernel: Array) -> tuple[Array, Array, Array]:
    """Return the first and last column of the inverse, and whether the recursion succeeded (see ``recursion``)."""
    import jax.numpy as jnp
    from jax import lax

    n = (kernel.shape[0] + 1) // 2
    descending, zeros = kernel[::-1], jnp.zeros(n, kernel.dtype)
    smallest = eps(kernel.dtype) ** 0.25 * jnp.abs(kernel).max()

    def extend(m: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        first, last, pivot, least = state
        below = lax.dynamic_slice(descending, (n - 1 - m,), (n,)) @ first / pivot
        above = lax.dynamic_slice(descending, (m,), (n,)) @ last / pivot
        forward = lax.dynamic_slice(jnp.concatenate([last, zeros]), (n - 1 - m,), (n,))
        backward = lax.dynamic_slice(jnp.concatenate([zeros, first]), (m + 1,), (n,))
        pivot = pivot * (1 - below * above)
        return first - below * forward, last - above * backward, pivot, jnp.minimum(least, jnp.abs(pivot))

    pivot = kernel[n - 1]
    state = over_same_axes(zeros.at[0].set(1), zeros.at[-1].set(1), pivot, jnp.abs(pivot))
    first, last, pivot, least = lax.fori_loop(1, n, extend, state)
    return first / pivot, last / pivot, least > smallest


# -- the gradient of the determinant on torch --------------------------------------------------------------------------


@cache
def _determinant_function() -> Any:
    torch: Any = sys.modules["torch"]

    class LogDeterminant(torch.autograd.Function):
        """The gradient, d log det A = tr(A^-1 dA), consists of the sums of the diagonals of the inverse."""

        @staticmethod
        def forward(ctx: Any, found: levinson.Columns, kernel: Array) -> tuple[Array, Array]:
            sign, log = _determinant(found)
            made = _like(sign, kernel)
            ctx.found = found
            ctx.save_for_backward(kernel, made)
            return made, _like(log, lapack(kernel).real(kernel))

        @staticmethod
        def backward(ctx: Any, of_sign: Array, of_log: Array) -> tuple[Any, ...]:
            kernel, sign = ctx.saved_tensors
            n = (kernel.shape[0] + 1) // 2
            ends = torch.zeros((n, 2), dtype=kernel.dtype)
            ends[0, 0] = ends[-1, 1] = 1
            both = solution(Toeplitz.from_kernel(kernel, n), ends, _solver(kernel, ctx.found))
            sums = _sums_of_inverse(both[:, 0], both[:, 1]).flip(0).conj()
            if kernel.is_complex():
                turned = 1j * (of_sign.conj() * 1j * sign).real
                return None, (of_log + turned) * sums
            return None, of_log * sums

    return LogDeterminant


def _diagonal_sums(x: Array, y: Array) -> Array:
    """Return the sums of the diagonals of x y^T for each pair of columns x, y.

    Entry n - 1 + d is the sum of x_i y_j over i - j = d.
    """
    torch: Any = sys.modules["torch"]
    n, fft = x.shape[0], torch.fft
    forth, back = (fft.fft, fft.ifft) if x.is_complex() else (fft.rfft, fft.irfft)
    return back(forth(x, 2 * n, 0) * forth(y.flip(0), 2 * n, 0), 2 * n, 0)[: 2 * n - 1]


def _sums_of_inverse(first: Array, last: Array) -> Array:
    """Return the sums of the diagonals of the inverse, ordered as a kernel.

    The product of a lower triangular Toeplitz matrix with first column x and an upper triangular one with first row y
    has the sums of (n - max(i, j)) x_i y_j over i - j = d.
    """
    torch: Any = sys.modules["torch"]
    n = first.shape[0]
    zero = first[:1] * 0
    lower = torch.stack([first, torch.cat([zero, -last[:-1]])], 1)
    upper = torch.stack([last.flip(0), torch.cat([zero, first.flip(0)[:-1]])], 1)
    weights = torch.arange(n, 0, -1, dtype=first.real.dtype)[:, None]
    below, above = _diagonal_sums(lower * weights, upper), _diagonal_sums(lower, upper * weights)
    return torch.cat([above[: n - 1], below[n - 1 :]]).sum(1) / first[0]
