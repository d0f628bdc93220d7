"""Dense linear algebra of NumPy, torch and jax under the same names, batched over leading axes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from structlin import _threads
from structlin._arrays import Array, backend_of, dtype_name, ops
from structlin.verdicts import Determinant

_DECOMPOSE = (
    "cholesky", "cholesky_solve", "eig", "eigh", "eigvalsh", "expm", "inv", "inverse_from_cholesky", "pinv",
    "positive_slogdet", "qr", "singular_values", "slogdet", "solve", "substitute", "svd",
)  # fmt: skip
FEW = 2**12  # numbers of an array up to which NumPy's calls on views of tensors take less time than torch's


def lapack(x: Array) -> SimpleNamespace:
    """Return the functions for the library that ``x``, an array or a NumPy scalar, belongs to."""
    kind = type(x)
    found = _of_type.get(kind)
    if found is None:
        found = _of_type[kind] = _functions("numpy" if isinstance(x, np.generic) else backend_of(x))
    return found


_of_type: dict[type, SimpleNamespace] = {}


@cache
def _functions(backend: str) -> SimpleNamespace:
    found = SimpleNamespace(**(vars(ops(backend)) | vars({"numpy": _numpy, "torch": _torch, "jax": _jax}[backend]())))

    def norms(x: Array) -> Array:
        """Return the Euclidean norms of the columns, (n, ...) -> (...), whose squares may leave the range."""
        size = found.amax(found.abs(found.stop_gradient(x)).swapaxes(0, -1))
        scale = found.where((size > 0) & (size < math.inf), size, 1.0)
        return found.raw_norms(x / scale) * scale

    if backend == "numpy":
        for name in _DECOMPOSE:
            setattr(found, name, _threads.stacked(getattr(found, name)))
    found.norms, found.norm = norms, lambda x: (found.raw_norms if 0 in x.shape else norms)(x.reshape((-1,)))
    return found


def _numpy() -> SimpleNamespace:
    import scipy.linalg

    def eig(a: Array) -> tuple[Array, Array]:
        values, vectors = np.linalg.eig(a)
        wide = np.result_type(a.dtype, np.complex64)
        return values.astype(wide), vectors.astype(wide)

    def substitute(lower: Array, b: Array) -> Array:
        lower, b = promoted(lower, b)
        potrs = _lapack_function("potrs", lower.dtype.char)
        if lower.ndim == 2:
            return potrs(lower, b, lower=1)[0]
        return np.stack([potrs(x, y, lower=1)[0] for x, y in zip(lower, b, strict=True)])

    def minus_product(y: Array, a: Array, b: Array) -> Array:
        product = a @ b
        return np.subtract(y, product, out=product)

    def minus_scaled(y: Array, a: Array, b: Array) -> Array:
        product = a * b
        return np.subtract(y, product, out=product)

    def cholesky_solve(a: Array, b: Array) -> Array:
        """Solve matrix by matrix, except for many small ones: NumPy has no batched triangular solve."""
        a, b = promoted(a, b)
        if a.ndim == 3 and a.shape[-1] < 16 and a.shape[0] > 4:
            np.linalg.cholesky(a)  # raises where one is not positive
            return np.linalg.solve(a, b)
        posv, real = _lapack_function("posv", a.dtype.char), not np.iscomplexobj(a)
        x = np.empty(b.shape, b.dtype)
        for matrix, right, out in zip(a, b, x, strict=True) if a.ndim == 3 else [(a, b, x)]:
            # The transpose of a real matrix is in Fortran's order: it is copied as it stands.
            _, out[...], failed = posv(matrix.T if real else matrix, right, lower=not real)
            if failed:
                raise np.linalg.LinAlgError("a matrix is not positive definite")
        return x

    def solve(a: Array, b: Array) -> Array:
        """Solve as NumPy does; few matrices with less overhead."""
        few = a.ndim == b.ndim == 2 or (a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] <= 4)
        if not few or a.dtype != b.dtype or a.dtype.char not in "fdFD":
            return np.linalg.solve(a, b)
        gesv = _lapack_function("gesv", a.dtype.char)
        x = np.empty(b.shape, b.dtype)
        for matrix, right, out in zip(a, b, x, strict=True) if a.ndim == 3 else [(a, b, x)]:
            _, _, out[...], failed = gesv(matrix, right)
            if failed:
                raise np.linalg.LinAlgError("Singular matrix")
        return x

    def positive_slogdet(a: Array, strict: bool = True) -> tuple[Array, Array]:
        try:
            lower = np.linalg.cholesky(a)
        except np.linalg.LinAlgError:
            return _unsure_slogdet(a, np.linalg, strict)
        logs = np.log(np.diagonal(lower, 0, -2, -1).real)
        return np.ones((), a.dtype)[()], 2 * logs.sum()

    return _of_module(
        np,
        solve=solve,
        substitute=substitute,
        minus_product=minus_product,
        minus_scaled=minus_scaled,
        inverse_from_cholesky=lambda lower: np.linalg.inv(lower @ np.conj(lower).swapaxes(-1, -2)),
        cholesky_solve=cholesky_solve,
        positive_slogdet=positive_slogdet,
        cholesky=np.linalg.cholesky,
        eig=eig,
        pinv=lambda a, rtol: np.linalg.pinv(a, rcond=rtol),
        expm=lambda a: np.asarray(scipy.linalg.expm(a), dtype=a.dtype),
        equal=lambda a, b: a.shape == b.shape and (a == b).all(),
        to_complex=lambda x: x.astype(np.result_type(x.dtype, np.complex64)),
        stop_gradient=lambda x: x,
    )


@cache
def _lapack_function(name: str, dtype: str) -> Any:
    """Return a function of SciPy's LAPACK for a character of NumPy's dtypes."""
    import scipy.linalg

    kinds = {"f": "s", "d": "d", "F": "c", "D": "z"}
    if dtype not in kinds:
        raise TypeError(f"LAPACK supports float32, float64, complex64 and complex128, got {np.dtype(dtype)}")
    return getattr(scipy.linalg.lapack, kinds[dtype] + name)


def _of_module(module: Any, **own: Any) -> SimpleNamespace:
    """Return the functions that NumPy and jax.numpy have under one name, and those of one library."""
    linalg = module.linalg
    names = ("inv", "solve", "slogdet", "eigh", "eigvalsh", "qr", "matrix_power")
    direct = ("where", "abs", "sign", "sqrt", "exp", "log", "real", "reciprocal", "max", "prod")
    common: dict[str, Any] = {name: getattr(linalg, name) for name in names}
    common |= {name: getattr(module, name) for name in direct}
    return SimpleNamespace(
        plus_scaled=lambda y, a, b: y + a * b,
        svd=lambda a: linalg.svd(a, full_matrices=False),
        singular_values=lambda a: linalg.svd(a, compute_uv=False),
        diagonal=lambda a, k=0: module.diagonal(a, k, -2, -1),
        eye=lambda n, like: module.eye(n, dtype=like.dtype),
        zeros=lambda shape, like: module.zeros(shape, dtype=like.dtype),
        index=lambda i, like: module.asarray(i),
        raw_norms=lambda x: module.sqrt(module.sum(module.abs(x) ** 2, 0)),
        amax=lambda x: module.max(x, -1),
        concat_axis=lambda xs, axis: module.concatenate(xs, axis),
        **(common | own),
    )


def _torch() -> SimpleNamespace:
    import torch

    def cholesky_solve(a: Array, b: Array) -> Array:
        if torch._C._are_functorch_transforms_active():  # which differentiate the decomposition itself
            lower = torch.linalg.cholesky(a)
            half = torch.linalg.solve_triangular(lower, b, upper=False)
            return torch.linalg.solve_triangular(lower.mH, half, upper=True)
        views = small_views(a, b, most=math.inf)
        if views is not None:  # LAPACK of SciPy takes about half the time for a stack of matrices
            with _threads.of_torch(a):
                return as_tensors(_functions("numpy").cholesky_solve(*views))[0]
        lower = torch.linalg.cholesky(a.detach())
        simple = is_plain(a) and is_plain(b)
        return torch.cholesky_solve(b, lower) if simple else _torch_positive()[0].apply(a, b, lower)

    def positive_slogdet(a: Array, strict: bool = True) -> tuple[Array, Array]:
        """Return the determinant by Cholesky, at half the cost of LU; by LU if Cholesky fails."""
        if a.device.type == "cpu":
            plain = torch._C._are_functorch_transforms_active()  # which differentiate the decomposition itself
            lower, failed = torch.linalg.cholesky_ex(a if plain else a.detach())
            worst = known(failed if failed.ndim == 0 else failed.amax())
            if worst == 0:
                log = _log_of_pivots(lower) if plain or is_plain(a) else _torch_positive()[1].apply(a, lower)
                return torch.ones((), dtype=a.dtype), log
            if worst is not None:
                return _unsure_slogdet(a, torch.linalg, strict)
        sign, log = torch.linalg.slogdet(a)
        return sign.prod(), log.sum()

    def equal(a: Array, b: Array) -> Any:
        return torch.equal(a, b) if is_plain(a) and is_plain(b) else (a == b).all()

    linalg = torch.linalg
    names = ("cholesky", "inv", "solve", "slogdet", "eig", "eigh", "eigvalsh", "qr", "matrix_power")
    direct = ("where", "abs", "sign", "sqrt", "exp", "log", "reciprocal", "max", "prod")
    return SimpleNamespace(
        **{name: getattr(linalg, name) for name in names},
        **{name: getattr(torch, name) for name in direct},
        substitute=lambda lower, b: torch.cholesky_solve(b, lower),
        minus_scaled=lambda y, a, b: torch.addcmul(y, a, b, value=-1),
        plus_scaled=torch.addcmul,
        minus_product=lambda y, a, b: torch.addmm(y, a, b, alpha=-1),
        inverse_from_cholesky=torch.cholesky_inverse,
        cholesky_solve=cholesky_solve,
        positive_slogdet=positive_slogdet,
        svd=lambda a: linalg.svd(a, full_matrices=False),
        singular_values=linalg.svdvals,
        pinv=lambda a, rtol: linalg.pinv(a, rtol=rtol),
        expm=linalg.matrix_exp,
        diagonal=lambda a, k=0: torch.diagonal(a, k, -2, -1),
        eye=lambda n, like: torch.eye(n, dtype=like.dtype, device=like.device),
        zeros=lambda shape, like: torch.zeros(shape, dtype=like.dtype, device=like.device),
        index=lambda i, like: torch.as_tensor(np.ascontiguousarray(i), device=like.device),
        equal=equal,
        real=lambda x: x.real if x.is_complex() else x,
        raw_norms=lambda x: linalg.vector_norm(x, dim=0),
        amax=lambda x: torch.amax(x, -1),
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

    def substitute(lower: Array, b: Array) -> Array:
        half = jax.lax.linalg.triangular_solve(lower, b, left_side=True, lower=True)
        return jax.lax.linalg.triangular_solve(
            lower, half, left_side=True, lower=True, transpose_a=True, conjugate_a=True
        )

    def cholesky(a: Array) -> Array:
        """Raise LinAlgError, as the other libraries do, if values are known; return NaN otherwise."""
        lower = jnp.linalg.cholesky(a)
        if is_known(a) and bool(jnp.isnan(lower).any()) and not bool(jnp.isnan(a).any()):
            raise np.linalg.LinAlgError("not positive definite")
        return lower

    def positive_slogdet(a: Array, strict: bool = True) -> tuple[Array, Array]:
        if is_known(a) and bool(jnp.isnan(jnp.linalg.cholesky(a)).any()):
            return _unsure_slogdet(a, jnp.linalg, strict)
        sign, log = jnp.linalg.slogdet(a)
        return jnp.prod(sign), jnp.sum(log)

    return _of_module(
        jnp,
        substitute=substitute,
        minus_scaled=lambda y, a, b: y - a * b,
        minus_product=lambda y, a, b: y - a @ b,
        cholesky_solve=lambda a, b: substitute(cholesky(a), b),
        positive_slogdet=positive_slogdet,
        cholesky=cholesky,
        eig=jnp.linalg.eig,
        pinv=lambda a, rtol: jnp.linalg.pinv(a, rtol=rtol),
        expm=expm,
        equal=lambda a, b: (a == b).all(),
        to_complex=lambda x: x.astype(jnp.promote_types(x.dtype, jnp.complex64)),
        stop_gradient=jax.lax.stop_gradient,
    )


def _log_of_pivots(lower: Array) -> Array:
    diagonal = lower.diagonal(0, -2, -1)
    return 2 * (diagonal.real if lower.is_complex() else diagonal).log().sum()


@cache
def _torch_positive() -> tuple[Any, Any]:
    """Return functions for ``A^-1 b`` and ``log det A`` from a Cholesky factor of A, with their derivatives.

    They take a fraction of the time of the derivative of the decomposition. For second derivatives, the first is
    computed from A.
    """
    torch: Any = sys.modules["torch"]

    class PositiveSolution(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, matrices: Array, b: Array, lower: Array) -> Array:
            x = torch.cholesky_solve(b, lower)
            ctx.save_for_backward(matrices, x, lower)
            return x

        @staticmethod
        def backward(ctx: Any, gradient: Array) -> tuple[Array, Array, None]:
            matrices, x, lower = ctx.saved_tensors
            w = PositiveSolution.apply(matrices, gradient, lower)
            return -w @ x.mH, w, None

    class PositiveLogdet(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, matrices: Array, lower: Array) -> Array:
            ctx.save_for_backward(matrices, lower)
            return _log_of_pivots(lower)

        @staticmethod
        def backward(ctx: Any, gradient: Array) -> tuple[Array, None]:
            matrices, lower = ctx.saved_tensors
            again = torch.is_grad_enabled()
            return gradient * (torch.linalg.inv(matrices).mH if again else torch.cholesky_inverse(lower)), None

    return PositiveSolution, PositiveLogdet


def _unsure_slogdet(a: Array, linalg: Any, strict: bool) -> tuple[Array, Array]:
    """Return the determinant of a stack of matrices for which the Cholesky decomposition fails.

    ``strict``: the matrices are annotated PSD, and an eigenvalue that is negative beyond roundoff raises LinAlgError.
    """
    xp = lapack(a)
    if strict:
        values = linalg.eigvalsh(xp.stop_gradient(a))
        least, most = known(values.min()), known(xp.max(xp.abs(values)))
        if least is not None and most is not None and least < -a.shape[-1] * 10 * eps(a.dtype) * most:
            raise not_positive(f"a matrix with an eigenvalue of {least:.1e}")
    sign, log = linalg.slogdet(a)
    return xp.prod(xp.abs(sign) if strict else sign), log.sum()


def inverse_of(matrices: Array) -> Array:
    """Return the inverses of a stack of square matrices.

    A matrix that is singular to working precision raises LinAlgError (a ValueError); while values are traced, its
    inverse is NaN.
    """
    xp = lapack(matrices)
    require_precision(matrices, "an inverse")
    with refusing_singular(matrices):
        inverses = xp.inv(matrices)
    condition = math.prod(map(_column_norms, seen(matrices, inverses)))
    bound = 1 / eps(matrices.dtype)
    worst = known(condition.max())
    if worst is None:
        return inverses + nan_unless(condition < bound, inverses)[..., None, None]
    if not worst < bound:
        raise singular_to_roundoff(f"a block of size {matrices.shape[-1]} with condition number {worst:.1e}")
    return inverses


def nan_unless(good: Array, like: Array) -> Array:
    """Return 0 where ``good``, else NaN, to be added: unlike ``where``, the sum leaves gradients unchanged."""
    xp = lapack(like)
    zeros = xp.zeros(tuple(good.shape), like)
    return xp.where(good, zeros, zeros + float("nan"))


def _column_norms(matrices: Array) -> Array:
    """Return the 1-norm of each matrix, the largest sum of absolute values in a column."""
    return lapack(matrices).amax(abs(matrices).sum(-2))


@contextmanager
def refusing_singular(matrices: Array, positive: bool = False) -> Iterator[None]:
    """Replace the errors of NumPy, SciPy and torch at a pivot of zero by one LinAlgError with one message.

    ``positive``: the decomposition is Cholesky's, which fails at a pivot that is not positive. jax raises no errors,
    but returns values that are not finite.
    """
    try:
        yield
    except (np.linalg.LinAlgError, RuntimeError) as error:
        text = str(error)
        if "structlin" in text or not any(
            word in text for word in ("ingular", "positive", "cholesky", "leading minor")
        ):
            raise
        if positive:
            raise not_positive(f"a block of size {matrices.shape[-1]}") from None
        raise singular_to_roundoff(f"a block of size {matrices.shape[-1]}") from None


def not_positive(what: str) -> np.linalg.LinAlgError:
    return np.linalg.LinAlgError(
        f"{what} is annotated PSD but is not positive definite to working precision; remove the annotation or replace "
        "it by cola.SelfAdjoint, use structlin.linalg.pinv, or add a multiple of the identity"
    )


def singular_to_roundoff(what: str) -> np.linalg.LinAlgError:
    return np.linalg.LinAlgError(
        f"{what} is singular to working precision; use cola.pinv, or add a multiple of the identity"
    )


@cache
def is_half(dtype: Any) -> bool:
    return dtype_name(dtype) in ("float16", "bfloat16")


@cache
def eps(dtype: Any) -> float:
    """Return the distance from 1 to the next larger number of a floating or complex dtype of any library."""
    name = dtype_name(dtype)
    if name == "bfloat16":
        return 2.0**-7
    return float(np.finfo(np.dtype(name)).eps)


def require_precision(x: Array, what: str) -> None:
    """Raise ValueError for half precision, which LAPACK does not support."""
    if is_half(x.dtype):
        raise ValueError(f"{what} needs float32, float64 or complex numbers, got {x.dtype}; use A.to(dtype=...)")


def known(x: Any) -> float | None:
    """Return the value of a real scalar; None while it is traced by jax, torch.func or on torch's meta device."""
    if isinstance(x, float):  # also NumPy's float64
        return float(x)
    try:
        return float(x.detach() if hasattr(x, "detach") else x)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def is_plain(x: Array) -> bool:
    """Return whether NumPy may use the memory of a tensor: it is not differentiated, traced or transformed."""
    torch: Any = sys.modules["torch"]
    return (
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not (x.requires_grad and torch.is_grad_enabled())
        and not _is_observed(torch)
    )


