"""Exact counts of parameters, work and bytes: of structures, operators, arrays and CoLA composites of them.

One *MAC* is one multiply-accumulate of a product, one *FLOP* one addition or multiplication, so that a product
costs ``2 * macs`` FLOPs; other work (FFTs, elementwise products and sums, triangular solves) is named. Operations
are those of the operator's own numbers: a complex MAC is one MAC, though a processor spends four real ones on it.
Reshapes, copies, padding, gathers, scatters and conjugation move data and count as no FLOPs.

What is counted is what the operator does, not what it could do at best: CoLA applies the factors of a Kronecker
product one after the other, computes a slice from the whole matrix, and Python's ``sum`` of k terms makes k additions,
because it starts from 0. An operator of a type that is not known raises TypeError and never counts as zero;
:func:`register_work` makes a type known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import cola
import numpy as np
from cola.linalg.inverse.inv import TriangularInv
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of, dtype_name
from structlin.operators import StructuredOperator
from structlin.structure import AbstractStructure, Structure

_INDEX_BYTES = 8  # of an index that exists only as a structure: NumPy, torch and jax (64-bit) all default to int64


@dataclass(frozen=True)
class Work:
    """Work of one product ``A @ x`` with one vector.

    ``macs``: multiply-accumulates of the products. ``other_flops``: FLOPs of other work, by name. ``setup_flops``:
    FLOPs, by name, spent once for each application, whatever the number of vectors. ``activations``: how many
    numbers of activations are read and written, every operation reading its operands and writing its result once
    (copies left out); None stands for ``d_in + d_out``.

    Examples
    --------
    >>> w = Work(macs=6, other_flops={"elementwise": 3}, setup_flops={"fft": 10})
    >>> w.flops, w.total_flops(vectors=2)
    (15, 40)

    Raises ValueError for counts that are negative, TypeError for counts that are no integers.
    """

    macs: int = 0
    other_flops: Mapping[str, int] = field(default_factory=dict, hash=False)
    setup_flops: Mapping[str, int] = field(default_factory=dict, hash=False)
    activations: int | None = None

    def __post_init__(self) -> None:
        named = {"macs": self.macs, "activations": self.activations or 0, **self.other_flops, **self.setup_flops}
        for name, count in named.items():
            if isinstance(count, bool) or not hasattr(count, "__index__"):
                raise TypeError(f"{name} must be an integer, got {count!r}")
            if count < 0:
                raise ValueError(f"{name} must not be negative, got {count}")
        for name in ("other_flops", "setup_flops"):
            kept = {k: int(v) for k, v in sorted(getattr(self, name).items()) if v}
            object.__setattr__(self, name, MappingProxyType(kept))

    @property
    def flops(self) -> int:
        """FLOPs for one vector, without the setup: ``2 * macs`` and the other work."""
        return 2 * self.macs + sum(self.other_flops.values())

    def total_flops(self, vectors: int = 1) -> int:
        """FLOPs of one application to ``vectors`` vectors, with the setup."""
        return vectors * self.flops + sum(self.setup_flops.values())

    def __add__(self, other: Work) -> Work:
        """One after the other. ``activations`` that are None add nothing."""
        if not isinstance(other, Work):
            return NotImplemented
        return Work(
            self.macs + other.macs,
            _added(self.other_flops, other.other_flops),
            _added(self.setup_flops, other.setup_flops),
            (self.activations or 0) + (other.activations or 0),
        )

    def times(self, vectors: int) -> Work:
        """One application to ``vectors`` vectors for each vector of the whole."""
        return Work(
            vectors * self.macs,
            {k: vectors * v for k, v in self.other_flops.items()},
            self.setup_flops,
            vectors * (self.activations or 0),
        )


def _added(a: Mapping[str, int], b: Mapping[str, int]) -> dict[str, int]:
    return {k: a.get(k, 0) + b.get(k, 0) for k in {**a, **b}}


Count = Callable[..., Work]
Rule = Callable[[Any, Count], Work]
_R = TypeVar("_R", bound=Rule)
_COLUMNS: dict[type, Rule] = {}
_ROWS: dict[type, Rule] = {}
_ARRAYS: dict[type, Callable[[Any], Iterable[Array]]] = {}


def register_work(
    cls: type, *, transposed: bool = False, arrays: Callable[[Any], Iterable[Array]] | None = None
) -> Callable[[_R], _R]:
    """Register a function that counts a type of operator, as a decorator.

    The function gets the operator and ``count``, and returns the :class:`Work` of ``A @ x`` for one vector;
    ``count(part)`` counts a part of the operator, ``count(part, transposed=True)`` a product from the other side. With
    ``transposed=True`` it is the work of ``x @ A``; it is needed where the class has an ``_rmatmat`` of its own.
    ``arrays`` gives the arrays that a product reads, by default all that are found in the attributes of the operator
    and in tuples, lists, dicts and operators there.

    The count holds for subclasses too, unless they override ``_matmat`` (``_rmatmat``). Raises TypeError for what is
    no subclass of ``cola.ops.LinearOperator``.

    Examples
    --------
    >>> class Twice(cola.ops.LinearOperator):
    ...     def __init__(self, A):
    ...         self.A = A
    ...         super().__init__(A.dtype, A.shape)
    ...     def _matmat(self, X):
    ...         return 2 * (self.A @ X)
    >>> @register_work(Twice)
    ... def _(op, count):
    ...     return count(op.A) + Work(other_flops={"elementwise": op.shape[0]})
    >>> work_of(Twice(cola.ops.Dense(np.ones((3, 2))))).flops
    15
    """
    if not (isinstance(cls, type) and issubclass(cls, LinearOperator)):
        raise TypeError(f"work is registered for subclasses of cola.ops.LinearOperator, got {cls!r}")

    def add(rule: _R) -> _R:
        (_ROWS if transposed else _COLUMNS)[cls] = rule
        if arrays is not None:
            _ARRAYS[cls] = arrays
        return rule

    return add


def work_of(x: Any, *, transposed: bool = False) -> Work:
    """Work of ``x @ v`` for one vector v, or with ``transposed`` of ``v @ x``.

    ``x`` is a structure, an operator (of this package or of CoLA, and composites of them) or an array of shape
    (d_out, d_in), which counts as dense. CoLA's default product from the left differentiates the product from the
    right, which on torch runs that first: the work is then doubled.

    Raises TypeError for an operator of unknown type, naming it.

    Examples
    --------
    >>> from structlin import LowRank
    >>> A = LowRank.random((6, 8), rank=2, seed=0)
    >>> product = cola.ops.Product(A, A.T)
    >>> w = work_of(product + 3 * cola.ops.I_like(product))
    >>> w.macs, dict(w.other_flops)
    (56, {'elementwise': 12})
    """
    if isinstance(x, AbstractStructure):
        return _of_structure(x)
    if isinstance(x, LinearOperator):
        found = _of_rows(x) if transposed else _rule(x, _COLUMNS, "_matmat")(x, work_of)
        return found if found.activations is not None else _with_ends(found, x.shape)
    d_out, d_in = _matrix_shape(x)
    return Work(macs=d_out * d_in, activations=d_out + d_in)


def _with_ends(found: Work, shape: tuple[int, int]) -> Work:
    return Work(found.macs, found.other_flops, found.setup_flops, int(sum(shape)))


def _of_rows(op: LinearOperator) -> Work:
    if type(op)._rmatmat is not LinearOperator._rmatmat:
        return _rule(op, _ROWS, "_rmatmat")(op, work_of)
    columns = work_of(op)
    if op.isa(cola.SelfAdjoint) or not op.xnp.__name__.endswith("torch_fns"):
        return columns
    return columns + columns


def _rule(op: LinearOperator, rules: Mapping[type, Rule], method: str) -> Rule:
    for cls in type(op).__mro__:
        if cls in rules:
            if getattr(type(op), method) is getattr(cls, method) and method not in vars(op):
                return rules[cls]
            break
    how = "@structlin.register_work(cls)" if method == "_matmat" else "@structlin.register_work(cls, transposed=True)"
    name = f"{type(op).__module__}.{type(op).__qualname__}"
    raise TypeError(f"no count is known for {method} of {name} of shape {tuple(op.shape)}; register one with {how}")


def _matrix_shape(x: Any) -> tuple[int, int]:
    try:
        backend_of(x)
    except TypeError:
        raise TypeError(
            f"expected a structure, an operator or an array, got {type(x).__module__}.{type(x).__qualname__}"
        ) from None
    if x.ndim != 2:
        raise ValueError(f"an array counts as a dense matrix of shape (d_out, d_in), got shape {tuple(x.shape)}")
    return int(x.shape[0]), int(x.shape[1])


# -- structures ----------------------------------------------------------------------------------------------------


def _of_structure(s: AbstractStructure) -> Work:
    inner = 0
    if isinstance(s, Structure):
        sizes = dict(s.sizes)
        inner = sum(math.prod(sizes[a] for a in step.output) for step in s.steps[:-1])
    return Work(s.macs, s.other_flops, s.setup_flops, s.d_in + 2 * inner + s.d_out)


@register_work(StructuredOperator, arrays=lambda op: op.factors)
def _structured(op: StructuredOperator, count: Count) -> Work:
    return _of_structure(op.structure)


@register_work(StructuredOperator, transposed=True)
def _structured_rows(op: StructuredOperator, count: Count) -> Work:
    return _of_structure(op.structure.transpose())


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
def _tridiagonal(op: cola.ops.Tridiagonal, count: Count) -> Work:
    # Three products, of n, n - 1 and n - 1 numbers, and two additions of the n (padded).
    return _elementwise(5 * op.shape[0] - 2)


@register_work(cola.ops.Householder)
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
    """Terms of ``size`` numbers: as many additions as are between them."""
    terms = list(works)
    additions = len(terms) - 1
    return _in_turn(terms) + _elementwise(additions * size, 3 * additions * size)


def _sum_from_zero(works: Iterable[Work], size: int) -> Work:
    """Return the same by Python's ``sum``, as CoLA does it, which adds the first term to 0."""
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
    """M_k sees the axes before it as they come out, and those after it as they came in."""
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


