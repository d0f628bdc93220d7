"""The CoLA operator of a structure: the base class of all named operators.

A :class:`StructuredOperator` consists of a structure and its factors. The structure is static, hashable and holds no
arrays. The factors are the arrays, in the order in which they are applied to a vector. Shape, dtype, device and array
library follow from these two, so an operator is consistent with its arrays after ``.to``, a cast, or a transformation
of jax or torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, ClassVar, Self

import cola
import numpy as np
from cola.ops.operator_base import LinearOperator

from structlin._arrays import Array, backend_of, common_backend, dtype_name, ops
from structlin._cola_compat import device_of, functions_of, rule
from structlin.structure import AbstractStructure

__all__ = ["RealPart", "StructuredOperator"]

_FIELDS = ("structure", "factors", "_annotations", "_index_dtype")


class StructuredOperator(LinearOperator):
    """Operator of shape (d_out, d_in), given by a structure and its factors.

    It supports the interface of CoLA: ``A @ X`` for X of shape (d_in,) or (..., d_in, k), ``X @ A`` for X of shape
    (..., d_out), sums, products, ``cola.linalg``. Factors are NumPy arrays, torch tensors or jax arrays (tracers
    included), floating or complex. Results belong to the same library.

    An operator is a pytree of jax, torch and CoLA whose leaves are the factors. It is immutable. To change a factor,
    build another operator; that takes a few microseconds and copies no array.

    Parameters
    ----------
    structure
        The structure of the matrix.
    factors
        Arrays of the shapes in ``structure.factors``, in that order, of one library and one dtype. Factors that the
        structure declares as an index are integer arrays.
    dtype
        Dtype of an operator whose factors are all integer arrays, such as a permutation. Default: the default floating
        dtype of the library.

    Raises
    ------
    TypeError
        If a factor is not an array, or factors belong to different libraries.
    ValueError
        If the number, the shapes or the dtypes of the factors are wrong, or ``dtype`` contradicts them.

    Examples
    --------
    >>> import numpy as np
    >>> from structlin import Structure, StructuredOperator
    >>> low_rank = Structure.parse("i,ir->r; r,ro->o", i=4, r=1, o=3)
    >>> A = StructuredOperator(low_rank, (np.ones((4, 1)), np.ones((1, 3))))
    >>> A.shape, A.dtype
    ((3, 4), dtype('float64'))
    >>> A @ np.arange(4.0)
    array([6., 6., 6.])
    >>> (A @ A.T).to_dense()[0]
    array([4., 4., 4.])
    """

    # CoLA would record at the first assignment which attributes are leaves; they are declared instead.
    _dynamic: ClassVar[dict[str, bool]] = {name: name == "factors" for name in _FIELDS}

    structure: AbstractStructure
    factors: tuple[Array, ...]
    _annotations: frozenset[type]
    _index_dtype: Any
    _transposed: AbstractStructure

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Return an object without initialisation, which copies and pickles require."""
        return object.__new__(cls)

    def __init__(self, structure: AbstractStructure, factors: Iterable[Array], dtype: Any = None) -> None:
        if not isinstance(structure, AbstractStructure):
            raise TypeError(f"structure must be an AbstractStructure, got {type(structure).__qualname__}")
        factors = tuple(factors)
        structure.check(factors)
        if dtype is not None or not is_inexact(factors[0].dtype):
            dtype = _index_dtype(factors, dtype)
        _fill(self, structure, factors, type(self)._own_annotations(structure), dtype)

    @classmethod
    def _build(cls, structure: AbstractStructure, factors: tuple[Array, ...], dtype: Any = None) -> Self:
        """Return an operator of this class from checked parts, without calling the constructor of the subclass."""
        if dtype is not None or not is_inexact(factors[0].dtype):
            dtype = _index_dtype(factors, dtype)
        return _fill(object.__new__(cls), structure, factors, cls._own_annotations(structure), dtype)

    @classmethod
    def _own_annotations(cls, structure: AbstractStructure) -> frozenset[type]:
        """Return the annotations that hold for every operator of this class, for example ``{cola.Unitary}``."""
        return frozenset()

    # -- properties that follow from structure and factors ------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """Shape ``(d_out, d_in)``."""
        return self.structure.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the factors, an object of their library."""
        for factor in self.factors:
            found = getattr(factor, "dtype", None)
            if found is None or is_inexact(found):
                return found
        return self._index_dtype

    @property
    def device(self) -> Any:
        """Device of the factors; None for NumPy, as in CoLA."""
        return device_of(self.factors[0])

    @property
    def xnp(self) -> Any:
        """CoLA's array functions for the library of the factors."""
        return functions_of(backend_of(self.factors[0]))

    @property
    def annotations(self) -> set[type]:
        """Properties that CoLA uses: SelfAdjoint, PSD, Unitary, Stiefel. A copy, because CoLA modifies such sets."""
        return set(self._annotations)

    def isa(self, annotation: type) -> bool:
        """Return whether the operator has the annotation, or one that implies it."""
        return _implies(self._annotations, annotation)

    @property
    def backend(self) -> str:
        """Name of the array library: ``numpy``, ``torch`` or ``jax``."""
        return backend_of(self.factors[0])

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "annotations":
            raise AttributeError(
                f"{type(self).__name__} is immutable; cannot set {name!r}, build another operator instead"
            )
        self.__dict__["_annotations"] = frozenset(value)

    # -- products --------------------------------------------------------------------------------------------------

    def __matmul__(self, X: Any) -> Any:
        if isinstance(X, LinearOperator):
            self._check_library(X)
            _check_inner(self.shape, tuple(X.shape))
            return cola.fns.dot(self, X)
        X = self._operand(X)
        if X.ndim == 0 or X.shape[max(X.ndim - 2, 0)] != self.shape[1]:
            raise ValueError(
                f"operator of shape {self.shape} @ array needs an array of shape ({self.shape[1]},) or "
                f"(..., {self.shape[1]}, k), got {tuple(X.shape)}"
            )
        if X.ndim == 1:
            return self._matmat(X[:, None])[:, 0]
        if X.ndim == 2:
            return self._matmat(X)
        factors, X = self._promoted(X)
        return self.structure.apply(factors, X.swapaxes(-1, -2)).swapaxes(-1, -2)

    def __rmatmul__(self, X: Any) -> Any:
        if isinstance(X, LinearOperator):
            _check_inner(tuple(X.shape), self.shape)
            return cola.fns.dot(X, self)
        X = self._operand(X)
        if X.ndim == 0 or X.shape[-1] != self.shape[0]:
            raise ValueError(
                f"array @ operator of shape {self.shape} needs an array of shape (..., {self.shape[0]}), "
                f"got {tuple(X.shape)}"
            )
        return self._rmatmat(X)

    def __add__(self, other: Any) -> Any:
        if isinstance(other, int | float) and other == 0:  # where sum() starts
            return self
        if isinstance(other, LinearOperator):
            self._check_library(other)
            return cola.fns.add(self, other)
        return cola.fns.add(self, self._operand(other))

    def _matmat(self, X: Array) -> Array:
        """Return a @ X for X of shape (d_in, k)."""
        factors, X = self._promoted(X)
        return self.structure.apply_columns(factors, X)

    def _rmatmat(self, X: Array) -> Array:
        """Return X @ A for X of shape (..., d_out), by the transposed structure."""
        factors, X = self._promoted(X)
        return self._transposed.apply(self.structure.transpose_factors(factors), X)

    def _promoted(self, X: Array) -> tuple[tuple[Array, ...], Array]:
        """Return factors and operand in their common dtype, as CoLA's operators do; integer factors are not cast."""
        factors, dtype = self.factors, X.dtype
        for factor in factors:
            if factor.dtype != dtype:
                break
        else:
            return factors, X
        inexact = [f.dtype for f in factors if is_inexact(f.dtype)]
        if not inexact:
            return factors, X
        xnp = functions_of(backend_of(X))
        common = xnp.promote_types(inexact[0], dtype)
        cast = xnp.cast
        return tuple(cast(f, common) if is_inexact(f.dtype) else f for f in factors), cast(X, common)

    def to_dense(self) -> Array:
        """Return the matrix as an array.

        Returns
        -------
        Array
            Array of shape (d_out, d_in), of the library, dtype and device of the operator.
        """
        d_out, d_in = self.shape
        if d_out < d_in:
            return self._rmatmat(self._eye(d_out))
        return self._matmat(self._eye(d_in))

    def _eye(self, n: int) -> Array:
        return self.xnp.eye(n, n, dtype=self.dtype, device=self.device)

    def _check_library(self, other: LinearOperator) -> None:
        if isinstance(other, StructuredOperator) and other.backend != self.backend:
            raise TypeError(
                f"cannot combine a {self.backend} operator and a {other.backend} operator; "
                "build both from arrays of one library"
            )

    def _operand(self, X: Any) -> Array:
        """Return X as an array of the library of this operator."""
        theirs, ours = backend_of(X), self.backend
        if theirs == ours:
            return X
        if (ours, theirs) == ("jax", "numpy"):  # jax accepts NumPy arrays, and CoLA passes some
            return functions_of("jax").array(X, dtype=None, device=None)
        raise TypeError(f"cannot combine a {ours} operator and a {theirs} array; convert one of them first")

    # -- related operators -------------------------------------------------------------------------------------------

    @property
    def T(self) -> Self:
        """The transpose, an operator of the same class; it shares the memory of the factors."""
        structure = self.structure
        return self._with(
            self._transposed,
            tuple(structure.transpose_factors(self.factors)),
            # The columns of a wide matrix cannot all be orthonormal, so Stiefel does not survive.
            self._annotations - {cola.Stiefel},
        )

    @property
    def H(self) -> Self:
        """The conjugate transpose."""
        return self.T.conj()

    def conj(self) -> Self:
        """Return the complex conjugate; for a real operator, the operator itself."""
        factors = self.factors
        operations = ops(backend_of(factors[0]))
        if not any(operations.is_complex(f) for f in factors):
            return self
        return self._with(self.structure, tuple(operations.conj(f) for f in factors), self._annotations)

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """Return the operator on another device or in another floating or complex dtype.

        Parameters
        ----------
        device
            A device of the array library, or for jax the name of a platform such as ``"cpu"``. None keeps the device.
        dtype
            A dtype of the library or its name. None keeps the dtype. Integer factors (an index) are never cast.

        Returns
        -------
        StructuredOperator
            An operator of the same class.

        Raises
        ------
        TypeError
            If ``device`` is a dtype.
        ValueError
            If the operator cannot have the dtype: an integer dtype, a real one for a complex operator, or one of 64
            bits in jax without ``jax_enable_x64``. Also for NumPy on a device other than the CPU.

        Examples
        --------
        >>> import numpy as np
        >>> from structlin import Structure, StructuredOperator
        >>> A = StructuredOperator(Structure.parse("i,io->o", i=2, o=3), (np.ones((2, 3)),))
        >>> A.to(dtype="float32").dtype
        dtype('float32')
        """
        target = None if dtype is None else _resolve_dtype(self.backend, dtype)
        moved = tuple(_moved(f, self.backend, device, target) for f in self.factors)
        index_dtype = self._index_dtype if target is None or self._index_dtype is None else target
        return self._with(self.structure, moved, self._annotations, index_dtype)

    def _with(
        self,
        structure: AbstractStructure,
        factors: tuple[Array, ...],
        annotations: frozenset[type],
        index_dtype: Any = None,
    ) -> Self:
        new: Self = object.__new__(type(self))
        return _fill(new, structure, factors, annotations, index_dtype or self._index_dtype)

    # -- pytree, copies ------------------------------------------------------------------------------------------------

    def tree_flatten(self) -> tuple[tuple[Array, ...], Any]:
        """Return the factors as leaves of a pytree, and the static part."""
        return self.factors, (self.structure, self._annotations, self._index_dtype)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Iterable[Any]) -> Self:
        """Return the operator with the given leaves, without checks."""
        # jax and torch put None, sizes or sentinels in the place of arrays.
        structure, annotations, index_dtype = aux
        return _fill(object.__new__(cls), structure, tuple(children), annotations, index_dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in _FIELDS}

    def __reduce__(self) -> tuple[Any, ...]:
        return object.__new__, (type(self),), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        _fill(self, *(state[name] for name in _FIELDS))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._with(self.structure, copy.deepcopy(self.factors, memo), self._annotations)

    def __repr__(self) -> str:
        try:
            where = f"dtype={dtype_name(self.dtype)}, backend={self.backend}"
        except TypeError:
            where = f"leaves={self.factors!r}"
        return f"{type(self).__name__}({self.structure!r}, {where})"