def _is_observed(torch: Any) -> bool:
    """Whether tensors carry more than numbers, or something records what happens to them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.is_autocast_enabled("cpu")
    )


def seen(*arrays: Array) -> list[Array]:
    """Return arrays without derivatives, to test their values: NumPy's views of tensors in the memory of a CPU.

    A test takes a dozen calls, each of which takes torch several times as long as NumPy.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None or not isinstance(arrays[0], torch.Tensor):
        return [lapack(x).stop_gradient(x) for x in arrays]
    fixed = [x.detach().resolve_conj() for x in arrays]
    if not _is_observed(torch) and all(type(x) is torch.Tensor for x in fixed):
        try:
            return [x.numpy() for x in fixed]
        except (RuntimeError, TypeError):  # on another device; sparse, conjugated or without a dtype of NumPy
            pass
    return fixed


def small_views(*arrays: Array, most: float | None = None) -> list[np.ndarray] | None:
    """Return NumPy's views of tensors that no derivative follows; None for other arrays, and above ``most`` numbers.

    ``most`` is :data:`FEW` by default.
    """
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return None
    most = FEW if most is None else most
    kinds, recorded = (torch.Tensor, torch.nn.Parameter), torch.is_grad_enabled()
    for x in arrays:
        if type(x) not in kinds or x.numel() > most or (recorded and x.requires_grad):
            return None
    if _is_observed(torch):
        return None
    try:
        return [x.detach().numpy() if x.requires_grad else x.numpy() for x in arrays]
    except (RuntimeError, TypeError):  # on another device; sparse, conjugated, or without a dtype of NumPy
        return None


