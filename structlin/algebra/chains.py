"""The algebra of chains, from the roles of their axes: what :class:`structlin.structure.Structure` answers.

A square chain is inverted step by step, block by block; a Kronecker product and a block-diagonal matrix by their
members; a chain with a narrow middle is of low rank; traces, diagonals and norms come from contracting the factors.
Everything looks at structures, not at classes, so that a transpose or a chain without a name get the same treatment.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from cola.annotations import PSD, SelfAdjoint, Stiefel, Unitary

from structlin import _spectra as spectra
from structlin._arrays import Array
from structlin._lapack import (
    eps,
    inverse_of,
    is_known,
    known,
    lapack,
    nan_unless,
    needs_grad,
    not_positive,
    pinv_of,
    refusing_singular,
    require_precision,
    seen,
    singular_to_roundoff,
    zero_determinant,
)
from structlin.algebra import contract, roles
from structlin.algebra.kronecker import is_hermitian, of_kronecker, outer
from structlin.algebra.tensor_train import norm_of_cores, tensor_train_cores
from structlin.execution.products import Product as Step
from structlin.execution.products import plan_of
from structlin.operators import StructuredOperator
from structlin.structure import Structure
from structlin.structures._vectors import descending
from structlin.structures.block_diagonal import BlockDiagonal
from structlin.structures.dense import Dense
from structlin.structures.kronecker import Kronecker
from structlin.structures.low_rank import LowRank
from structlin.verdicts import SVD, Answer, Determinant, Eigen, Verdict

_THREE = "i,ri->r; r,sr->s; s,os->o"


def singular(A: Any, rank: int) -> np.linalg.LinAlgError:
    """Return the error for an operator whose structure bounds its rank below its size."""
    return np.linalg.LinAlgError(
        f"{type(A).__name__} of shape {tuple(A.shape)} has rank {rank} at most and so no inverse; "
        "use cola.pinv, or add a multiple of the identity"
    )


def thin(A: Any) -> int | None:
    """Return the width of a bottleneck of at most half the rows and columns; None where there is none."""
    found = roles.bottleneck(A.structure)
    return found[0] if found is not None and 2 * found[0] <= min(A.shape) else None


def matrix_blocks(A: Any) -> Array | None:
    """Return (b, n, m) of a block-diagonal matrix; (1, n, m) of a dense one; else None."""
    blocks = roles.diagonal_blocks(A.structure, A.factors)
    if blocks is None and roles.is_dense(A.structure):
        matrices = roles.part_matrices(A.structure, A.factors)
        blocks = None if matrices is None else matrices[0][None]
    return blocks


def from_blocks(A: Any, blocks: Array) -> StructuredOperator:
    """Return an operator of the kind of A, dense or block-diagonal, of other blocks."""
    return Dense(blocks[0]) if roles.is_dense(A.structure) else BlockDiagonal(blocks)


def kronecker_members(A: Any, square: bool = False) -> list[Array] | None:
    """Return the matrices of a Kronecker product of two members or more."""
    matrices = roles.part_matrices(A.structure, A.factors)
    if matrices is None or len(matrices) < 2 or (square and any(m.shape[0] != m.shape[1] for m in matrices)):
        return None
    return matrices


# -- inverse and solution ----------------------------------------------------------------------------------------------


def inverse(A: Any) -> Answer[Any] | None:
    """Return the inverse, from the inverses of the blocks or of the Kronecker members."""
    structure, factors = A.structure, A.factors
    require_precision(factors[0], "an inverse")
    if roles.rank_bound(structure) < structure.d_in:
        raise singular(A, roles.rank_bound(structure))
    if roles.is_dense(structure):
        return None
    if not roles.is_square_chain(structure):
        return _padded_inverse(A)
    parts = roles.kronecker_parts(structure)
    if parts is not None and all(p.factor is not None for p in parts):
        matrices = roles.part_matrices(structure, factors)
        assert matrices is not None
        return Answer(Kronecker(*map(inverse_of, matrices)))
    blocks = roles.diagonal_blocks(structure, factors)
    return Answer(_reversed(A) if blocks is None else BlockDiagonal(inverse_of(blocks)))


def _reversed(A: Any) -> StructuredOperator:
    """Return the inverse of a square chain: the chain reversed, each block inverted."""
    structure = A.structure
    inverted, orders = roles.inverse_structure(structure)
    sizes, xp, factors = dict(structure.sizes), lapack(A.factors[0]), []
    for number, order in zip(reversed(range(len(structure.steps))), orders, strict=True):
        step = structure.steps[number]
        blocks = inverse_of(roles.blocks_of(structure, number, A.factors[number]))
        blocks = blocks.reshape(tuple(sizes[a] for a in step.batch + step.contracted + step.free))
        factors.append(blocks if order == tuple(range(len(order))) else xp.permute(blocks, order))
    return StructuredOperator(inverted, factors)


@dataclass(frozen=True)
class Padded:
    """Parts of the inverse of M, a square chain of which A is the leading (n - k) x (n - k) part.

    ``M^-1 = [[leading, right], [below, corner]]``, ``full`` is the structure of M.
    """

    full: Structure
    leading: StructuredOperator
    right: Array
    below: Array
    corner: Array


def padded(A: Any) -> Padded | None:
    """Return these parts; None if A is no large part of a square chain M, or M is singular (A may be regular then)."""
    structure = A.structure
    if structure.padding[0] != structure.padding[1]:
        return None
    k, n = structure.padding[0], structure.d_in + structure.padding[0]
    full = Structure(structure.steps, structure.sizes, n, n)
    if not roles.is_square_chain(full) or k == 0 or 2 * k > n:
        return None
    try:
        whole = _reversed(StructuredOperator(full, A.factors))
    except np.linalg.LinAlgError:
        return None
    assert isinstance(whole.structure, Structure)
    d = structure.d_in
    last = lapack(A.factors[0]).eye(n, A.factors[0])[:, d:]
    columns, rows = whole._matmat(last), whole._rmatmat(last.T)
    cut = Structure(whole.structure.steps, whole.structure.sizes, d, d)
    return Padded(full, StructuredOperator(cut, whole.factors), columns[:d], rows[:, :d], columns[d:])


def _padded_inverse(A: Any) -> Answer[Any] | None:
    """Return A^-1 = leading - right corner^-1 below by the Schur complement of the corner; the caller checks it."""
    parts = padded(A)
    if parts is None:
        return None
    try:
        with refusing_singular(parts.corner):
            middle = lapack(parts.corner).solve(parts.corner, parts.below)
    except np.linalg.LinAlgError:
        return None
    return Answer(parts.leading + LowRank(middle, -parts.right), Verdict.NOT_VERIFIED)


def pinv(A: Any) -> Answer[Any] | None:
    """Return the pseudo-inverse of a Kronecker product, a block-diagonal matrix or a chain with a bottleneck."""
    require_precision(A.factors[0], "a pseudo-inverse")
    xp = lapack(A.factors[0])
    matrices = roles.part_matrices(A.structure, A.factors)
    if matrices is not None:
        return Answer(Kronecker(*map(pinv_of, matrices)) if len(matrices) > 1 else Dense(pinv_of(matrices[0])))
    blocks = roles.diagonal_blocks(A.structure, A.factors)
    if blocks is not None:
        return Answer(BlockDiagonal(pinv_of(blocks)))
    found = roles.bottleneck(A.structure)
    if found is None or found[0] >= min(A.shape):
        return None
    left, core, right = thin_orthogonal(A)
    return Answer(LowRank(xp.conj(left).T, xp.conj(right).T @ pinv_of(core)))


def thin_orthogonal(A: Any) -> tuple[Array, Array, Array]:
    """Return (Q1, C, Q2) with A = Q1 C Q2, for a chain that has a bottleneck.

    Q1 has orthonormal columns, Q2 orthonormal rows.
    """
    U, V = _thin(A)
    xp = lapack(U)
    left, first = xp.qr(U)
    right, second = xp.qr(xp.conj(V).T)
    return left, first @ xp.conj(second).T, xp.conj(right).T


def _thin(A: Any) -> tuple[Array, Array]:
    found = roles.thin_factors(A)
    assert found is not None
    return found


def solve(A: Any, b: Array) -> Answer[Array] | None:
    """Return the steps of a square chain undone one by one: blocks are factored and b is substituted."""
    structure = A.structure
    if not roles.is_square_chain(structure) or roles.rank_bound(structure) < A.shape[0]:
        return None
    require_precision(b, "solving")
    if A.isa(PSD) and (blocks := matrix_blocks(A)) is not None:
        return Answer(solve_blocks(blocks, b.reshape((*blocks.shape[:2], -1)), True).reshape(tuple(b.shape)))
    return Answer(_substituted(structure, A.factors, b))


def _substituted(structure: Structure, factors: Sequence[Array], b: Array) -> Array:
    """Solve by substitution, or by the inverse of a block that has more columns than rows, which is then faster."""
    inverted, orders = roles.solution_steps(structure)
    xp, tokens, number = lapack(b), math.prod(b.shape[1:]), 0
    x = b
    for step in plan_of(inverted, rows=False).steps:
        if not isinstance(step, Step):  # between the steps: only permuted
            x = step(x, tokens, xp)
            continue
        factor, order = factors[-1 - number], orders[number]
        if order != tuple(range(len(order))):
            factor = xp.permute(factor, order)
        blocks = factor.reshape((step.blocks, step.fan_in, step.fan_out))
        x = step.arrange(x, tokens, xp).reshape((step.blocks, step.fan_in, step.carried * tokens))
        few = step.carried * tokens <= step.fan_in
        x = solve_blocks(blocks, x) if few else inverse_of(blocks) @ x
        number += 1
    return x.reshape(tuple(b.shape))


def solve_blocks(blocks: Array, b: Array, positive: bool = False) -> Array:
    """Solve with each block: (c, m, m), (c, m, k) -> (c, m, k).

    Raises LinAlgError, or gives NaN inside jit, for blocks that are singular to working precision.
    """
    xp = lapack(blocks)
    with refusing_singular(blocks, positive):
        x = xp.cholesky_solve(blocks, b) if positive else xp.solve(blocks, b)
    return require_regular(blocks, b, x, positive)


def require_regular(blocks: Array, b: Array, x: Array, positive: bool = False) -> Array:
    """Return x; raise LinAlgError, or give NaN, where it is as large as the roundoff of a singular block makes it.

    ``positive``: the blocks are positive definite, so their largest entries are on the diagonals.
    """
    fixed = seen(blocks, b, x)
    if positive and isinstance(fixed[0], np.ndarray):  # for which Cholesky's decomposition has refused NaN
        fixed[0] = lapack(fixed[0]).diagonal(fixed[0])[..., None]
    if all(isinstance(y, np.ndarray) for y in fixed) and b.shape[0]:
        # The bounds over all blocks suffice in most cases; NaN and zeros in b are left to the full test.
        least = float(_largest_entries(fixed[1], np).min())
        if float(_largest(fixed[0])) * float(_largest(fixed[2])) < 0.1 / eps(blocks.dtype) * least:
            return x
    lib = lapack(fixed[0])
    sizes = [_largest_entries(y, lib) for y in fixed]
    growth = (sizes[0] / lib.where(sizes[1] == 0, 1, sizes[1])) * sizes[2]
    bound = 0.1 / eps(blocks.dtype)
    worst: Any = known(lib.max(growth))
    if worst is None:
        return x + nan_unless(growth < bound, x)[:, None, None]
    if not worst < bound and known(sizes[1].sum() * 0) == 0 and known(sizes[0].sum() * 0) == 0:
        raise singular_to_roundoff(f"a block of size {blocks.shape[-1]}")
    return x  # NaN and infinity in the input pass


def _largest(y: np.ndarray) -> Any:
    return abs(y).max() if np.iscomplexobj(y) else max(y.max(), -y.min())


def _largest_entries(y: Array, lib: Any) -> Array:
    """Return the largest magnitude of each block; of real arrays of NumPy without an array of magnitudes."""
    if isinstance(y, np.ndarray) and not np.iscomplexobj(y):
        return np.maximum(y.max((1, 2)), -y.min((1, 2)))
    return lib.amax(abs(y).reshape((y.shape[0], -1)))


# -- determinant -------------------------------------------------------------------------------------------------------


def slogdet(A: Any) -> Answer[Determinant] | None:
    """Return the determinant of a square chain from those of its blocks, or of a padded one by a Schur complement."""
    structure, factors = A.structure, A.factors
    require_precision(factors[0], "a determinant")
    xp = lapack(factors[0])
    if roles.rank_bound(structure) < structure.d_in:
        return Answer(zero_determinant(factors[0]))
    if roles.is_square_chain(structure):
        blocks = matrix_blocks(A) if A.isa(PSD) else None
        arrays = factors if blocks is None else (blocks,)
        return Answer(_of_square_chain(A, arrays, blocks is not None))
    found = padded(A)
    if found is None:
        return None
    # det A = det M det D, with D the bottom right block of M^-1.
    first, second = _of_steps(found.full, factors, xp), xp.slogdet(found.corner)
    return Answer(Determinant(first[0] * second[0], first[1] + second[1]))


def _of_square_chain(A: Any, arrays: Sequence[Array], whole: bool) -> Determinant:
    """``whole``: the one array has all blocks of a matrix that is annotated PSD; otherwise they are the factors."""
    xp = lapack(arrays[0])
    if whole:
        return Determinant(*xp.positive_slogdet(arrays[0]))
    # The members of a real symmetric Kronecker product are symmetric, or in pairs antisymmetric: with zeros on the
    # diagonal, so that Cholesky gives them back to LU.
    symmetric = A.isa(PSD) and not xp.is_complex(arrays[0]) and roles.kronecker_parts(A.structure) is not None
    return _of_steps(A.structure, arrays, xp, symmetric)


def _of_steps(structure: Structure, factors: Iterable[Array], xp: Any, symmetric: bool = False) -> Determinant:
    sign: Any = roles.permutation_sign(structure)
    log: Any = 0
    negative = False
    for number, factor in enumerate(factors):
        carried = structure.factors[number].carried
        blocks = roles.blocks_of(structure, number, factor)
        if symmetric:
            signs, logs, turned = _definite_slogdet(blocks, xp)
            negative ^= turned
        else:
            signs, logs = xp.slogdet(blocks)
            signs, logs = xp.prod(signs), logs.sum()
        sign, log = sign * signs**carried, log + carried * logs
    if negative:
        raise not_positive("a Kronecker product that is negative")
    return Determinant(sign, log)


def _definite_slogdet(blocks: Array, xp: Any) -> tuple[Array, Array, bool]:
    """Return the determinant of a member of a positive Kronecker product, and whether the member is negative.

    If its diagonal is zero, the member is antisymmetric; otherwise it is definite, or an error is raised.
    """
    diagonal = xp.stop_gradient(xp.diagonal(blocks))
    trace, size = known(diagonal.sum()), known(xp.max(xp.abs(diagonal)))
    most = known(xp.max(xp.abs(xp.stop_gradient(blocks))))
    if trace is None or size is None or most is None or not size > 100 * eps(blocks.dtype) * most:
        return *xp.positive_slogdet(blocks, False), False
    sign, log = xp.positive_slogdet(-blocks if trace < 0 else blocks)
    return (sign * (-1) ** blocks.shape[-1] if trace < 0 else sign), log, trace < 0


# -- entries and norms -------------------------------------------------------------------------------------------------


def diagonal(A: Any, k: int) -> Answer[Array] | None:
    """Return the k-th diagonal, by contracting the factors."""
    found = contract.diagonal(A, k)
    return None if found is None else Answer(found)


def trace(A: Any) -> Answer[Array] | None:
    """Return the trace, by contracting the factors."""
    found = contract.trace(A)
    return None if found is None else Answer(found)


def frobenius_norm(A: Any) -> Answer[Array] | None:
    """Return the Frobenius norm, from the parts or by contracting the factors with themselves."""
    xp = lapack(A.factors[0])
    matrices = roles.part_matrices(A.structure, A.factors)
    if matrices is not None:
        return Answer(contract.product_of([*map(xp.norm, matrices)]))
    blocks = roles.diagonal_blocks(A.structure, A.factors)
    if blocks is not None:
        return Answer(xp.norm(blocks))
    cores = tensor_train_cores(A)
    if cores is not None and all(is_known(c) and not needs_grad(c) for c in cores):
        return Answer(norm_of_cores(cores))
    units, scales = contract.scaled(A.factors)
    unit = A._with(A.structure, tuple(units), frozenset())
    square = contract.inner(unit, unit)
    return None if square is None else Answer(contract.product_of([xp.sqrt(xp.real(square)), *scales]))


def largest(matrices: Array) -> Array:
    """Return the largest singular value of each of a stack of matrices."""
    require_precision(matrices, "a spectral norm")
    return lapack(matrices).singular_values(matrices)[..., 0]


def spectral_norm(A: Any) -> Answer[Array] | None:
    """Return the largest singular value of a Kronecker product, a block-diagonal or a low-rank matrix."""
    matrices = roles.part_matrices(A.structure, A.factors)
    if matrices is not None:
        return Answer(contract.product_of([*map(largest, matrices)]))
    blocks = roles.diagonal_blocks(A.structure, A.factors)
    if blocks is not None:
        return Answer(lapack(blocks).max(largest(blocks)))
    return None if thin(A) is None else Answer(largest(thin_orthogonal(A)[1]))


# -- spectra -----------------------------------------------------------------------------------------------------------


def eig(A: Any) -> Answer[Eigen] | None:
    """Return the eigendecomposition of a block-diagonal matrix or a Kronecker product."""
    require_precision(A.factors[0], "an eigenvalue")
    xp = lapack(A.factors[0])
    hermitian = A.isa(SelfAdjoint)
    blocks = roles.diagonal_blocks(A.structure, A.factors)
    if blocks is not None:
        values, vectors = (xp.eigh if hermitian else xp.eig)(blocks)
        found = BlockDiagonal(vectors)
        values = values.reshape((A.shape[0],))
        if hermitian:
            return Answer(Eigen(values, Unitary(found), lambda: found.H, normal=True))
        return Answer(Eigen(values, found, lambda: _checked_inverse(BlockDiagonal, [blocks], found)))
    matrices = kronecker_members(A, square=True)
    if matrices is None:
        return None
    symmetric = [is_hermitian(m) for m in matrices] if hermitian else [False] * len(matrices)
    if all(symmetric):
        pairs = [xp.eigh(m) for m in matrices]
        vectors = Unitary(Kronecker(*(v for _, v in pairs)))
        return Answer(Eigen(outer([w for w, _ in pairs]), vectors, lambda: vectors.H, normal=True))
    # the members of a Hermitian Kronecker product need not be Hermitian: they are so up to numbers of magnitude 1
    pairs = [xp.eig(m) for m in matrices]
    values = outer([w for w, _ in pairs])
    vectors = Kronecker(*(v for _, v in pairs))
    values = xp.real(values) if hermitian else values
    return Answer(Eigen(values, vectors, lambda: _checked_inverse(Kronecker, matrices, vectors)))


def _checked_inverse(kind: Any, matrices: Sequence[Array], vectors: Any) -> Any:
    if any(spectra.decompose(m, False) is None for m in matrices):
        return None
    return kind(*map(lapack(matrices[0]).inv, vectors.factors))


def is_positive_diagonal(matrix: Array) -> bool:
    """Whether all numbers on the diagonal of a matrix of known values are positive."""
    (fixed,) = seen(matrix)
    diagonal = lapack(fixed).diagonal(fixed)
    return bool((lapack(diagonal).real(diagonal) > 0).all())


def svd(A: Any) -> Answer[SVD] | None:
    """Return the SVD of a block-diagonal matrix, a Kronecker product or a chain with a bottleneck."""
    require_precision(A.factors[0], "a singular value")
    xp = lapack(A.factors[0])
    blocks = roles.diagonal_blocks(A.structure, A.factors)
    if blocks is not None:
        u, s, vh = xp.svd(blocks)
        return Answer(descending(BlockDiagonal(u), s.reshape((-1,)), BlockDiagonal(vh)))
    matrices = kronecker_members(A)
    if matrices is not None:
        parts = [xp.svd(m) for m in matrices]
        left, right = (Kronecker(*(p[i] for p in parts)) for i in (0, 2))
        return Answer(descending(left, outer([p[1] for p in parts]), right))
    if thin(A) is None:
        return None
    left, core, right = thin_orthogonal(A)
    u, s, vh = xp.svd(core)
    return Answer(SVD(Stiefel(Dense(left @ u)), s, Dense(vh @ right)))


# -- functions ---------------------------------------------------------------------------------------------------------


def function(A: Any, f: Any) -> Answer[Any] | None:
    """Return f(A) of a block-diagonal or dense matrix, a Kronecker product or a chain with a bottleneck."""
    require_precision(A.factors[0], f.name)
    blocks = matrix_blocks(A)
    if blocks is not None:
        return Answer(from_blocks(A, f.on_matrices(blocks, A)))
    matrices = kronecker_members(A, square=True)
    if matrices is not None:
        found = of_kronecker(matrices, A, f)
        return None if found is None else Answer(found)
    return None if thin(A) is None else _of_low_rank(A, f)


def _of_low_rank(A: Any, f: Any) -> Answer[Any] | None:
    """Return ``f(U V) = f(0) I + U g(V U) V`` with ``g(z) = (f(z) - f(0)) / z``."""
    if f.at_zero is not None and not math.isfinite(f.at_zero):
        raise singular(A, A.structure.rank_bound)
    U, V = _thin(A)
    xp, at_zero = lapack(U), f.at_zero
    hermitian = A.isa(SelfAdjoint)
    if hermitian:
        # Q from U V has orthonormal columns: the small matrix is Hermitian, and no eigenvalue is divided by.
        U, _ = xp.qr(U)
        core = xp.conj(U).T @ (A @ U)
        V = xp.conj(U).T
    else:
        core = V @ U
    if at_zero is None:
        at_zero = f.values(core[:1, 0] * 0)[0]
    size = known(abs(at_zero))
    if f.thin is not None and not hermitian:
        middle = f.thin(core)
    elif size is not None and not math.isfinite(size):
        return None
    elif hermitian:
        middle = f.on_matrices(core[None], A)[0] - at_zero * xp.eye(core.shape[0], core)
    else:
        found = spectra.decompose(core, False)
        if found is None:
            return None
        smallest, most = known(xp.abs(found.values).min()), known(xp.abs(found.values).max())
        if smallest is not None and most is not None and smallest <= eps(core.dtype) ** 0.75 * most:
            return None  # then zero may be a defective eigenvalue of U V

        def quotient(z: Array) -> Array:
            return (f.finite(z) - at_zero) / z

        middle = spectra.of_matrices(found, quotient)
        middle = xp.real(middle) if f.real and not xp.is_complex(core) else middle
    dtype = middle.dtype
    structure = Structure.parse(_THREE, i=V.shape[1], r=V.shape[0], s=V.shape[0], o=U.shape[0])
    product = StructuredOperator(structure, (xp.astype(V, dtype), middle, xp.astype(U, dtype)))
    return Answer(product) if size == 0 else Answer(product + f.multiple_of_identity(product, at_zero))


def power(A: Any, k: int) -> Answer[Any] | None:
    """Return ``A^k`` from the powers of the parts."""
    xp = lapack(A.factors[0])
    blocks = matrix_blocks(A)
    if blocks is not None:
        return Answer(from_blocks(A, xp.matrix_power(blocks, k)))
    matrices = roles.part_matrices(A.structure, A.factors)
    if matrices is not None and all(m.shape[0] == m.shape[1] for m in matrices):
        powers = [xp.matrix_power(m, k) for m in matrices]
        return Answer(Kronecker(*powers) if len(powers) > 1 else Dense(powers[0]))
    if thin(A) is None:
        return None
    U, V = _thin(A)
    return Answer(LowRank(V, U @ xp.matrix_power(V @ U, k - 1)))
