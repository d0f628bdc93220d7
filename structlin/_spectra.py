"""Functions of matrices by eigendecomposition, with derivatives that are correct for repeated eigenvalues.

For A = V L V^-1 the derivative of f(A) is ``V (D * (V^-1 dA V)) V^-1``, where D holds the divided differences ``(f(l_i)
- f(l_j)) / (l_i - l_j)``; on the diagonal and for repeated eigenvalues it holds f' (Daleckii and Krein 1965; Higham
2008, Functions of Matrices, theorem 3.11). Eigenvectors of repeated eigenvalues have no derivative, so values and
vectors are treated as constants, and :func:`first_order` adds the derivative. Only first derivatives with respect to A
are correct: second derivatives are NaN on jax and raise an error on torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import numpy as np

from structlin._arrays import Array, backend_of, over_same_axes
from structlin._lapack import eps, follows, is_known, known, lapack, nan_unless, not_positive, promoted, seen

Numbers = Callable[[Array], Array]
ROUNDOFF = 32  # times machine epsilon: the error of an entry that moves an eigenvalue as far as LAPACK may
# Times machine epsilon and the largest eigenvalue: the error of a small eigenvalue of a Hermitian matrix. Kernels with
# the condition 1e6 in single precision must stay regular.
HERMITIAN_ROUNDOFF = 6


@dataclass(frozen=True)
class Decomposition:
    """``matrices = vectors diag(values) inverse``, of shapes (..., m, m) and (..., m), without derivatives.

    ``followed``: whether a derivative with respect to ``matrices`` may be needed.
    """

    matrices: Array
    values: Array
    vectors: Array
    inverse: Array
    followed: bool


def decompose(matrices: Array, hermitian: bool) -> Decomposition | None:
    """Return the decomposition; None if the vectors do not reproduce a (defective) matrix, or NaN for traced values."""
    xp = lapack(matrices)
    fixed = xp.stop_gradient(matrices)
    if hermitian:
        values, vectors = xp.eigh(fixed)
        return Decomposition(matrices, values, vectors, xp.conj(vectors).swapaxes(-1, -2), follows(matrices))
    shift, rest = _shifted(fixed)
    values, vectors = xp.eig(rest)
    return reproducing(matrices, values + shift, vectors)


def reproducing(matrices: Array, values: Array, vectors: Array) -> Decomposition | None:
    """Return the decomposition with given eigenvalues and vectors, as :func:`decompose` does."""
    xp = lapack(matrices)
    fixed = xp.stop_gradient(matrices)
    with np.errstate(all="ignore"):
        try:
            inverse = xp.inv(vectors)
        except (np.linalg.LinAlgError, RuntimeError):
            return None
    again = (vectors * values[..., None, :]) @ inverse
    scale = xp.amax(xp.amax(xp.abs(fixed)))[..., None, None]
    scale = xp.where(scale == 0, scale * 0 + 1, scale)
    size = (xp.abs(fixed / scale) ** 2).sum((-2, -1))
    square = (xp.abs((again - fixed) / scale) ** 2).sum((-2, -1)) / xp.where(size == 0, size * 0 + 1, size)
    bound = eps(matrices.dtype) ** 1.2  # of the square
    worst = known(xp.max(square))
    if worst is None:
        values = values + nan_unless(square <= bound, values)[..., None]
    elif not worst <= bound:
        return None
    return Decomposition(matrices, values, vectors, inverse, follows(matrices))


def eigenvalues(matrix: Array) -> Array | None:
    """Return the eigenvalues with the derivatives of the library.

    Those of a defective matrix have no derivative: None, or a derivative of NaN for traced values, if one may be
    needed.
    """
    xp = lapack(matrix)
    if not follows(matrix):
        return xp.eig(matrix)[0]
    if backend_of(matrix) == "torch":
        values, vectors = xp.eig(matrix)
        constant = values.detach(), vectors.detach()
    else:  # jax differentiates eigenvalues that it computes without the eigenvectors
        values = sys.modules["jax"].numpy.linalg.eigvals(matrix)
        constant = xp.eig(xp.stop_gradient(matrix))
    found = reproducing(matrix, *constant)
    if found is None:
        return None
    good = abs(found.values).sum() >= 0  # False for NaN
    if known(good) is not None:
        return values
    if backend_of(matrix) == "jax":  # which computes the eigenvectors only for the derivative
        return values + xp.diagonal(first_order(found, diagonal_matrices(0 * found.values)))
    # The square root of 0 has the derivative NaN here, and the square root of the constant 1 has the derivative 0.
    zero, one = xp.real(matrix - xp.stop_gradient(matrix)).sum(), xp.where(good, 1.0, 0.0)
    return values + (xp.sqrt(xp.where(good, zero * 0 + 1, zero**2)) - one)


def require_positive(values: Array, positive: bool = True) -> Array:
    """Return the eigenvalues of an operator; if it is annotated PSD (``positive``), none may be below zero.

    LinAlgError, or NaN under tracing, if one is below zero by more than roundoff.
    """
    if not positive:
        return values
    fixed = values if isinstance(values, np.ndarray) else seen(values)[0]
    real = fixed.real if lapack(fixed).is_complex(fixed) else fixed
    least, bound = real.min(), -ROUNDOFF * eps(values.dtype) * abs(fixed).max()
    low, limit = known(least), known(bound)
    if low is None or limit is None:
        return values + nan_unless(least >= bound, values)
    if low < limit:
        raise not_positive(f"a matrix with an eigenvalue of {low:.1e}")
    return values


def _shifted(matrices: Array) -> tuple[Array, Array]:
    """Return c, (..., 1), and A - c I; the latter is 0 if it is at roundoff, and c is 0 unless it is close to A."""
    xp = lapack(matrices)
    eye, unit = xp.eye(matrices.shape[-1], matrices), eps(matrices.dtype)
    mean = (xp.diagonal(matrices).sum(-1) / matrices.shape[-1])[..., None]
    rest = matrices - mean[..., None] * eye
    size = _largest(rest)[..., None]
    near = size <= unit**0.5 * xp.abs(mean)
    rest = xp.where((near & (size > ROUNDOFF / 2 * unit * xp.abs(mean)))[..., None], rest, 0 * rest)
    return xp.where(near, mean, 0 * mean), xp.where(near[..., None], rest, matrices)


def uncertainty(found: Decomposition, hermitian: bool) -> Array:
    """Return how far roundoff in the entries of the matrices moves each eigenvalue, to first order.

    It is small for a small eigenvalue of a graded matrix, and large for nearly defective ones.
    """
    xp = lapack(found.vectors)
    error = ROUNDOFF * eps(found.matrices.dtype) * xp.abs(xp.stop_gradient(found.matrices)) + xp.abs(_residual(found))
    radius = (xp.abs(found.inverse) * (error @ xp.abs(found.vectors)).swapaxes(-1, -2)).sum(-1)
    if not hermitian:
        return radius
    bound = hermitian_bound(found)
    return xp.where(radius < bound, radius, bound + 0 * radius)


def hermitian_bound(found: Decomposition) -> Array:
    """Return an upper bound of the uncertainty of the eigenvalues of Hermitian matrices, of shape (..., 1)."""
    size = lapack(found.values).amax(abs(found.values))
    return HERMITIAN_ROUNDOFF * eps(found.matrices.dtype) * size[..., None]


def with_values(found: Decomposition, values: Array, radius: Array) -> Decomposition | None:
    """Return the decomposition with eigenvalues that differ by at most ``radius``, their uncertainty.

    None if this changes the matrices by more than roundoff: then an eigenvalue that now repeats is defective. Also if
    an eigenvalue moves by more than a small part of the radius, which is a bound: then it may well be another number.
    Traced values stay as they are in these cases, and :func:`is_determined` has to decide.
    """
    xp = lapack(values)
    moved = found.values - values
    if known(xp.abs(moved).sum()) == 0:
        return found
    change = (found.vectors * moved[..., None, :]) @ found.inverse
    part = (found.vectors * xp.where(moved == 0, moved, moved * 0 + 1)[..., None, :]) @ found.inverse
    bound = ROUNDOFF * eps(found.matrices.dtype) * _largest(found.matrices) * (xp.abs(part) ** 2).sum((-2, -1))
    good = (_largest(change) <= bound) & (xp.amax(xp.abs(moved) - radius / 8) <= 0)
    if is_known(values):
        return replace(found, values=values) if bool(good.all()) else None
    return replace(found, values=xp.where(good[..., None], values, found.values))


def _largest(matrices: Array) -> Array:
    xp = lapack(matrices)
    return xp.amax(xp.amax(xp.abs(xp.stop_gradient(matrices))))


def is_determined(found: Decomposition, f: Numbers, result: Array, repeated: Array) -> Array:
    """Return whether roundoff in the entries of each matrix changes ``result``, f of it, by little, to first order.

    The change is computed in two random directions (Kenney and Laub 1994, Small-sample statistical condition estimates
    for general matrix functions). ``repeated`` marks eigenvalues at which f has no derivative.
    """
    xp = lapack(found.vectors)
    fixed, result = xp.stop_gradient(found.matrices), xp.stop_gradient(result)
    slopes = divided_differences(f, found.values)
    slopes = xp.where(repeated[..., :, None] & repeated[..., None, :], 0 * found.vectors, slopes)

    def change(error: Array) -> Array:
        return found.vectors @ (slopes * (found.inverse @ error @ found.vectors)) @ found.inverse

    residual = _residual(found)
    floor = roundoff_of(xp.diagonal(slopes), found.values, eps(fixed.dtype))
    first, second = (is_small(change(residual + rounding(fixed, seed)), result, floor) for seed in range(2))
    return first & second


def roundoff_of(slopes: Array, values: Array, unit: float) -> Array:
    """Return the change of f by the roundoff of each eigenvalue: the error of a zero, such as the logarithm of 1."""
    with np.errstate(all="ignore"):
        return ROUNDOFF * unit * lapack(values).amax(abs(slopes * values))


def _residual(found: Decomposition) -> Array:
    return (found.vectors * found.values[..., None, :]) @ found.inverse - lapack(found.vectors).stop_gradient(
        found.matrices
    )


def is_small(change: Array, result: Array, floor: Array | float = 0.0) -> Array:
    """Return whether a change of a result is below a hundredth of its largest entry, or below ``floor``.

    In tests with Jordan blocks, roundoff changed roots that do not exist by more than this. A tenth would accept some
    of them in float32. Ill-conditioned kernels in float32 reach 1e-3.
    """
    size = _largest(change)
    return (size <= 1e-2 * _largest(result)) | (size <= floor)


def rounding(matrices: Array, seed: int = 0) -> Array:
    """Return a random change of each entry by about one roundoff."""
    xp = lapack(matrices)
    factors = xp.astype(xp.index(_normal(matrices.shape[-1], seed), matrices), matrices.dtype)
    return eps(matrices.dtype) * matrices * factors


@lru_cache(maxsize=8)
def _normal(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, n))


def of_matrices(found: Decomposition, f: Numbers) -> Array:
    """Return f of the matrices, V f(L) V^-1."""
    xp = lapack(found.vectors)
    numbers = f(found.values)
    if not found.followed:
        left = found.vectors * numbers[..., None, :]
        return left @ xp.astype(found.inverse, left.dtype)
    middle = diagonal_matrices(numbers) + first_order(found, divided_differences(f, found.values, numbers))
    left = xp.astype(found.vectors, middle.dtype)
    return left @ middle @ xp.astype(found.inverse, middle.dtype)


def diagonal_matrices(numbers: Array) -> Array:
    return numbers[..., None] * lapack(numbers).eye(numbers.shape[-1], numbers)


def divided_differences(f: Numbers, values: Array, numbers: Array | None = None, other: Array | None = None) -> Array:
    """Return ``(f(x_i) - f(y_j)) / (x_i - y_j)`` for x = ``values``, y = ``other`` (default: x), along the last axis.

    If the relative distance of x_i and y_j is below the cube root of the roundoff, the entry is f' at their midpoint,
    which is then at least as accurate as the quotient.
    """
    xp = lapack(values)
    y = values if other is None else other
    first = f(values) if numbers is None else numbers
    second = first if other is None else f(y)
    a, b = values[..., :, None], y[..., None, :]
    difference = a - b
    scale = xp.where(xp.abs(a) > xp.abs(b), xp.abs(a) + 0 * xp.abs(b), 0 * xp.abs(a) + xp.abs(b))
    close = xp.abs(difference) <= eps(values.dtype) ** (1 / 3) * scale
    quotient = (first[..., :, None] - second[..., None, :]) / xp.where(close, difference * 0 + 1, difference)
    middle = xp.where(close, (a + b) / 2, a)  # f' may be infinite between distant values
    return xp.where(close, derivative(f, middle), quotient)


def derivative(f: Numbers, x: Array) -> Array:
    """Return f'(x) elementwise: by automatic differentiation, or by central differences in NumPy."""
    backend = backend_of(x)
    if backend == "numpy":
        h = np.finfo(x.dtype).eps ** (1 / 3) * np.maximum(np.abs(x), np.finfo(x.dtype).tiny ** 0.5)
        with np.errstate(all="ignore"):
            return (f(x + h) - f(x - h)) / (2 * h)
    if backend == "jax":
        import jax

        return jax.jvp(f, (x,), (jax.numpy.ones_like(x),))[1]
    torch: Any = sys.modules["torch"]
    if torch._C._are_functorch_transforms_active():
        return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]
    with torch.enable_grad():
        at = x.detach().clone().requires_grad_(True)
        y = f(at)
        if not y.requires_grad:  # a constant
            return y * 0
        real, imaginary = (y.real, y.imag) if y.is_complex() else (y, None)
        (slope,) = torch.autograd.grad(real.sum(), at, retain_graph=imaginary is not None)
        if imaginary is None:
            return slope.detach()
        if at.is_complex():  # holomorphic: the gradient of the real part is the conjugate of f'
            return slope.conj().resolve_conj().detach()
        (turned,) = torch.autograd.grad(imaginary.sum(), at)
        return torch.complex(slope, turned).detach()


