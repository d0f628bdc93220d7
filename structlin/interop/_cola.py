"""Conversion to and from the operators of CoLA."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import cola
import numpy as np
from cola.ops import LinearOperator

from structlin._arrays import as_array, to_backend
from structlin.algebra import roles as chain
from structlin.interop._arrays import require_operator
from structlin.linalg._forms import diagonal_of
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.dense import Dense
from structlin.structures.diagonal import Diagonal
from structlin.structures.kronecker import Kronecker
from structlin.structures.low_rank import LowRank
from structlin.structures.permutation import Permutation, PermutationStructure


def to_cola(A: StructuredOperator) -> LinearOperator:
    """Return the same matrix as operators of CoLA that share the arrays.

    Dense, Kronecker, block-diagonal, diagonal and permutation matrices become the operator of that name. A low-rank
    matrix becomes a product of two. Any other chain (Monarch, Tensor-Train, ...) becomes a product of permutations and
    of one block-diagonal operator for each step; if the chain is padded, the result is a slice of the product.

    Raises
    ------
    TypeError
        If A is not an operator of structlin.
    ValueError
        If CoLA has no such operator, as for matrices that are applied by FFT (circulant, Toeplitz).

    Examples
    --------
    >>> type(to_cola(Kronecker(np.eye(2), np.eye(3)))).__name__.split("[")[0]
    'Kronecker'
    """
    if not isinstance(A, StructuredOperator):
        raise TypeError(f"expected an operator of structlin, got {type(A).__module__}.{type(A).__qualname__}")
    found = _to_cola(A)
    if found is None:
        raise ValueError(f"CoLA has no operator for the structure {A.structure!r}; use cola.ops.Dense(A.to_dense())")
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
    """Return a product of three operators for each step.

    They permute the axes to (batch, contracted, carried), apply the blocks, and permute the axes to those of the
    output.
    """
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
    """Return the permutation that reorders the axes of a row-major array; None if it is the identity."""
    extents = [sizes[a] for a in before]
    order = np.arange(math.prod(extents)).reshape(extents).transpose([before.index(a) for a in after]).reshape(-1)
    if np.array_equal(order, np.arange(len(order))):
        return None
    found = cola.ops.Permutation(to_backend(order, A.backend, device=A.device), A.dtype)
    found.xnp, found.device = A.xnp, A.device
    return found


def from_cola(A: LinearOperator) -> StructuredOperator:
    """Return an operator of CoLA as a structured operator of the same kind.

    These operators, their transposes and their adjoints are supported:

    - Dense and Permutation;
    - Diagonal, ScalarMul and Identity, as :class:`structlin.Diagonal`;
    - Kronecker products of matrices;
    - BlockDiag of matrices of one shape;
    - products of two matrices of low rank, as :class:`structlin.LowRank`.

    Raises
    ------
    TypeError
        If A is not an operator.
    ValueError
        For any other operator.

    Examples
    --------
    >>> A = cola.ops.Kronecker(cola.ops.Dense(np.eye(2)), cola.ops.Dense(np.ones((3, 1))))
    >>> from_cola(A).structure.num_params
    7
    """
    require_operator(A)
    if isinstance(A, StructuredOperator):
        return A
    found = _from_cola(A)
    if found is None:
        raise ValueError(
            f"no structure is known for {type(A).__name__} of shape {tuple(A.shape)}; "
            "structlin.Dense(A.to_dense()) has the same matrix"
        )
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
    """Return the array of a dense matrix, or None."""
    if isinstance(M, cola.ops.Dense):
        return M.A
    if isinstance(M, StructuredOperator) and chain.is_dense(M.structure):
        matrices = chain.part_matrices(M.structure, M.factors)
        return None if matrices is None else matrices[0]
    return None