@rule("transpose")
def _transpose_rule(A: StructuredOperator):
    return A.T


@rule("adjoint")
def _adjoint_rule(A: StructuredOperator):
    return A.H


@rule("get_annotations")
def _annotations_rule(A: StructuredOperator):
    return A.annotations


def _fill(
    op: Any,
    structure: AbstractStructure,
    factors: tuple[Array, ...],
    annotations: frozenset[type],
    index_dtype: Any,
) -> Any:
    fields = op.__dict__
    fields["structure"] = structure
    fields["factors"] = factors
    fields["_annotations"] = annotations
    fields["_index_dtype"] = index_dtype
    # Not a field: it is computed here, because torch.compile cannot trace the construction of a structure.
    fields["_transposed"] = _transpose(structure)
    return op


@lru_cache(maxsize=1024)
def _transpose(structure: AbstractStructure) -> AbstractStructure:
    return structure.transpose()


@lru_cache(maxsize=256)
def _implies(annotations: frozenset[type], wanted: type) -> bool:
    return any(issubclass(own, wanted) for own in annotations)


@lru_cache(maxsize=256)
def is_inexact(dtype: Any) -> bool:
    return dtype_name(dtype).startswith(("float", "bfloat", "complex"))


def _is_complex(dtype: Any) -> bool:
    return dtype_name(dtype).startswith("complex")