def _kron_sum_terms(op: Any, count: Count, transposed: bool) -> Work:
    n = op.shape[0]
    return _in_turn(count(M, transposed=transposed).times(n // M.shape[0]) for M in op.Ms)


@register_work(cola.ops.KronSum)
def _kron_sum(op: Any, count: Count) -> Work:
    # It starts from 0 * x.
    n, k = op.shape[0], len(op.Ms)
    return _kron_sum_terms(op, count, False) + _elementwise((k + 1) * n, (3 * k + 2) * n)


@register_work(cola.ops.KronSum, transposed=True)
def _kron_sum_rows(op: Any, count: Count) -> Work:
    n, k = op.shape[0], len(op.Ms)
    return _kron_sum_terms(op, count, True) + _elementwise((k - 1) * n, 3 * (k - 1) * n)


@register_work(cola.ops.BlockDiag)
def _block_diagonal(op: Any, count: Count) -> Work:
    return _in_turn(count(M).times(m) for M, m in zip(op.Ms, op.multiplicities, strict=True))


@register_work(cola.ops.BlockDiag, transposed=True)
def _block_diagonal_rows(op: Any, count: Count) -> Work:
    # Here repeated blocks are applied one by one.
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
    """Repeated indices are added up by a product with a 0/1 matrix; distinct ones are scattered."""
    chosen, n = op.slices[axis], op.A.shape[axis]
    if isinstance(chosen, tuple) and len(set(chosen)) < len(chosen):
        return Work(macs=n * len(chosen), activations=n + len(chosen))
    return Work(activations=0)


# -- totals --------------------------------------------------------------------------------------------------------


def macs(x: Any) -> int:
    """Multiply-accumulates of the products in ``x @ v``, for one vector v; raises as :func:`work_of`.

    Examples
    --------
    >>> macs(np.ones((3, 5)))
    15
    """
    return work_of(x).macs


def flops(x: Any) -> int:
    """FLOPs of ``x @ v`` for one vector v, ``2 * macs`` and other work, without the setup; raises as :func:`work_of`.

    Examples
    --------
    >>> flops(cola.ops.Dense(np.ones((3, 5))))
    30
    """
    return work_of(x).flops


def num_params(x: Any) -> int:
    """Return number of parameters: floating and complex numbers in the arrays that a product reads.

    An array counts once, however often it occurs in a composite: ``A @ A.T + I`` has the parameters of A. Arrays are
    the same if they are views of exactly the same memory; jax copies where NumPy and torch make views, so that there
    the transpose of CoLA's ``Dense`` counts apart. The scalar of ``c * A`` is a parameter. Raises TypeError for an
    operator of unknown type.

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
    """Bytes of the arrays that a product reads, index arrays included, each counted once as in :func:`num_params`.

    ``dtype`` (a name or a dtype of any library) replaces that of the floating and complex arrays. A structure has no
    arrays: its factors count as ``dtype``, by default float32, and its index arrays as int64.

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
    """Bytes of activations that ``x @ V`` reads and writes, for ``vectors`` vectors in ``dtype``.

    Every operation reads its operands and writes its result once: a chain of two steps moves the input, its
    intermediate twice, and the output. Copies in between (permuting, padding) are not counted, and an operation that
    is no chain (an FFT) counts as reading its input and writing its output. ``dtype``: by default the operator's or
    the array's own, float32 for a structure. Raises ValueError for less than one vector, TypeError as :func:`work_of`.

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
    """Arithmetic intensity of ``x @ V`` for ``vectors`` vectors: FLOPs (with the setup) per byte moved.

    Bytes are those of :func:`num_bytes`, the factors read once, and of :func:`activation_bytes`, the activations read
    and written by every operation. ``dtype`` replaces the dtype of both. Raises as those two.

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
    """Return the same for two arrays if and only if they are made of the same numbers in memory, in any order."""
    backend = backend_of(x)
    where: Any = None
    if backend == "numpy":
        start, shape, strides = x.__array_interface__["data"][0], x.shape, x.strides
    elif backend == "torch":
        try:
            where = x.untyped_storage()._cdata  # unlike data_ptr(), distinct on the meta device too
        except (RuntimeError, NotImplementedError):  # inside vmap and the like
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
