"""The work of one product with an operator, and the register of the functions that count it.

:mod:`structlin.counting` describes what is counted, and registers the operators of CoLA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeVar

import cola
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of
from structlin.operators import StructuredOperator
from structlin.structure import AbstractStructure, Structure


@dataclass(frozen=True)
class Work:
    """Work of one product ``A @ x`` with one vector.

    Parameters
    ----------
    macs
        Multiply-accumulates of the products.
    other_flops
        FLOPs of other work, by name of the operation.
    setup_flops
        FLOPs that each call spends once, independent of the number of vectors, by name of the operation.
    activations
        Number of elements of activations that are read and written, if every operation reads its operands and writes
        its result once. Copies are not counted. None stands for ``d_in + d_out``.

    Raises
    ------
    ValueError
        If a count is negative.
    TypeError
        If a count is not an integer.

    Examples
    --------
    >>> w = Work(macs=6, other_flops={"elementwise": 3}, setup_flops={"fft": 10})
    >>> w.flops, w.total_flops(vectors=2)
    (15, 40)
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
        """FLOPs for one vector, without the setup: ``2 * macs`` plus the other work."""
        return 2 * self.macs + sum(self.other_flops.values())

    def total_flops(self, vectors: int = 1) -> int:
        """Return the FLOPs of one call, with the setup.

        Parameters
        ----------
        vectors
            Number of vectors in the call.

        Returns
        -------
        int
            Number of FLOPs.
        """
        return vectors * self.flops + sum(self.setup_flops.values())

    def __add__(self, other: Work) -> Work:
        """Return the work of both, one after the other; ``activations`` of None add 0."""
        if not isinstance(other, Work):
            return NotImplemented
        return Work(
            self.macs + other.macs,
            _added(self.other_flops, other.other_flops),
            _added(self.setup_flops, other.setup_flops),
            (self.activations or 0) + (other.activations or 0),
        )

    def times(self, vectors: int) -> Work:
        """Return the work of a part of an operator that is applied to several vectors for each vector of the whole.

        Parameters
        ----------
        vectors
            Number of vectors of the part for each vector of the whole.

        Returns
        -------
        Work
            The work for one vector of the whole.
        """
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
    """Return a decorator that registers a function which counts the work of a type of operator.

    The function takes the operator and ``count``, and returns the :class:`Work` of ``A @ x`` for one vector.
    ``count(part)`` is the work of a part of the operator, ``count(part, transposed=True)`` that of ``x @ part``. The
    function also counts subclasses that do not override ``_matmat`` (``_rmatmat`` if ``transposed``).

    Parameters
    ----------
    cls
        A subclass of ``cola.ops.LinearOperator``.
    transposed
        The function counts ``x @ A``. A class that overrides ``_rmatmat`` needs such a function.
    arrays
        Function that returns the arrays that a product with the operator reads. Default: all arrays in the attributes
        of the operator, and in tuples, lists, dicts and operators there.

    Returns
    -------
    Callable
        A decorator, which returns the function unchanged.

    Raises
    ------
    TypeError
        If ``cls`` is not a subclass of ``cola.ops.LinearOperator``.

    Examples
    --------
    >>> import numpy as np
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
    """Return the work of ``x @ v`` for one vector v.

    Parameters
    ----------
    x
        A structure, an operator of this package or of CoLA, a composite of them, or an array of shape (d_out, d_in),
        which counts as a dense matrix.
    transposed
        Return the work of ``v @ x`` instead. By default CoLA differentiates ``x @ v`` to compute ``v @ x``. torch
        computes ``x @ v`` first, so the work is then doubled.

    Returns
    -------
    Work
        The counts for one vector.

    Raises
    ------
    TypeError
        If the type of an operator is unknown. The message names it.
    ValueError
        If an array is not a matrix.

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