def _check_inner(left: tuple[int, int], right: tuple[int, int]) -> None:
    if left[1] != right[0]:
        raise ValueError(f"cannot multiply operators of shapes {left} and {right}: {left[1]} != {right[0]}")


def _index_dtype(factors: tuple[Array, ...], dtype: Any) -> Any:
    """Return the dtype of an operator whose factors are all integer arrays; None if a factor has a floating dtype."""
    inexact = next((f.dtype for f in factors if is_inexact(f.dtype)), None)
    backend = common_backend(factors)
    if inexact is not None:
        if dtype is not None and _resolve_dtype(backend, dtype) != inexact:
            raise ValueError(f"the factors have dtype {inexact}, so the operator cannot have dtype {dtype}")
        return None
    if dtype is not None:
        return _resolve_dtype(backend, dtype)
    if backend == "torch":
        import torch

        return torch.get_default_dtype()
    if backend == "jax":
        import jax.numpy as jnp

        return jnp.zeros(()).dtype
    return np.dtype(np.float64)


def _resolve_dtype(backend: str, dtype: Any) -> Any:
    """Return a floating or complex dtype of ``backend`` from a name or from any library's dtype."""
    name = dtype_name(dtype)
    if not is_inexact(name):
        raise ValueError(f"an operator's dtype must be floating or complex, got {name}")
    if backend == "torch":
        import torch

        return getattr(torch, name)
    if backend == "jax":
        import jax
        import jax.numpy as jnp

        config: Any = jax.config
        if name in ("float64", "complex128") and not config.jax_enable_x64:
            raise ValueError(
                f"jax computes in 32 bits here and has no {name}; "
                "enable 64 bits with jax.config.update('jax_enable_x64', True)"
            )
        return jnp.dtype(name)
    return np.dtype(name)


