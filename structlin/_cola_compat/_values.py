"""Repairs of wrong results without an error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import reduce
from numbers import Number
from types import SimpleNamespace
from typing import Any

import numpy as np
from cola.annotations import PSD, SelfAdjoint, Stiefel, Unitary, get_annotations
from cola.backends import np_fns
from cola.fns import lazify
from cola.linalg.algorithm_base import Algorithm
from cola.linalg.decompositions.decompositions import Arnoldi, Lanczos
from cola.linalg.trace.diag_trace import trace
from cola.linalg.unary.unary import log
from cola.ops import Adjoint, LinearOperator, Permutation, Product, ScalarMul, Sum, Transpose
from plum import dispatch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from structlin._cola_compat._repair import Repair, implementation, in_library, is_original, replacing, rule
from structlin._lapack import lapack, promoted

# -- log determinants ----------------------------------------------------------------------------------------------


def _logdet_scalar_is_broken() -> bool:
    twice = SimpleNamespace(c=np.float64(2.0), shape=(3, 3), xnp=np_fns)
    _, value = implementation("slogdet", ScalarMul, Algorithm, Algorithm)(twice, None, None)
    return not np.isclose(value, 3 * np.log(2.0))


def _repair_logdet_scalar() -> None:
    @rule("slogdet")
    def slogdet_of_scalar(A: ScalarMul, log_alg: Algorithm, trace_alg: Algorithm):
        size = A.xnp.abs(A.c)
        return (A.c / size) ** A.shape[0], A.shape[0] * A.xnp.log(size)


def parity(index: Any) -> Any:
    """Return the sign of a permutation, ``(-1)^(n - c)`` for n numbers and c cycles."""
    try:
        values = np.asarray(index.detach().cpu() if hasattr(index, "detach") else index)
    except (RuntimeError, TypeError):  # traced by jax or torch: by the number of inversions
        n = index.shape[0]
        above = lapack(index).index(np.triu(np.ones((n, n), dtype=bool), 1), index)
        return 1 - 2 * (((index[None, :] < index[:, None]) & above).sum() % 2)
    n = len(values)
    links = coo_array((np.ones(n), (np.arange(n), values)), shape=(n, n))
    return 1 - 2 * ((n - connected_components(links)[0]) % 2)


def _logdet_permutation_is_broken() -> bool:
    swap = SimpleNamespace(perm=np.array([1, 0]), shape=(2, 2), xnp=np_fns, dtype=np.float64, device=None)
    sign, _ = implementation("slogdet", Permutation, Algorithm, Algorithm)(swap, None, None)
    return sign != -1


def _repair_logdet_permutation() -> None:
    @rule("slogdet")
    def slogdet_of_permutation(A: Permutation, log_alg: Algorithm, trace_alg: Algorithm):
        zero = A.xnp.array(0.0, dtype=A.dtype, device=A.device)
        return zero + parity(A.perm), zero


def _logdet_iterative_is_broken() -> bool:
    return is_original(implementation("slogdet", LinearOperator, Lanczos, Algorithm))


def _repair_logdet_iterative() -> None:
    # Between CoLA's rules for one algorithm (precedence -1) and those for one type of operator (0).
    @rule("slogdet", precedence=-0.5)
    def slogdet_iterative(A: LinearOperator, log_alg: Lanczos | Arnoldi, trace_alg: Algorithm):
        value = trace(log(A, log_alg), trace_alg)
        if "complex" not in str(value.dtype):
            return value * 0 + 1, value
        return A.xnp.exp(1j * value.imag), value.real


# -- annotations ---------------------------------------------------------------------------------------------------


def known_scalar(c: Any) -> complex | None:
    """Return the value of a scalar; None while it is traced."""
    try:
        return complex(c.detach() if hasattr(c, "detach") else c)
    except (RuntimeError, TypeError, NotImplementedError):
        return None


def _known_product(scalars: Iterable[Any]) -> complex | None:
    product = complex(1)
    for c in scalars:
        value = known_scalar(c)
        if value is None:
            return None
        product *= value
    return product


def scaled_annotations(annotations: set[type], c: complex | None, is_complex: bool) -> set[type]:
    """Return the ``annotations`` that remain valid after multiplication by ``c``."""
    if c == 1:
        return annotations
    kept: set[type] = set()
    if any(issubclass(a, SelfAdjoint) for a in annotations) and (not is_complex if c is None else c.imag == 0):
        positive = c is not None and c.real >= 0 and PSD in annotations
        kept.add(PSD if positive else SelfAdjoint)
    if c is not None and abs(c) == 1:
        kept |= annotations & {Unitary, Stiefel}
    return kept


def _of_product(Ms: list[Any], is_complex: bool) -> set[type]:
    if not Ms:
        return {PSD, Unitary}
    if len(Ms) == 1:
        return set(Ms[0].annotations)
    kept = set.intersection(*(set(M.annotations) for M in Ms)) & {Unitary, Stiefel}
    if len(Ms) == 2 and _are_adjoint(Ms[0], Ms[1], is_complex):
        kept.add(PSD)
    return kept


def _are_adjoint(A: Any, B: Any, is_complex: bool) -> bool:
    if isinstance(A, Adjoint | Transpose):
        A, B = B, A
    return isinstance(B, Adjoint if is_complex else Adjoint | Transpose) and B.A is A


def _bare(cls: type, **attributes: Any) -> Any:
    op: Any = object.__new__(cls)
    vars(op).update(attributes)
    return op


def _annotations_are_broken() -> bool:
    minus = _bare(ScalarMul, c=np.float64(-1.0), dtype=np.dtype(float), annotations=set())
    positive = _bare(LinearOperator, annotations={PSD}, dtype=np.dtype(float))
    product = SimpleNamespace(Ms=(minus, positive), dtype=np.dtype(float))
    return PSD in implementation("get_annotations", Product)(product)


def _repair_annotations() -> None:
    @rule("get_annotations")
    def of_product(A: Product):
        is_complex = "complex" in str(A.dtype)
        scalars = [M.c for M in A.Ms if isinstance(M, ScalarMul)]
        kept = _of_product([M for M in A.Ms if not isinstance(M, ScalarMul)], is_complex)
        if not scalars or not kept:
            return kept
        return scaled_annotations(kept, _known_product(scalars), is_complex)

    @rule("get_annotations")
    def of_sum(A: Sum):
        shared = set.intersection(*(set(M.annotations) for M in A.Ms)) - {Unitary, Stiefel}
        return shared or ({SelfAdjoint} if all(M.isa(SelfAdjoint) for M in A.Ms) else set())

    for kind in (Transpose, Adjoint):
        rule("get_annotations", types=(kind,))(lambda A: A.A.annotations - {Stiefel})


# -- the rest ------------------------------------------------------------------------------------------------------


def _transpose_is_broken() -> bool:
    rules = dispatch.functions["transpose"].methods
    return not any(s.implementation.__module__ == __name__ for s in rules)


def _repair_transpose() -> None:
    @rule("transpose", cond=lambda A: A.isa(SelfAdjoint) and "complex" in str(A.dtype))
    def complex_self_adjoint(A: LinearOperator):
        return Transpose(A)


def _array(arr: Any, dtype: Any = None, device: Any = None) -> Any:
    torch: Any = sys.modules["torch"]
    if isinstance(arr, torch.Tensor):  # torch.tensor would copy the value and forget where it came from
        return arr.to(dtype=dtype, device=device, copy=True)
    if isinstance(arr, Number):
        return torch.as_tensor(arr, dtype=dtype, device=device)  # in half the time; there is no memory to share
    return torch.tensor(arr, dtype=dtype, device=device)


def _solvetri(matrix: Any, rhs: Any, lower: bool = True) -> Any:
    # torch.linalg.solve_triangular, unlike torch.linalg.solve, casts the right-hand side to the dtype of the matrix.
    return sys.modules["torch"].linalg.solve_triangular(*promoted(matrix, rhs), upper=not lower)


def _rtruediv(self: LinearOperator, c: Any) -> Any:
    """Raise an error, because ``c / A`` is not defined."""
    raise TypeError("cannot divide by an operator; write c * cola.inv(A)")


def _sum_init(self: Any, *Ms: Any) -> None:
    self.Ms = tuple(M if isinstance(M, LinearOperator) else lazify(M) for M in Ms)
    first, fields = self.Ms[0], vars(self)
    for M in self.Ms[1:]:
        if M.shape != first.shape:
            raise ValueError(f"shape mismatch: the terms of a sum have shapes {first.shape} and {M.shape}")
        if M.device != first.device:
            raise ValueError(f"the terms of a sum must be on the same device, got {first.device} and {M.device}")
    if all(M.xnp is first.xnp for M in self.Ms):
        fields.update(dtype=first.dtype, shape=first.shape, xnp=first.xnp)
        fields["annotations"] = set(get_annotations(self))
    else:
        LinearOperator.__init__(self, first.dtype, first.shape)
    dtypes = [M.dtype for M in self.Ms]
    fields["dtype"] = dtypes[0] if len(set(dtypes)) == 1 else reduce(self.xnp.promote_types, dtypes)
    fields["device"] = first.device


VALUES = (
    Repair("logdet_scalar", _logdet_scalar_is_broken, _repair_logdet_scalar),
    Repair("logdet_permutation", _logdet_permutation_is_broken, _repair_logdet_permutation),
    Repair("logdet_iterative", _logdet_iterative_is_broken, _repair_logdet_iterative),
    Repair("annotations", _annotations_are_broken, _repair_annotations),
    Repair("transpose", _transpose_is_broken, _repair_transpose),
    in_library("gradient", "torch", "array", _array),
    in_library("triangular", "torch", "solvetri", _solvetri),
    replacing("reciprocal", (LinearOperator, "__rtruediv__", _rtruediv)),
    replacing("sum_dtype", (Sum, "__init__", _sum_init)),
)
