"""Products, sums, shifts and Kronecker products of chains that are chains again, from the roles of their axes."""

from __future__ import annotations

from typing import Any

from structlin._arrays import Array
from structlin._lapack import lapack, promoted
from structlin.algebra import roles
from structlin.algebra.chains import from_blocks, matrix_blocks
from structlin.algebra.tensor_train import added_cores, tensor_train_cores
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.kronecker import Kronecker
from structlin.structures.low_rank import LowRank
from structlin.structures.tensor_train import TensorTrain
from structlin.verdicts import Answer


def product(A: Any, B: Any) -> Answer[Any] | None:
    """Return the product of Kronecker or block-diagonal operators whose members match."""
    left, right = roles.kronecker_parts(A.structure), roles.kronecker_parts(B.structure)
    if left is not None and right is not None:
        if len(left) != len(right) or len(left) < 2:
            return None
        if any(p.columns != q.rows for p, q in zip(left, right, strict=True)):
            return None
        first, second = (roles.part_matrices(op.structure, op.factors) for op in (A, B))
        assert first is not None
        assert second is not None
        return Answer(Kronecker(*(_matmul(x, y) for x, y in zip(first, second, strict=True))))
    blocks = [roles.diagonal_blocks(op.structure, op.factors) for op in (A, B)]
    if blocks[0] is None or blocks[1] is None:
        return None
    (count, _, inner), (other, inner2, _) = blocks[0].shape, blocks[1].shape
    return Answer(BlockDiagonal(_matmul(*blocks))) if count == other and inner == inner2 else None


def _matmul(x: Array, y: Array) -> Array:
    x, y = promoted(x, y)
    return x @ y


def low_rank_factors(A: Any) -> tuple[Array, Array] | None:
    """Return (U, V) of an operator that is a chain of dense matrices with a bottleneck; None for any other."""
    found = roles.bottleneck(A.structure) if isinstance(A, StructuredOperator) else None
    if found is None or found[0] >= min(A.shape):
        return None
    plain = all(f.blocks == f.carried == 1 for f in A.structure.factors)
    return roles.thin_factors(A) if plain and A.structure.padding == (0, 0) else None


def sum(A: Any, B: Any) -> Answer[Any] | None:
    """Return A + B of two dense, block-diagonal or low-rank matrices, or of two Tensor-Trains."""
    if not isinstance(B.structure, Structure):
        return None
    blocks = [matrix_blocks(op) for op in (A, B)]
    if blocks[0] is not None and blocks[1] is not None:
        if blocks[0].shape != blocks[1].shape or len({roles.is_dense(op.structure) for op in (A, B)}) > 1:
            return None
        return Answer(from_blocks(A, blocks[0] + blocks[1]))
    first, second = low_rank_factors(A), low_rank_factors(B)
    if first is not None and second is not None:
        (U, X), (V, Y) = promoted(first[0], second[0]), promoted(first[1], second[1])
        xp = lapack(U)
        return Answer(LowRank(xp.concat((V, Y)), xp.concat_axis((U, X), 1)))
    cores = [tensor_train_cores(op) for op in (A, B)]
    if cores[0] is None or cores[1] is None or [c.shape[1:3] for c in cores[0]] != [c.shape[1:3] for c in cores[1]]:
        return None
    pairs = [promoted(x, y) for x, y in zip(*cores, strict=True)]
    return Answer(TensorTrain(*added_cores([p[0] for p in pairs], [p[1] for p in pairs])))


def shifted(A: Any, value: Any) -> Answer[Any] | None:
    """Return a diagonal, taken up by what stores its diagonal."""
    blocks = matrix_blocks(A)
    if blocks is None or blocks.shape[1] != blocks.shape[2]:
        return None
    wide = value if value.ndim == 0 else value.reshape((blocks.shape[0], 1, -1))
    return Answer(from_blocks(A, blocks + lapack(blocks).eye(blocks.shape[1], blocks) * wide))


def kron(A: Any, B: Any) -> Answer[Any] | None:
    """Return the Kronecker product of two Kronecker products as one."""
    first, second = (roles.part_matrices(op.structure, op.factors) for op in (A, B))
    if first is None or second is None:
        return None
    members = [promoted(m, second[0])[0] for m in first] + [promoted(m, first[0])[0] for m in second]
    return Answer(Kronecker(*members))