def as_tensors(*arrays: Any) -> list[Array]:
    """Return NumPy's arrays and scalars as tensors."""
    torch: Any = sys.modules["torch"]
    return [torch.from_numpy(np.asarray(x, order="C")) for x in arrays]


def is_known(x: Array) -> bool:
    """Return whether the values of ``x`` are known, that is, not traced."""
    backend = "numpy" if isinstance(x, np.generic) else backend_of(x)
    if backend == "numpy":
        return True
    if backend == "jax":
        jax: Any = sys.modules["jax"]
        return not isinstance(x, jax.core.Tracer)
    torch: Any = sys.modules["torch"]
    if type(x) in (torch.Tensor, torch.nn.Parameter) and x.is_cpu and not _is_observed(torch):
        return True
    return known(x.reshape(-1)[:1].abs().sum()) is not None


def needs_grad(x: Array) -> bool:
    """Return whether torch records operations on ``x``."""
    return backend_of(x) == "torch" and bool(x.requires_grad)


# -- eigenvalues and other vectors of numbers --------------------------------------------------------------------------


def inverse_values(values: Array, smallest: float) -> Array:
    """Return 1 / x; LinAlgError if the ratio of the smallest to the largest magnitude is at most ``smallest``."""
    xp = lapack(values)
    size = abs(values if isinstance(values, np.ndarray) else seen(values)[0])
    least, most = known(size.min()), known(size.max()) if smallest else 0.0
    if least is None or most is None:
        return 1 / xp.where(size > smallest * (size.max() if smallest else 0), values, values * 0 + float("nan"))
    if least <= smallest * most:  # False for NaN, which then appears in the result
        raise singular_to_roundoff(f"a matrix with an eigenvalue of magnitude {least:.1e}")
    return xp.reciprocal(values)