def first_order(found: Decomposition, weights: Array) -> Array:
    """Return zeros whose derivative is ``weights * (V^-1 dA V)``.

    ``weights`` has the shape (..., m, m) of the matrices. For one member of a Kronecker product it has shape
    (p, m, m, q), where p and q are the products of the sizes of the members before and after it. Weights may depend on
    other arrays than A, such as c in f(A + c I): mixed second derivatives, of the gradient with respect to them, are
    correct.
    """
    weights, _ = promoted(weights, found.vectors)  # real weights of Hermitian matrices, and V^-1 dA V is complex
    if backend_of(weights) == "torch":
        return _torch_first_order().apply(found.matrices, found.vectors, found.inverse, weights)
    return _jax_first_order()(found.matrices, found.vectors, found.inverse, weights)


def once_differentiable(x: Array) -> Array:
    """Return x; its second derivative is NaN on jax and under ``torch.func``, and an error elsewhere on torch."""
    if isinstance(x, np.ndarray | np.generic):
        return x
    return _torch_once().apply(x) if backend_of(x) == "torch" else _jax_once()(x)


def _weighted(weights: Array, tangent: Array) -> Array:
    return weights * (tangent[None, :, :, None] if weights.ndim == tangent.ndim + 2 else tangent)


@cache
def _jax_one() -> Any:
    import jax
    import jax.numpy as jnp

    @jax.custom_jvp
    def one(x: Array) -> Array:
        """1; its derivative is NaN."""
        return over_same_axes(jnp.ones((), x.dtype), x)[0]

    @one.defjvp
    def one_jvp(primals: Any, tangents: Any) -> Any:
        (x,), (t,) = primals, tangents
        return one(x), jnp.nan * t.sum()

    return one