def _moved(x: Array, backend: str, device: Any, dtype: Any) -> Array:
    if dtype is not None and is_inexact(x.dtype):
        if _is_complex(x.dtype) and not _is_complex(dtype):
            raise ValueError(f"casting {x.dtype} to {dtype} would drop the imaginary part; give a complex dtype")
    else:
        dtype = None
    if device is not None and (str(device).startswith("torch.float") or isinstance(device, np.dtype | type)):
        raise TypeError(f"device={device!r} is a dtype; write .to(dtype=...)")
    if backend == "torch":
        return x.to(device=device, dtype=dtype)
    if backend == "numpy":
        if device not in (None, "cpu"):
            raise ValueError(f"NumPy arrays live on the CPU, got device {device!r}")
        return x if dtype is None else x.astype(dtype)
    import jax

    moved = x if dtype is None else x.astype(dtype)
    if isinstance(device, str):
        device = jax.devices(device)[0]
    return moved if device is None else jax.device_put(moved, device)


class RealPart(LinearOperator):
    """A complex operator that is real up to roundoff, as an operator of a real dtype."""

    def __init__(self, A: LinearOperator, dtype: Any) -> None:
        self.A = A
        super().__init__(dtype, A.shape)
        self.device = A.device

    def to(self, device: Any = None, dtype: Any = None) -> LinearOperator:
        """Return the operator on a device, with its complex arrays in the precision of a real dtype."""
        return self.converted(self.dtype if dtype is None else dtype, lambda A, dtype: A.to(device, dtype))

    def converted(self, dtype: Any, convert: Callable[[LinearOperator, Any], LinearOperator]) -> LinearOperator:
        """Return the operator in a dtype, with ``convert(A, dtype)`` for the complex one in that precision."""
        complex_dtype = self.xnp.promote_types(dtype, self.xnp.complex64)
        made = convert(self.A, complex_dtype)
        made = made if dtype == complex_dtype else RealPart(made, dtype)
        made.annotations = set(self.annotations)
        return made

    def _matmat(self, X: Array) -> Array:
        return self._real(self.A @ X, X)

    def _rmatmat(self, X: Array) -> Array:
        return self._real(X @ self.A, X)

    @staticmethod
    def _real(found: Array, X: Array) -> Array:
        xp = ops(backend_of(X))
        if not xp.is_complex(found):  # as after CoLA's `to` of an operator that contains this one
            raise TypeError(
                f"the complex arrays of a real operator were converted to {found.dtype}, without their imaginary "
                "parts; convert the operators from which it was computed"
            )
        return found if xp.is_complex(X) else found.real
