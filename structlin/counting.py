"""Exact counts of parameters, work and bytes: of structures, operators, arrays and CoLA composites of them.

One *MAC* is one multiply-accumulate of a product. One *FLOP* is one addition or multiplication, so a product costs
``2 * macs`` FLOPs. Other work (FFTs, elementwise products and sums, triangular solves) is counted in FLOPs, by name. An
operation on complex numbers counts as one, although a processor needs four real MACs for one complex MAC. Reshapes,
copies, padding, gathers, scatters and conjugation move data and count as 0 FLOPs.

The counts are those of the algorithm that the operator uses, not of the best algorithm. CoLA applies the factors of a
Kronecker product one after the other and computes a slice from the whole matrix. Its sum of k terms makes k additions,
because Python's ``sum`` starts from 0. An operator of an unknown type raises TypeError; it never counts as zero.
:func:`register_work` adds a type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import cola
import numpy as np
from cola.linalg.inverse.inv import TriangularInv
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of, dtype_name
from structlin._work import _ARRAYS, _COLUMNS, Count, Work, _matrix_shape, _rule, register_work, work_of
from structlin.operators import RealPart
from structlin.structure import AbstractStructure

__all__ = [
    "Work",
    "activation_bytes",
    "flops",
    "intensity",
    "macs",
    "num_bytes",
    "num_params",
    "register_work",
    "work_of",
]

_INDEX_BYTES = 8  # of an index of a structure without arrays: NumPy, torch and jax (64-bit) default to int64


# -- CoLA's operators that hold arrays -----------------------------------------------------------------------------


def _elementwise(flops: int, activations: int | None = None) -> Work:
    return Work(other_flops={"elementwise": flops}, activations=activations)


@register_work(cola.ops.Dense)
@register_work(cola.ops.Dense, transposed=True)
def _dense(op: cola.ops.Dense, count: Count) -> Work:
    return Work(macs=math.prod(op.shape))


# CoLA keeps the values twice, as given and in the compressed matrix that the product reads.
@register_work(cola.ops.Sparse, arrays=lambda op: [op.data, *_index_arrays(op)])
@register_work(cola.ops.Sparse, transposed=True)
def _sparse(op: cola.ops.Sparse, count: Count) -> Work:
    return Work(macs=len(op.data))


def _index_arrays(op: cola.ops.Sparse) -> list[Array]:
    if hasattr(op.A, "crow_indices"):
        return [op.A.crow_indices(), op.A.col_indices()]
    return [op.A.indptr, op.A.indices]


@register_work(cola.ops.ScalarMul)
@register_work(cola.ops.ScalarMul, transposed=True)
@register_work(cola.ops.Diagonal)
@register_work(cola.ops.Diagonal, transposed=True)
def _scaled(op: LinearOperator, count: Count) -> Work:
    return _elementwise(op.shape[1])


@register_work(cola.ops.Tridiagonal)
@register_work(cola.ops.Tridiagonal, transposed=True)
def _tridiagonal(op: cola.ops.Tridiagonal, count: Count) -> Work:
    # Three products, of n, n - 1 and n - 1 numbers, and two additions of the n (padded).
    return _elementwise(5 * op.shape[0] - 2)


@register_work(cola.ops.Householder)
@register_work(cola.ops.Householder, transposed=True)
def _householder(op: cola.ops.Householder, count: Count) -> Work:
    # Inner product, its multiple by beta, then x - multiple * vec.
    return _elementwise(4 * op.shape[0])


@register_work(cola.ops.Identity)
@register_work(cola.ops.Identity, transposed=True)
@register_work(cola.ops.Permutation)
@register_work(cola.ops.Permutation, transposed=True)
def _no_flops(op: LinearOperator, count: Count) -> Work:
    return Work()


@register_work(cola.ops.FFT)
@register_work(cola.ops.FFT, transposed=True)
def _fft(op: cola.ops.FFT, count: Count) -> Work:
    # The usual convention for a complex transform, its scaling included.
    n = op.shape[0]
    return Work(other_flops={"fft": math.ceil(5 * n * math.log2(n))})


@register_work(TriangularInv)
@register_work(TriangularInv, transposed=True)
def _triangular_solve(op: TriangularInv, count: Count) -> Work:
    # n (n - 1) / 2 multiplications, as many subtractions, and n divisions.
    return Work(other_flops={"triangular_solve": op.shape[0] ** 2})


# -- CoLA's composites ---------------------------------------------------------------------------------------------


def _in_turn(works: Iterable[Work]) -> Work:
    return sum(works, start=Work(activations=0))


def _sum_of(works: Iterable[Work], size: int) -> Work:
    """Return the work of k terms of ``size`` numbers, with k - 1 additions."""
    terms = list(works)
    additions = len(terms) - 1
    return _in_turn(terms) + _elementwise(additions * size, 3 * additions * size)


def _sum_from_zero(works: Iterable[Work], size: int) -> Work:
    """Return the work of k terms with k additions: CoLA uses Python's ``sum``, which adds the first term to 0."""
    return _sum_of(works, size) + _elementwise(size, 2 * size)