def reciprocals(values: Array) -> Array:
    """Return 1 / x, and 0 where the magnitude of x is below n roundoffs of the largest."""
    xp = lapack(values)
    size = xp.abs(values)
    kept = size > values.shape[0] * eps(values.dtype) * xp.max(size)
    # Without the inner ``where``, the gradient would contain 1 / 0.
    return xp.where(kept, 1 / xp.where(kept, values, values * 0 + 1), values * 0)


def determinant_of_numbers(values: Array) -> Determinant:
    """Return the determinant of a diagonal matrix; (0, -inf) if an entry is 0, as for dense matrices."""
    views = small_views(values, most=8 * FEW)
    if views is not None:
        return Determinant(*as_tensors(*determinant_of_numbers(views[0])))
    xp = lapack(values)
    if isinstance(values, np.ndarray) and not xp.is_complex(values) and values.size and values.min() > 0:
        return Determinant(values.dtype.type(1), np.log(values).sum())
    size, signs = phases(values)
    signs = xp.where(size == 0, signs * 0, signs)
    with np.errstate(divide="ignore"):
        return Determinant(xp.prod(signs), xp.log(size).sum())


def phases(values: Array) -> tuple[Array, Array]:
    """Return absolute values, and values divided by them (1 for zeros)."""
    xp = lapack(values)
    size = xp.abs(values)
    zero = size == 0
    if not xp.is_complex(values):
        return size, xp.where(zero, values * 0 + 1, xp.sign(values))
    return size, xp.where(zero, values * 0 + 1, values / xp.where(zero, size * 0 + 1, size))


