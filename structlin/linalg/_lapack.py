"""Dense linear algebra of NumPy, torch and jax under common names, batched over leading axes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import opt_einsum

from structlin._arrays import Array, backend_of, dtype_name, ops, to_backend


def lapack(x: Array) -> SimpleNamespace:
    """The functions for the library that ``x``, an array or a NumPy scalar, belongs to."""
    return _functions("numpy" if isinstance(x, np.generic) else backend_of(x))


@cache
def _functions(backend: str) -> SimpleNamespace:
    made = {"numpy": _numpy, "torch": _torch, "jax": _jax}[backend]()
    return SimpleNamespace(**{**vars(ops(backend)), **vars(made)})


def _numpy() -> SimpleNamespace:
    import scipy.linalg

    def eig(a: Array) -> tuple[Array, Array]:
        values, vectors = np.linalg.eig(a)
        wide = np.result_type(a.dtype, np.complex64)
        return values.astype(wide), vectors.astype(wide)

    def cholesky_solve(a: Array, b: Array) -> Array:
        return np.linalg.solve(a, b)  # NumPy solves triangular systems by LU, SciPy one at a time

    def positive_slogdet(a: Array) -> tuple[Array, Array]:
        sign, log = np.linalg.slogdet(a)
        return np.prod(sign), np.sum(log)

    return SimpleNamespace(
        cholesky_solve=cholesky_solve,
        positive_slogdet=positive_slogdet,
        gram=lambda a: np.conj(a).T @ a if np.iscomplexobj(a) else a.T @ a,
        inv=np.linalg.inv,
        solve=np.linalg.solve,
        slogdet=np.linalg.slogdet,
        eig=eig,
        eigh=np.linalg.eigh,
        svd=lambda a: np.linalg.svd(a, full_matrices=False),
        singular_values=lambda a: np.linalg.svd(a, compute_uv=False),
        qr=np.linalg.qr,
        pinv=lambda a, rtol: np.linalg.pinv(a, rcond=rtol),
        expm=lambda a: np.asarray(scipy.linalg.expm(a), dtype=a.dtype),
        matrix_power=np.linalg.matrix_power,
        diagonal=lambda a, k=0: np.diagonal(a, k, -2, -1),
        eye=lambda n, like: np.eye(n, dtype=like.dtype),
        zeros=lambda shape, like: np.zeros(shape, dtype=like.dtype),
        index=lambda i, like: np.asarray(i),
        where=np.where,
        abs=np.abs,
        sign=np.sign,
        sqrt=np.sqrt,
        exp=np.exp,
        log=np.log,
        real=np.real,
        norm=lambda x: np.sqrt(np.sum(np.abs(x) ** 2)),
        max=np.max,
        amax=lambda x: np.max(x, -1),
        prod=np.prod,
        concat_axis=lambda xs, axis: np.concatenate(xs, axis),
        to_complex=lambda x: x.astype(np.result_type(x.dtype, np.complex64)),
        stop_gradient=lambda x: x,
    )


def _torch() -> SimpleNamespace:
    import torch

    def eig(a: Array) -> tuple[Array, Array]:
        values, vectors = torch.linalg.eig(a)
        return values, vectors

    def cholesky_solve(a: Array, b: Array) -> Array:
        lower = torch.linalg.cholesky(a)
        half = torch.linalg.solve_triangular(lower, b, upper=False)
        return torch.linalg.solve_triangular(lower.mH, half, upper=True)

    def positive_slogdet(a: Array) -> tuple[Array, Array]:
        """By Cholesky, half the work of LU, which takes over for what is not positive to roundoff."""
        if a.device.type == "cpu":
            lower, failed = torch.linalg.cholesky_ex(a)
            if known(failed.amax()) == 0:
                diagonal = lower.diagonal(0, -2, -1)
                log = 2 * (diagonal.real if a.is_complex() else diagonal).log().sum()
                return torch.ones((), dtype=a.dtype), log
        sign, log = torch.linalg.slogdet(a)
        return sign.prod(), log.sum()

    def gram(a: Array) -> Array:
        if a.is_complex() or not is_plain(a):
            return a.mH @ a
        x: Any = np.from_dlpack(a)
        return torch.from_numpy(x.T @ x)  # by syrk: half of the work, which torch does not save

    return SimpleNamespace(
        cholesky_solve=cholesky_solve,
        positive_slogdet=positive_slogdet,
        gram=gram,
        inv=torch.linalg.inv,
        solve=torch.linalg.solve,
        slogdet=torch.linalg.slogdet,
        eig=eig,
        eigh=torch.linalg.eigh,
        svd=lambda a: torch.linalg.svd(a, full_matrices=False),
        singular_values=torch.linalg.svdvals,
        qr=torch.linalg.qr,
        pinv=lambda a, rtol: torch.linalg.pinv(a, rtol=rtol),
        expm=torch.linalg.matrix_exp,
        matrix_power=torch.linalg.matrix_power,
        diagonal=lambda a, k=0: torch.diagonal(a, k, -2, -1),
        eye=lambda n, like: torch.eye(n, dtype=like.dtype, device=like.device),
        zeros=lambda shape, like: torch.zeros(shape, dtype=like.dtype, device=like.device),
        index=lambda i, like: torch.as_tensor(np.ascontiguousarray(i), device=like.device),
        where=torch.where,
        abs=torch.abs,
        sign=torch.sign,
        sqrt=torch.sqrt,
        exp=torch.exp,
        log=torch.log,
        real=lambda x: x.real if x.is_complex() else x,
        norm=torch.linalg.vector_norm,
        max=torch.max,
        amax=lambda x: torch.amax(x, -1),
        prod=torch.prod,
        concat_axis=lambda xs, axis: torch.cat(tuple(xs), axis),
        to_complex=lambda x: x.to(torch.promote_types(x.dtype, torch.complex64)),
        stop_gradient=lambda x: x.detach(),
    )


def _jax() -> SimpleNamespace:
    import jax
    import jax.numpy as jnp
    import jax.scipy.linalg

    def expm(a: Array) -> Array:
        if a.ndim == 2:
            return jax.scipy.linalg.expm(a)
        return jax.vmap(jax.scipy.linalg.expm)(a)

    def cholesky_solve(a: Array, b: Array) -> Array:
        lower = jnp.linalg.cholesky(a)
        half = jax.lax.linalg.triangular_solve(lower, b, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(
            lower, half, left_side=True, lower=True, transpose_a=True, conjugate_a=True
        )

    def positive_slogdet(a: Array) -> tuple[Array, Array]:
        sign, log = jnp.linalg.slogdet(a)
        return jnp.prod(sign), jnp.sum(log)

    return SimpleNamespace(
        cholesky_solve=cholesky_solve,
        positive_slogdet=positive_slogdet,
        gram=lambda a: jnp.conj(a).T @ a,
        inv=jnp.linalg.inv,
        solve=jnp.linalg.solve,
        slogdet=jnp.linalg.slogdet,
        eig=jnp.linalg.eig,
        eigh=jnp.linalg.eigh,
        svd=lambda a: jnp.linalg.svd(a, full_matrices=False),
        singular_values=lambda a: jnp.linalg.svd(a, compute_uv=False),
        qr=jnp.linalg.qr,
        pinv=lambda a, rtol: jnp.linalg.pinv(a, rtol=rtol),
        expm=expm,
        matrix_power=jnp.linalg.matrix_power,
        diagonal=lambda a, k=0: jnp.diagonal(a, k, -2, -1),
        eye=lambda n, like: jnp.eye(n, dtype=like.dtype),
        zeros=lambda shape, like: jnp.zeros(shape, dtype=like.dtype),
        index=lambda i, like: jnp.asarray(i),
        where=jnp.where,
        abs=jnp.abs,
        sign=jnp.sign,
        sqrt=jnp.sqrt,
        exp=jnp.exp,
        log=jnp.log,
        real=jnp.real,
        norm=lambda x: jnp.sqrt(jnp.sum(jnp.abs(x) ** 2)),
        max=jnp.max,
        amax=lambda x: jnp.max(x, -1),
        prod=jnp.prod,
        concat_axis=lambda xs, axis: jnp.concatenate(xs, axis),
        to_complex=lambda x: x.astype(jnp.promote_types(x.dtype, jnp.complex64)),
        stop_gradient=jax.lax.stop_gradient,
    )


def subscripts(terms: Sequence[Sequence[int]], output: Sequence[int]) -> str:
    """The einsum of terms whose axes are integers; one may stand twice in a term (its diagonal)."""

    def word(axes: Sequence[int]) -> str:
        return "".join(map(opt_einsum.get_symbol, axes))

    return f"{','.join(map(word, terms))}->{word(output)}"


def einsum(operands: Sequence[Array], terms: Sequence[Sequence[int]], output: Sequence[int]) -> Array:
    """Contract arrays along the axes named in ``terms``, in the cheapest order found."""
    return opt_einsum.contract(subscripts(terms, output), *operands)


def as_array(x: Any, example: Array) -> Array:
    """``x``, a number or an array (of another library too), as an array like ``example``; keeps gradients.

    CoLA's scalars may be arrays of jax where everything else is NumPy's.
    """
    backend = backend_of(example)
    if backend == "torch":
        import torch

        return torch.as_tensor(x, dtype=example.dtype, device=example.device)
    if backend == "jax":
        import jax.numpy as jnp

        return jnp.asarray(x, dtype=example.dtype)
    return np.asarray(x, dtype=example.dtype)


def in_library(x: Any, example: Array) -> Any:
    """``x``, a number or an array, unchanged but in the library of ``example``."""
    if not hasattr(x, "dtype") or isinstance(x, np.generic) or isinstance(example, np.generic):
        return x
    return x if backend_of(x) == backend_of(example) else to_backend(np.asarray(x), backend_of(example))


def inverse_of(matrices: Array) -> Array:
    """Inverses of a stack of square matrices, checked: a matrix that is singular to working precision raises
    LinAlgError (a ValueError), or gives NaN while values are traced."""
    xp = lapack(matrices)
    require_precision(matrices, "an inverse")
    with refusing_singular(matrices):
        inverses = xp.inv(matrices)
    condition = _column_norms(xp, xp.stop_gradient(matrices)) * _column_norms(xp, xp.stop_gradient(inverses))
    bound = 1 / eps(matrices.dtype)
    worst = known(condition.max())
    if worst is None:
        return inverses + nan_unless(condition < bound, inverses)[..., None, None]
    if not worst < bound:
        raise singular_to_roundoff(f"a block of size {matrices.shape[-1]} with condition number {worst:.1e}")
    return inverses


def nan_unless(good: Array, like: Array) -> Array:
    """0 where ``good``, else NaN, to be added: no gradient passes through, as it would through ``where``."""
    xp = lapack(like)
    zeros = xp.zeros(tuple(good.shape), like)
    return xp.where(good, zeros, zeros + float("nan"))


def _column_norms(xp: SimpleNamespace, matrices: Array) -> Array:
    """The 1-norm of each matrix, the largest sum of absolute values in a column."""
    return xp.amax(xp.abs(matrices).sum(-2))


@contextmanager
def refusing_singular(matrices: Array) -> Iterator[None]:
    """One exception with one message for what NumPy and torch raise at a pivot of zero; jax gives no finite numbers."""
    try:
        yield
    except (np.linalg.LinAlgError, RuntimeError) as error:
        if "ingular" not in str(error):
            raise
        raise singular_to_roundoff(f"a block of size {matrices.shape[-1]}") from None


def singular_to_roundoff(what: str) -> np.linalg.LinAlgError:
    return np.linalg.LinAlgError(f"{what} is singular to working precision; use cola.pinv, or add to the diagonal")


def eps(dtype: Any) -> float:
    """Distance from 1 to the next larger number of a floating or complex dtype of any library."""
    name = dtype_name(dtype)
    if name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(np.dtype(name)).eps)


def require_precision(x: Array, what: str) -> None:
    """LAPACK knows no half precision: ValueError before a library fails with a message of its own."""
    if dtype_name(x.dtype) in ("float16", "bfloat16"):
        raise ValueError(f"{what} needs float32, float64 or complex numbers, got {x.dtype}; use A.to(dtype=...)")


def known(x: Any) -> float | None:
    """The value of a real scalar; None while it is traced by jax, torch.func or on torch's meta device."""
    try:
        return float(x.detach() if hasattr(x, "detach") else x)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def is_plain(x: Array) -> bool:
    """Whether NumPy may compute with the memory of ``x``, a tensor of torch: nothing follows what happens to it."""
    torch: Any = sys.modules["torch"]
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


def is_transpose(x: Array, y: Array) -> bool:
    """Whether the matrix ``x`` is known to be ``y^T``, and real: a view of the same numbers. Never on jax."""
    if x.shape != y.shape[::-1] or lapack(x).is_complex(x):
        return False
    if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
        same = x.__array_interface__["data"] == y.__array_interface__["data"]
        return same and x.dtype == y.dtype and x.strides == y.strides[::-1]
    if backend_of(x) != "torch" or not (is_plain(x.detach()) and is_plain(y.detach())):
        return False
    return bool(x.dtype == y.dtype and x.data_ptr() == y.data_ptr() and x.stride() == y.stride()[::-1])


def is_known(x: Array) -> bool:
    """Whether the numbers of ``x`` can be looked at."""
    backend = backend_of(x)
    if backend == "numpy":
        return True
    if backend == "jax":
        jax: Any = sys.modules["jax"]
        return not isinstance(x, jax.core.Tracer)
    return known(x.reshape(-1)[:1].abs().sum()) is not None


def needs_grad(x: Array) -> bool:
    """Whether torch records operations on ``x``."""
    return backend_of(x) == "torch" and bool(x.requires_grad)