@register_work(cola.ops.Product)
def _product(op: Any, count: Count) -> Work:
    return _in_turn(map(count, op.Ms))


@register_work(cola.ops.Product, transposed=True)
def _product_rows(op: Any, count: Count) -> Work:
    return _in_turn(count(M, transposed=True) for M in op.Ms)


@register_work(cola.ops.Sum)
def _sum(op: Any, count: Count) -> Work:
    return _sum_of(map(count, op.Ms), op.shape[0])


@register_work(cola.ops.Sum, transposed=True)
def _sum_rows(op: Any, count: Count) -> Work:
    return _sum_of((count(M, transposed=True) for M in op.Ms), op.shape[1])


def _kronecker_work(Ms: Any, count: Count, transposed: bool) -> Work:
    """Return the work of the members in turn: axes before M_k have their output sizes, those after it input sizes."""
    out, into = (1, 0) if transposed else (0, 1)

    def vectors(k: int) -> int:
        return math.prod(M.shape[out] for M in Ms[:k]) * math.prod(M.shape[into] for M in Ms[k + 1 :])

    return _in_turn(count(M, transposed=transposed).times(vectors(k)) for k, M in enumerate(Ms))


@register_work(cola.ops.Kronecker)
def _kronecker(op: Any, count: Count) -> Work:
    return _kronecker_work(op.Ms, count, transposed=False)


@register_work(cola.ops.Kronecker, transposed=True)
def _kronecker_rows(op: Any, count: Count) -> Work:
    return _kronecker_work(op.Ms, count, transposed=True)