def zero_determinant(like: Array) -> Determinant:
    """Return the determinant (0, -inf) of a matrix that its structure makes singular, in the dtype of ``like``."""
    zero = (like * 0).sum()
    return Determinant(zero, lapack(like).real(zero) - float("inf"))


def pinv_of(matrix: Array) -> Array:
    """Return pseudo-inverses of a stack; singular values below max(n, m) * eps times the largest count as zero."""
    return lapack(matrix).pinv(matrix, max(matrix.shape[-2:]) * eps(matrix.dtype))


def promoted(x: Array, y: Array) -> tuple[Array, Array]:
    """Return both arrays in their common dtype."""
    if x.dtype == y.dtype:
        return x, y
    xp = lapack(x)
    common = (x.reshape(-1)[:1] * 0 + y.reshape(-1)[:1] * 0).dtype
    return xp.astype(x, common), xp.astype(y, common)


def is_transformed(x: Array) -> bool:
    """Return whether a transformation of ``torch.func`` is active and ``x`` is a tensor."""
    return backend_of(x) == "torch" and bool(sys.modules["torch"]._C._are_functorch_transforms_active())


def follows(x: Array) -> bool:
    """Return whether results computed from ``x`` may be differentiated: torch records it, or values are traced."""
    backend = backend_of(x)
    if backend == "numpy":
        return False
    if backend == "jax":
        return not is_known(x)
    torch: Any = sys.modules["torch"]
    return bool(x.requires_grad and torch.is_grad_enabled()) or bool(torch._C._are_functorch_transforms_active())
