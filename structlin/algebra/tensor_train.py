"""Tensor-Train matrices: sums, rounding, and norms that are accurate under cancellation.

Oseledets (2011), Tensor-Train decomposition, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from structlin._arrays import Array
from structlin._lapack import eps, is_known, lapack, needs_grad, require_precision
from structlin.algebra.contract import product_of, scaled
from structlin.algebra.numbered import einsum
from structlin.operators import StructuredOperator
from structlin.structures.kronecker import Kronecker
from structlin.structures.tensor_train import TensorTrain


def tensor_train_cores(A: StructuredOperator) -> tuple[Array, ...] | None:
    """Return the cores (r_{k-1}, n_k, m_k, r_k) of a Tensor-Train or its transpose; None for other structures."""
    if not isinstance(A, TensorTrain):
        return None
    if _is_forward(A):
        return A.factors
    return tuple(f.swapaxes(1, 2) for f in reversed(A.factors))


def _is_forward(A: TensorTrain) -> bool:
    """Whether the factors are the cores in their order; those of a transpose come in the reverse order."""
    try:
        return bool(A.structure == TensorTrain._infer(*(tuple(f.shape) for f in A.factors)))
    except ValueError:
        return False


def _cores(A: StructuredOperator, name: str) -> list[Array]:
    cores = tensor_train_cores(A) if isinstance(A, StructuredOperator) else None
    if cores is None and isinstance(A, Kronecker):
        cores = tuple(f[None, :, :, None] for f in A.factors)
    if cores is None:
        raise TypeError(f"{name} must be a TensorTrain, got {type(A).__qualname__}")
    return list(cores)


def add_tensor_trains(A: TensorTrain, B: TensorTrain) -> TensorTrain:
    """Return the exact sum ``A + B`` as one Tensor-Train, whose ranks are the sums of the ranks.

    The operator ``+`` does the same only if the result costs no more MACs than both terms, that is, for two cores.
    :func:`round_tensor_train` reduces the ranks.

    Parameters
    ----------
    A, B
        Tensor-Trains whose cores have equal sizes.

    Raises
    ------
    TypeError
        If A or B is neither a TensorTrain nor a Kronecker product.
    ValueError
        If the sizes of the cores differ.

    Examples
    --------
    >>> A = TensorTrain.random((6, 6), rank=1)
    >>> add_tensor_trains(A, A).factors[0].shape
    (1, 2, 2, 2)
    """
    first, second = _cores(A, "A"), _cores(B, "B")
    sizes = [[tuple(c.shape[1:3]) for c in cores] for cores in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"Tensor-Trains add up if their cores have equal sizes, got {sizes[0]} and {sizes[1]}")
    return TensorTrain(*added_cores(first, second))


def added_cores(first: Sequence[Array], second: Sequence[Array]) -> list[Array]:
    """Return cores of the sum: concatenated at both ends, block diagonal in between."""
    count = len(first)
    if count == 1:
        return [first[0] + second[0]]
    xp = lapack(first[0])
    cores = []
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        if k == 0:
            cores.append(xp.concat_axis((a, b), 3))
        elif k == count - 1:
            cores.append(xp.concat_axis((a, b), 0))
        else:
            upper = xp.concat_axis((a, xp.zeros((a.shape[0], *a.shape[1:3], b.shape[3]), a)), 3)
            lower = xp.concat_axis((xp.zeros((b.shape[0], *b.shape[1:3], a.shape[3]), b), b), 3)
            cores.append(xp.concat_axis((upper, lower), 0))
    return cores


def _right_orthogonal(cores: Sequence[Array]) -> list[Array]:
    """Return the same matrix with every core but the first orthonormal as a (r, n m r') matrix."""
    cores = list(cores)
    xp = lapack(cores[0])
    for k in range(len(cores) - 1, 0, -1):
        r, n, m, s = cores[k].shape
        # rows of the core: its transpose is tall, Q R with R of shape (p, r)
        q, upper = xp.qr(cores[k].reshape((r, n * m * s)).T)
        cores[k] = q.T.reshape((q.shape[1], n, m, s))
        a, b, c, _ = cores[k - 1].shape
        cores[k - 1] = (cores[k - 1].reshape((a * b * c, r)) @ upper.T).reshape((a, b, c, upper.shape[0]))
    return cores


def norm_of_cores(cores: Sequence[Array]) -> Array:
    """Return the Frobenius norm, to the accuracy of the largest term in sums that cancel."""
    require_precision(cores[0], "a norm of a Tensor-Train")
    units, scales = scaled(cores)
    return product_of([lapack(cores[0]).norm(_right_orthogonal(units)[0]), *scales])


def round_tensor_train(
    A: TensorTrain, *, rank: int | Sequence[int] | None = None, tolerance: float | None = None
) -> TensorTrain:
    """Return a Tensor-Train of lower ranks close to A.

    The cores are orthogonalized from the right, and truncated by SVDs from the left.

    Parameters
    ----------
    A
        A TensorTrain, or a Kronecker product (which has rank 1).
    rank
        Largest rank of all inner bonds, or one for each bond.
    tolerance
        Largest relative error in the Frobenius norm; the smallest ranks that keep it are used. Without ``rank`` and
        ``tolerance``, it is 1000 times machine epsilon, which removes superfluous ranks. With both, both limits hold.

    Returns
    -------
    TensorTrain
        For c cores, its error is at most sqrt(c - 1) times that of the best one with its ranks. It is differentiable if
        the kept singular values differ from one another and from the dropped ones; on jax only if A has no superfluous
        rank.

    Raises
    ------
    TypeError
        If A is neither a TensorTrain nor a Kronecker product.
    ValueError
        For a rank below 1, a wrong number of ranks, a tolerance outside [0, 1), and inside jit without ``rank`` or with
        a positive ``tolerance``.

    References
    ----------
    Oseledets (2011), Tensor-Train decomposition, algorithm 2.

    Examples
    --------
    >>> A = TensorTrain.random((6, 6), rank=2)
    >>> twice = add_tensor_trains(A, A)
    >>> twice.factors[0].shape, round_tensor_train(twice).factors[0].shape
    ((1, 2, 2, 4), (1, 2, 2, 2))
    """
    cores = _cores(A, "A")
    require_precision(cores[0], "rounding a Tensor-Train")
    bonds = len(cores) - 1
    limits = _limits(rank, bonds)
    if tolerance is None:
        tolerance = 0.0 if rank is not None else _tiny(cores)
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must lie between 0 and 1, got {tolerance!r}")
    if bonds == 0:
        return TensorTrain(*cores)
    if tolerance > 0 and not is_known(cores[0]):
        raise ValueError(
            "the ranks that keep a tolerance depend on values; inside jit, pass rank and leave out tolerance"
        )
    if any(map(needs_grad, cores)):
        cores = _without_superfluous(cores)
    return TensorTrain(*_truncated(cores, limits, tolerance))


def _truncated(cores: Sequence[Array], limits: Sequence[int | None], tolerance: float) -> list[Array]:
    cores, bonds = _right_orthogonal(cores), len(cores) - 1
    xp = lapack(cores[0])
    budget = tolerance * float(xp.stop_gradient(xp.norm(cores[0]))) / math.sqrt(bonds) if tolerance > 0 else 0.0
    for k in range(bonds):
        r, n, m, s = cores[k].shape
        u, values, vh = xp.svd(cores[k].reshape((r * n * m, s)))
        kept = values.shape[0] if limits[k] is None else min(values.shape[0], limits[k] or 1)
        if tolerance > 0:
            kept = min(kept, _smallest_rank([float(v) for v in xp.stop_gradient(values)], budget))
        cores[k] = u[:, :kept].reshape((r, n, m, kept))
        a, b, c, d = cores[k + 1].shape
        carry = xp.astype(values[:kept, None], vh.dtype) * vh[:kept]
        cores[k + 1] = (carry @ cores[k + 1].reshape((a, b * c * d))).reshape((kept, b, c, d))
    return cores


def _without_superfluous(cores: list[Array]) -> list[Array]:
    """Drop ranks that are zero to roundoff; differentiable also at zeros, where QR and SVD are not.

    At each bond the unfolding M of exact rank becomes (M V) (U^H M V)^-1 (U^H M) with constant orthonormal bases U and
    V of its ranges. Value and derivative (the projection onto the tangent space) are those of its truncated SVD.
    """
    xp = lapack(cores[0])
    left = _truncated([xp.stop_gradient(c) for c in cores], [None] * (len(cores) - 1), _tiny(cores))
    if all(a.shape == b.shape for a, b in zip(left, cores, strict=True)):
        return cores
    right = _right_orthogonal(left)
    ends = [xp.eye(1, cores[0])]  # right parts of M times V, from the last bond to the first
    for core, basis in zip(reversed(cores[1:]), reversed(right[1:]), strict=True):
        ends.append(einsum((core, ends[-1], xp.conj(basis)), ((0, 1, 2, 3), (3, 4), (5, 1, 2, 4)), (0, 5)))
    carry, kept = xp.eye(1, cores[0]), []
    for core, basis, end in zip(cores[:-1], left[:-1], reversed(ends[1:]), strict=True):
        core = einsum((carry, core), ((0, 1), (1, 2, 3, 4)), (0, 2, 3, 4))
        carry = einsum((xp.conj(basis), core), ((0, 1, 2, 3), (0, 1, 2, 4)), (3, 4))
        kept.append(core @ (end @ xp.inv(carry @ end)))
    return [*kept, einsum((carry, cores[-1]), ((0, 1), (1, 2, 3, 4)), (0, 2, 3, 4))]


def _tiny(cores: Sequence[Array]) -> float:
    return 1000 * eps(cores[0].dtype)


def _limits(rank: int | Sequence[int] | None, bonds: int) -> list[int | None]:
    if rank is None:
        return [None] * bonds
    given = list(rank) if isinstance(rank, Sequence) else [rank] * bonds
    if len(given) != bonds or any(isinstance(r, bool) or not hasattr(r, "__index__") or r < 1 for r in given):
        raise ValueError(f"rank must be a positive integer or {bonds} of them, got {rank!r}")
    return [int(r) for r in given]


def _smallest_rank(values: Sequence[float], budget: float) -> int:
    """Return the least number of singular values for which the norm of the others is at most ``budget``."""
    rest = 0.0
    for kept in range(len(values), 1, -1):
        rest = math.hypot(rest, values[kept - 1])
        if rest > budget:
            return kept
    return 1