def _kron_sum_work(op: Any, count: Count, transposed: bool) -> Work:
    n = op.shape[0]
    return _sum_of((count(M, transposed=transposed).times(n // M.shape[0]) for M in op.Ms), n)


@register_work(cola.ops.KronSum)
def _kron_sum(op: Any, count: Count) -> Work:
    return _kron_sum_work(op, count, transposed=False)


@register_work(cola.ops.KronSum, transposed=True)
def _kron_sum_rows(op: Any, count: Count) -> Work:
    return _kron_sum_work(op, count, transposed=True)


@register_work(cola.ops.BlockDiag)
def _block_diagonal(op: Any, count: Count) -> Work:
    return _in_turn(count(M).times(m) for M, m in zip(op.Ms, op.multiplicities, strict=True))


@register_work(cola.ops.BlockDiag, transposed=True)
def _block_diagonal_rows(op: Any, count: Count) -> Work:
    # CoLA applies repeated blocks one by one.
    blocks = [M for M, m in zip(op.Ms, op.multiplicities, strict=True) for _ in range(m)]
    return _in_turn(count(M, transposed=True) for M in blocks)


@register_work(cola.ops.Concatenated)
def _concatenated(op: Any, count: Count) -> Work:
    parts = map(count, op.Ms)
    return _in_turn(parts) if op.axis == 0 else _sum_from_zero(parts, op.shape[0])


@register_work(cola.ops.Concatenated, transposed=True)
def _concatenated_rows(op: Any, count: Count) -> Work:
    parts = (count(M, transposed=True) for M in op.Ms)
    return _in_turn(parts) if op.axis == 1 else _sum_from_zero(parts, op.shape[1])


@register_work(RealPart)
def _real(op: Any, count: Count) -> Work:
    return count(op.A)


@register_work(RealPart, transposed=True)
@register_work(cola.ops.Transpose)
@register_work(cola.ops.Adjoint)
def _transposed(op: Any, count: Count) -> Work:
    return count(op.A, transposed=True)


@register_work(cola.ops.Transpose, transposed=True)
@register_work(cola.ops.Adjoint, transposed=True)
def _transposed_rows(op: Any, count: Count) -> Work:
    return count(op.A)


@register_work(cola.ops.Sliced)
def _sliced(op: Any, count: Count) -> Work:
    return count(op.A) + _selection(op, 1)


@register_work(cola.ops.Sliced, transposed=True)
def _sliced_rows(op: Any, count: Count) -> Work:
    return count(op.A, transposed=True) + _selection(op, 0)


def _selection(op: Any, axis: int) -> Work:
    """Return the work of scattering: CoLA adds up repeated indices by a product with a 0/1 matrix."""
    chosen, n = op.slices[axis], op.A.shape[axis]
    if isinstance(chosen, tuple) and len(set(chosen)) < len(chosen):
        return Work(macs=n * len(chosen), activations=n + len(chosen))
    return Work(activations=0)


# -- totals --------------------------------------------------------------------------------------------------------


def macs(x: Any) -> int:
    """Return the number of multiply-accumulates of the products in ``x @ v``, for one vector v.

    Parameters
    ----------
    x
        A structure, an operator or an array (:func:`work_of`).

    Returns
    -------
    int
        MACs of one vector.

    Raises
    ------
    TypeError, ValueError
        As for :func:`work_of`.

    Examples
    --------
    >>> macs(np.ones((3, 5)))
    15
    """
    return work_of(x).macs


def flops(x: Any) -> int:
    """Return the FLOPs of ``x @ v`` for one vector v: ``2 * macs`` plus other work, without the setup.

    Parameters
    ----------
    x
        A structure, an operator or an array (:func:`work_of`).

    Returns
    -------
    int
        FLOPs of one vector.

    Raises
    ------
    TypeError, ValueError
        As for :func:`work_of`.

    Examples
    --------
    >>> flops(cola.ops.Dense(np.ones((3, 5))))
    30
    """
    return work_of(x).flops


def num_params(x: Any) -> int:
    """Return the number of parameters: floating and complex numbers in the arrays that a product reads.

    An array counts once, even if it occurs several times in a composite: ``A @ A.T + I`` has the parameters of A. Two
    arrays are the same if they are views of the same elements in memory. jax copies where NumPy and torch make views,
    so on jax the transpose of CoLA's ``Dense`` counts in addition. The scalar of ``c * A`` is a parameter.

    Parameters
    ----------
    x
        A structure, an operator or an array (:func:`work_of`).

    Returns
    -------
    int
        Number of parameters.

    Raises
    ------
    TypeError
        If an operator has an unknown type.

    Examples
    --------
    >>> from structlin import LowRank
    >>> A = LowRank.random((6, 8), rank=2, seed=0)
    >>> num_params(A), num_params(cola.ops.Product(A, A.T))
    (28, 28)
    """
    if isinstance(x, AbstractStructure):
        return x.num_params
    return sum(math.prod(a.shape) for a in _distinct_arrays(x) if _is_inexact(a.dtype))


def num_bytes(x: Any, dtype: Any = None) -> int:
    """Return the bytes of the arrays that a product reads, index arrays included; each counts once.

    Parameters
    ----------
    x
        A structure, an operator or an array (:func:`work_of`).
    dtype
        Dtype (a name, or an object of any library) with which floating and complex arrays count. Default: their own
        dtype; float32 for a structure, which holds no arrays. Index arrays of a structure count as int64.

    Returns
    -------
    int
        Number of bytes.

    Raises
    ------
    TypeError
        If an operator has an unknown type.

    Examples
    --------
    >>> num_bytes(np.ones((3, 5))), num_bytes(np.ones((3, 5)), "bfloat16")
    (120, 30)
    """
    size = None if dtype is None else _itemsize(dtype)
    if isinstance(x, AbstractStructure):
        return sum(f.numel * ((size or 4) if f.trainable else _INDEX_BYTES) for f in x.factors)
    return sum(
        math.prod(a.shape) * (size if size and _is_inexact(a.dtype) else _itemsize(a.dtype))
        for a in _distinct_arrays(x)
    )


def activation_bytes(x: Any, vectors: int = 1, dtype: Any = None) -> int:
    """Return the bytes of activations that ``x @ V`` reads and writes.

    Every operation reads its operands and writes its result once. A chain of two steps moves the input once, the
    intermediate twice, and the output once. Copies between the steps (permuting, padding) are not counted. A structure
    that is not a chain (an FFT) counts as reading its input and writing its output.

    Parameters
    ----------
    x
        A structure, an operator or an array (:func:`work_of`).
    vectors
        Number of vectors, the columns of V.
    dtype
        Dtype of the activations. Default: that of the operator or array; float32 for a structure.

    Returns
    -------
    int
        Number of bytes.

    Raises
    ------
    ValueError
        If ``vectors`` is not a positive integer.
    TypeError
        If an operator has an unknown type.

    Examples
    --------
    >>> from structlin import design
    >>> activation_bytes(design("low_rank", (6, 8), rank=2), vectors=10, dtype="float32")
    720
    """
    if isinstance(vectors, bool) or not hasattr(vectors, "__index__") or vectors < 1:
        raise ValueError(f"vectors must be a positive integer, got {vectors!r}")
    found = work_of(x).activations
    assert found is not None
    return vectors * found * _itemsize(getattr(x, "dtype", "float32") if dtype is None else dtype)


def intensity(x: Any, vectors: int = 1, dtype: Any = None) -> float:
    """Return the arithmetic intensity of ``x @ V``: FLOPs, with the setup, per byte moved.

    The bytes are those of the factors, read once (:func:`num_bytes`), and those of the activations, read and written by
    every operation (:func:`activation_bytes`).

    Parameters
    ----------
    x
        A structure, an operator or an array (:func:`work_of`).
    vectors
        Number of vectors, the columns of V.
    dtype
        Dtype of factors and activations. Default: as for those two functions.

    Returns
    -------
    float
        FLOPs per byte.

    Raises
    ------
    ValueError
        If ``vectors`` is not a positive integer.
    TypeError
        If an operator has an unknown type.

    Examples
    --------
    >>> intensity(np.ones((64, 64)), vectors=64, dtype="float32")
    10.666666666666666
    """
    moved = num_bytes(x, dtype) + activation_bytes(x, vectors, dtype)
    return work_of(x).total_flops(vectors) / moved


def _is_inexact(dtype: Any) -> bool:
    return dtype_name(dtype).startswith(("float", "bfloat", "complex"))


def _itemsize(dtype: Any) -> int:
    name = dtype_name(dtype)
    return 2 if name == "bfloat16" else np.dtype(name).itemsize


def _distinct_arrays(x: Any) -> list[Array]:
    if isinstance(x, LinearOperator):
        return list({_memory(a): a for a in _arrays_of(x)}.values())
    _matrix_shape(x)
    return [x]


def _arrays_of(op: LinearOperator) -> Iterator[Array]:
    _rule(op, _COLUMNS, "_matmat")
    own = next((_ARRAYS[cls] for cls in type(op).__mro__ if cls in _ARRAYS), None)
    yield from _arrays_in(vars(op) if own is None else list(own(op)))


def _arrays_in(value: Any) -> Iterator[Array]:
    if isinstance(value, LinearOperator):
        yield from _arrays_of(value)
    elif isinstance(value, dict):
        yield from _arrays_in(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _arrays_in(item)
    elif hasattr(value, "dtype") and hasattr(value, "shape"):
        try:
            backend_of(value)
        except TypeError:
            return
        yield value


def _memory(x: Array) -> tuple[Any, ...]:
    """Return a key that is equal for two arrays if and only if they view the same elements in memory, in any order."""
    backend = backend_of(x)
    where: Any = None
    if backend == "numpy":
        start, shape, strides = x.__array_interface__["data"][0], x.shape, x.strides
    elif backend == "torch":
        try:
            where = x.untyped_storage()._cdata  # unlike data_ptr(), distinct on the meta device too
        except (RuntimeError, NotImplementedError):  # inside a transformation such as vmap
            return (id(x),)
        start, shape, strides = x.storage_offset(), x.shape, x.stride()
    else:
        return (id(x),)
    axes: list[tuple[int, int]] = []
    for stride, n in sorted((abs(s), n) for n, s in zip(shape, strides, strict=True) if n != 1):
        if axes and axes[-1][0] * axes[-1][1] == stride:
            axes[-1] = (axes[-1][0], axes[-1][1] * n)
        else:
            axes.append((stride, n))
    start += sum(s * (n - 1) for n, s in zip(shape, strides, strict=True) if s < 0)
    return (backend, str(x.dtype), where, start, *axes)