@cache
def _jax_once() -> Any:
    import jax

    @jax.custom_jvp
    def once(x: Array) -> Array:
        return x

    @once.defjvp
    def once_jvp(primals: Any, tangents: Any) -> Any:
        (x,), (t,) = primals, tangents
        return once(x), t * _jax_one()(x)

    return once


@cache
def _jax_first_order() -> Any:
    import jax
    import jax.numpy as jnp

    @jax.custom_jvp
    def first(matrices: Array, vectors: Array, inverse: Array, weights: Array) -> Array:
        return over_same_axes(jnp.zeros(weights.shape, weights.dtype), matrices, weights)[0]

    @first.defjvp
    def first_jvp(primals: Any, tangents: Any) -> Any:
        matrices, vectors, inverse, weights = primals
        tangent = inverse @ tangents[0] @ vectors * _jax_one()(matrices)
        mixed = tangents[3] * first(matrices, vectors, inverse, jnp.ones_like(weights))
        return first(*primals), _weighted(weights, tangent) + mixed

    return first


def refuse_second_derivatives(torch: Any) -> bool:
    """Raise RuntimeError if torch records the derivative; return whether ``torch.func`` transforms it."""
    transformed = bool(torch._C._are_functorch_transforms_active())
    if torch.is_grad_enabled() and not transformed:
        raise RuntimeError(
            "functions of matrices have first derivatives only; leave out create_graph=True, or compute the function "
            "from the dense matrix"
        )
    return transformed


