"""To and from other libraries: SciPy's linear operators, CoLA's own operators, plain arrays.

Importing this module gives every operator of CoLA and of this package ``__array__``, so that ``np.asarray(A)`` is the
dense matrix instead of an array that holds one Python object. Nothing else of NumPy densifies an operator behind one's
back: operators refuse NumPy's elementwise functions (``__array_ufunc__`` is None), and ``x @ A``, ``c * A``, ``x + A``
go to the operator as before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import cola
import numpy as np
import scipy.sparse
import scipy.sparse.linalg
from cola.ops import LinearOperator

from structlin._arrays import Array, backend_of, dtype_name, to_backend
from structlin._cola_compat._repair import functions_of, is_array
from structlin.linalg import _chain as chain
from structlin.linalg._forms import diagonal_of
from structlin.linalg._lapack import as_array
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.dense import Dense
from structlin.structures.diagonal import Diagonal
from structlin.structures.kronecker import Kronecker
from structlin.structures.low_rank import LowRank
from structlin.structures.permutation import Permutation, PermutationStructure

__all__ = ["as_operator", "from_cola", "from_scipy", "to_cola", "to_jax", "to_numpy", "to_scipy", "to_torch"]


# -- dense arrays ----------------------------------------------------------------------------------------------------


def _host(x: Array) -> np.ndarray:
    """A NumPy array that can be written to, of any array, outside of gradients, from any device."""
    if backend_of(x) == "torch":
        x = x.detach().cpu().resolve_conj()
        return (x.float() if dtype_name(x.dtype) == "bfloat16" else x).numpy()
    return x if backend_of(x) == "numpy" else np.array(x)  # those that look into jax's memory are read-only


def to_numpy(A: LinearOperator, dtype: Any = None) -> np.ndarray:
    """The matrix as a NumPy array of shape (d_out, d_in); bfloat16 becomes float32. ``np.asarray(A)`` does the same.

    >>> from structlin import Diagonal
    >>> to_numpy(Diagonal(np.array([1.0, 2.0])))
    array([[1., 0.],
           [0., 2.]])
    """
    _require_operator(A)
    return np.array(_host(A.to_dense()), dtype=dtype)  # a copy: CoLA's Dense gives out its own memory


def to_torch(A: LinearOperator, dtype: Any = None, device: Any = None) -> Array:
    """The matrix as a torch tensor; of a torch operator with its gradients, of others without."""
    import torch

    _require_operator(A)
    matrix = A.to_dense()
    if backend_of(matrix) == "torch":
        return matrix.to(dtype=dtype, device=device)
    return torch.as_tensor(np.array(matrix), dtype=dtype, device=device)


def to_jax(A: LinearOperator, dtype: Any = None) -> Array:
    """The matrix as a jax array; of a jax operator differentiable, of others not.

    Raises ValueError where jax would silently give another precision (``jax_enable_x64``).
    """
    _require_operator(A)
    matrix = A.to_dense()
    if backend_of(matrix) == "jax":
        return matrix if dtype is None else matrix.astype(dtype)
    return to_backend(_host(matrix), "jax", dtype)


def _array(self: LinearOperator, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """For ``np.asarray``: always a new array, so that ``copy=False`` can not be had."""
    if copy is False:
        raise ValueError("an operator has to be multiplied out to become an array, which is a copy")
    return to_numpy(self, dtype)


LinearOperator.__array__ = _array


def _require_operator(A: Any) -> None:
    if not isinstance(A, LinearOperator):
        raise TypeError(f"expected a linear operator, got {type(A).__module__}.{type(A).__qualname__}")


def as_operator(x: Any) -> LinearOperator:
    """Anything that is a matrix as an operator.

    Operators are returned as they are, matrices of NumPy, torch or jax as :class:`structlin.Dense` (no copy), SciPy's
    sparse matrices and linear operators as by :func:`from_scipy`. Raises TypeError for anything else, ValueError for
    arrays that are no matrices or hold integers.

    >>> as_operator(np.eye(2)) @ np.array([3.0, 4.0])
    array([3., 4.])
    """
    if isinstance(x, LinearOperator):
        return x
    if is_array(x):
        if x.ndim != 2:
            raise ValueError(f"an operator is made of a matrix, got an array of shape {tuple(x.shape)}")
        return Dense(x)
    return from_scipy(x)


# -- SciPy -----------------------------------------------------------------------------------------------------------


class _ToSciPy(scipy.sparse.linalg.LinearOperator):
    """An operator of CoLA or this package behind SciPy's interface; vectors are NumPy's."""

    def __init__(self, operator: LinearOperator) -> None:
        self.operator = operator
        name = dtype_name(operator.dtype)
        super().__init__(np.dtype("float32" if name in ("bfloat16", "float16") else name), tuple(operator.shape))

    def _apply(self, A: LinearOperator, x: np.ndarray) -> np.ndarray:
        real = not np.issubdtype(self.dtype, np.complexfloating)
        if real and np.iscomplexobj(x):
            return self._apply(A, x.real) + 1j * self._apply(A, x.imag)
        x = np.ascontiguousarray(x.reshape((x.shape[0], math.prod(x.shape[1:]))))
        return _host(A @ to_backend(x, _library(A), A.dtype, A.device if _library(A) == "torch" else None))

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self._apply(self.operator, X)

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._apply(self.operator, x)[:, 0]

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        return self._apply(self.operator.H, X)

    def _rmatvec(self, x: np.ndarray) -> np.ndarray:
        return self._apply(self.operator.H, x)[:, 0]

    def _adjoint(self) -> _ToSciPy:
        return _ToSciPy(self.operator.H)

    def _transpose(self) -> _ToSciPy:
        return _ToSciPy(self.operator.T)


def _library(A: LinearOperator) -> str:
    if isinstance(A, StructuredOperator):
        return A.backend
    return next(name for name in ("torch", "jax", "numpy") if A.xnp is functions_of(name))


def to_scipy(A: LinearOperator) -> scipy.sparse.linalg.LinearOperator:
    """``A`` as a ``scipy.sparse.linalg.LinearOperator``, so that SciPy's solvers run on it.

    Vectors go to the operator's library and device, in its dtype, and come back as NumPy arrays; torch and jax
    operators work outside of gradients and jit. Operators in half precision count as float32 for SciPy. Products from
    the left, ``.H``, ``.T`` and blocks of vectors go to the operator's own. Raises TypeError for what is no operator.

    >>> from structlin import Diagonal
    >>> A = to_scipy(Diagonal(np.array([1.0, 2.0, 4.0])))
    >>> x, info = scipy.sparse.linalg.cg(A, np.ones(3))
    >>> x.round(6), info
    (array([1.  , 0.5 , 0.25]), 0)
    """
    _require_operator(A)
    return A.operator if isinstance(A, FromSciPy) else _ToSciPy(A)


class FromSciPy(LinearOperator):
    """A linear operator of SciPy as one of CoLA, over NumPy arrays. Made by :func:`from_scipy`."""

    def __init__(self, operator: scipy.sparse.linalg.LinearOperator) -> None:
        self.operator = operator
        super().__init__(np.dtype(operator.dtype), tuple(operator.shape))
        self.xnp, self.device = functions_of("numpy"), None

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        return self.operator.matmat(X)

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        # X A = (A^H X^H)^H
        return self.operator.rmatmat(X.conj().T).conj().T

    def to_dense(self) -> np.ndarray:
        return self._matmat(np.eye(self.shape[1], dtype=self.dtype))


def from_scipy(x: Any) -> LinearOperator:
    """A SciPy linear operator, or what ``scipy.sparse.linalg.aslinearoperator`` takes (sparse matrices), for CoLA.

    The result works on NumPy arrays. An operator that came from :func:`to_scipy` is given back as it was. Raises
    TypeError for anything else, and ValueError for an operator that does not know its dtype.

    >>> A = from_scipy(scipy.sparse.diags_array([1.0, 2.0]))
    >>> A.T @ np.ones(2)
    array([1., 2.])
    """
    if isinstance(x, _ToSciPy):
        return x.operator
    if isinstance(x, LinearOperator):
        raise TypeError(f"{type(x).__qualname__} is an operator of CoLA already")
    try:
        operator = scipy.sparse.linalg.aslinearoperator(x)
    except TypeError:
        raise TypeError(
            f"expected a linear operator or a sparse matrix of SciPy, got {type(x).__module__}.{type(x).__qualname__}"
        ) from None
    if operator.dtype is None:
        raise ValueError("the SciPy operator has no dtype; give it one when it is built")
    if not np.issubdtype(operator.dtype, np.inexact):
        raise ValueError(f"an operator's dtype must be floating or complex, got {operator.dtype}; convert it first")
    return FromSciPy(operator)


# -- CoLA's own classes ----------------------------------------------------------------------------------------------


def to_cola(A: StructuredOperator) -> LinearOperator:
    """The same matrix in CoLA's own operators, sharing the arrays.

    Dense, Kronecker, block-diagonal, diagonal, permutation and low-rank matrices (a product of two) have a counterpart.
    Any other chain (Monarch, Tensor-Train, ...) becomes a product of permutations and, for each step, a block-diagonal
    operator of as many operators as the step has blocks; a slice of it where the chain pads. ValueError for what is
    applied by FFT (circulant, Toeplitz), TypeError for what is no operator of this package.

    >>> type(to_cola(Kronecker(np.eye(2), np.eye(3)))).__name__.split("[")[0]
    'Kronecker'
    """
    if not isinstance(A, StructuredOperator):
        raise TypeError(f"expected an operator of structlin, got {type(A).__module__}.{type(A).__qualname__}")
    found = _to_cola(A)
    if found is None:
        raise ValueError(f"CoLA has no operator for the structure {A.structure!r}")
    for annotation in A.annotations:
        found = annotation(found)
    return found


def _to_cola(A: StructuredOperator) -> LinearOperator | None:
    ops, structure, factors = cola.ops, A.structure, A.factors
    value = diagonal_of(A)
    if value is not None:
        return ops.Diagonal(value)
    if isinstance(structure, PermutationStructure):
        found = ops.Permutation(factors[0], A.dtype)
        found.xnp, found.device = A.xnp, A.device
        return found
    matrices = chain.part_matrices(structure, factors)
    if matrices is not None:
        return ops.Dense(matrices[0]) if len(matrices) == 1 else ops.Kronecker(*map(ops.Dense, matrices))
    blocks = chain.diagonal_blocks(structure, factors)
    if blocks is not None:
        return ops.BlockDiag(*map(ops.Dense, blocks))
    if all(f.blocks == f.carried == 1 for f in structure.factors) and (thin := chain.thin_factors(A)) is not None:
        return ops.Product(*map(ops.Dense, thin))
    return _chain_in_cola(A) if isinstance(structure, Structure) else None


def _chain_in_cola(A: StructuredOperator) -> LinearOperator:
    """Step by step: axes permuted to (batch, contracted, carried), the blocks, and axes permuted to the output."""
    ops, structure = cola.ops, A.structure
    assert isinstance(structure, Structure)
    sizes, members = dict(structure.sizes), []
    for number, step in enumerate(structure.steps):
        spec = structure.factors[number]
        blocks = [ops.Dense(block) for block in chain.blocks_of(structure, number, A.factors[number])]
        if spec.carried > 1:
            blocks = [ops.Kronecker(block, _identity_like(block, spec.carried)) for block in blocks]
        before, after = step.batch + step.contracted + step.carried, step.batch + step.free + step.carried
        members += [
            _axes_permuted(A, step.input, before, sizes),
            blocks[0] if len(blocks) == 1 else ops.BlockDiag(*blocks),
            _axes_permuted(A, after, step.output, sizes),
        ]
    kept = [M for M in reversed(members) if M is not None]
    found = kept[0] if len(kept) == 1 else ops.Product(*kept)
    cut = (slice(None, structure.d_out), slice(None, structure.d_in))
    return found if tuple(found.shape) == structure.shape else ops.Sliced(found, cut)


def _identity_like(A: LinearOperator, n: int) -> LinearOperator:
    found = cola.ops.Identity((n, n), A.dtype)
    found.xnp, found.device = A.xnp, A.device
    return found


def _axes_permuted(A: StructuredOperator, before: str, after: str, sizes: Mapping[str, int]) -> LinearOperator | None:
    """The permutation of the numbers of a row-major array that reorders its axes; None where it is the identity."""
    extents = [sizes[a] for a in before]
    order = np.arange(math.prod(extents)).reshape(extents).transpose([before.index(a) for a in after]).reshape(-1)
    if np.array_equal(order, np.arange(len(order))):
        return None
    found = cola.ops.Permutation(to_backend(order, A.backend, device=A.device), A.dtype)
    found.xnp, found.device = A.xnp, A.device
    return found


def from_cola(A: LinearOperator) -> StructuredOperator:
    """An operator of CoLA as a structured one, where its kind has a counterpart.

    Dense, Diagonal, ScalarMul and Identity (as :class:`structlin.Diagonal`), Permutation, Kronecker products of
    matrices, BlockDiag of matrices of one shape, and products of two matrices through a narrow middle (as
    :class:`structlin.LowRank`), their transposes and adjoints. Raises ValueError for all else, TypeError for what is no
    operator.

    >>> A = cola.ops.Kronecker(cola.ops.Dense(np.eye(2)), cola.ops.Dense(np.ones((3, 1))))
    >>> from_cola(A).structure.num_params
    7
    """
    _require_operator(A)
    if isinstance(A, StructuredOperator):
        return A
    found = _from_cola(A)
    if found is None:
        raise ValueError(f"no structure is known for {type(A).__name__} of shape {tuple(A.shape)}")
    for annotation in A.annotations:
        found = annotation(found)
    return found


def _from_cola(A: LinearOperator) -> StructuredOperator | None:
    ops = cola.ops
    if isinstance(A, ops.Dense):
        return Dense(A.A)
    if isinstance(A, ops.Permutation):
        return Permutation(A.perm, A.dtype)
    if isinstance(A, ops.Transpose):
        return from_cola(A.A).T
    if isinstance(A, ops.Adjoint):
        return from_cola(A.A).H
    value = diagonal_of(A)
    if value is not None:
        ones = A.xnp.ones((A.shape[0],), dtype=A.dtype, device=A.device)
        return Diagonal(ones * as_array(value, ones))
    parts = [_matrix(M) for M in getattr(A, "Ms", ())]
    if not parts or any(part is None for part in parts):
        return None
    if isinstance(A, ops.Kronecker):
        return Kronecker(*parts)
    if isinstance(A, ops.BlockDiag) and len({tuple(part.shape) for part in parts}) == 1:
        blocks = [part for part, count in zip(parts, A.multiplicities, strict=True) for _ in range(count)]
        return BlockDiagonal(A.xnp.stack(blocks))
    if isinstance(A, ops.Product) and len(parts) == 2 and parts[0].shape[1] < min(A.shape):
        return LowRank(parts[1], parts[0])
    return None


def _matrix(M: LinearOperator) -> Any:
    """The array of a dense matrix, or None."""
    if isinstance(M, cola.ops.Dense):
        return M.A
    if isinstance(M, StructuredOperator) and chain.is_dense(M.structure):
        matrices = chain.part_matrices(M.structure, M.factors)
        return None if matrices is None else matrices[0]
    return None