@cache
def _torch_one() -> Any:
    torch: Any = sys.modules["torch"]

    class One(torch.autograd.Function):
        """1; its derivative is NaN."""

        generate_vmap_rule = True

        @staticmethod
        def forward(x: Array) -> Array:
            return torch.ones((), dtype=x.dtype, device=x.device)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Array) -> Array:
            return ctx.saved_tensors[0] * float("nan")

        @staticmethod
        def jvp(ctx: Any, tangent: Array) -> Array:
            return tangent.sum() * float("nan")

    return One


@cache
def _torch_once() -> Any:
    torch: Any = sys.modules["torch"]

    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Array) -> Array:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Array) -> Array:
            transformed = refuse_second_derivatives(torch)
            return gradient * _torch_one().apply(*ctx.saved_tensors) if transformed else gradient

        @staticmethod
        def jvp(ctx: Any, tangent: Array) -> Array:
            return tangent * _torch_one().apply(*ctx.saved_tensors)

    return Once


@cache
def _torch_first_order() -> Any:
    torch: Any = sys.modules["torch"]

    class FirstOrder(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(matrices: Array, vectors: Array, inverse: Array, weights: Array) -> Array:
            return torch.zeros_like(weights)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.is_complex = inputs[0].is_complex()
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, gradient: Array) -> tuple[Any, ...]:
            matrices, vectors, inverse, weights = ctx.saved_tensors
            inner, mixed = weights.conj() * gradient, None
            if refuse_second_derivatives(torch):
                inner = inner * _torch_one().apply(matrices)
                if ctx.needs_input_grad[3]:
                    mixed = FirstOrder.apply(matrices, vectors, inverse, torch.ones_like(weights)).conj() * gradient
            if inner.ndim == vectors.ndim + 2:
                inner = inner.sum((0, -1))
            found = inverse.mH.to(inner.dtype) @ inner @ vectors.mH.to(inner.dtype)
            found = found if ctx.is_complex or not found.is_complex() else found.real
            return found, None, None, mixed

        @staticmethod
        def jvp(ctx: Any, tangent: Array, _: Any, __: Any, change: Array) -> Array:
            matrices, vectors, inverse, weights = ctx.saved_tensors
            inner = inverse @ tangent.to(vectors.dtype) @ vectors * _torch_one().apply(matrices)
            mixed = change * FirstOrder.apply(matrices, vectors, inverse, torch.ones_like(weights))
            return _weighted(weights, inner) + mixed

    return FirstOrder
