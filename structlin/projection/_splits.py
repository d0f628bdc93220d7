"""Closed forms by singular values for chains of two factors, and a recursion for longer chains.

A chain of two factors is a batch of low-rank matrices. Let s be the outer axes of both factors, a those of the first
alone, b those of the second alone, and r the inner axes. Then

    A[s, a, b] = sum_r F0[s, a, r] F1[s, b, r],

and the nearest matrix is the truncated SVD of each slice s. This covers low rank, Kronecker and Tensor-Train of two
cores (Van Loan and Pitsianis 1993, Approximation with Kronecker products), and the slices of Monarch and Block
Tensor-Train.

Factors of longer chains are split off one at a time. For Tensor-Train this is TT-SVD (Oseledets 2011), for Block
Tensor-Train and butterfly the hierarchical factorization of Zheng, Riccietti and Gribonval (2023), Efficient
identification of butterfly sparse matrix factorizations. The result is exact for matrices that have the structure, and
otherwise within the bound that :func:`peel` returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from structlin._threads import linalg
from structlin.algebra.numbered import Axes, Network
from structlin.projection._contract import gather
from structlin.projection._leading import leading
from structlin.structure import Structure


@dataclass(frozen=True)
class Cut:
    """The axes of two groups of factors.

    ``shared`` are the axes of the target that both groups have, ``left`` and ``right`` those of one group alone, and
    ``bond`` the inner axes that both groups have.
    """

    shared: Axes
    left: Axes
    right: Axes
    bond: Axes


def cut_between(target: Axes, first: Iterable[int], second: Iterable[int]) -> Cut:
    """Return the cut of ``target`` between two groups of factors with these axes."""
    one, two, open_ = set(first), set(second), set(target)
    return Cut(
        tuple(a for a in target if a in one and a in two),
        tuple(a for a in target if a in one and a not in two),
        tuple(a for a in target if a in two and a not in one),
        tuple(sorted((one & two) - open_)),
    )


def slices(network: Network, array: np.ndarray, axes: Axes, cut: Cut) -> np.ndarray:
    """Return ``array`` as matrices (shared, left, right), averaged over axes that no factor has."""
    absent = [a for a in axes if a not in cut.shared + cut.left + cut.right]
    matrices = gather(array, axes, cut.shared + cut.left + cut.right)
    shape = (network.size(cut.shared), network.size(cut.left), network.size(cut.right))
    return matrices.reshape(shape) / network.size(absent)


def ranked(
    matrices: np.ndarray, rank: int, power: float, rng: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the best approximations of rank ``rank`` as (shared, left, rank) and (shared, right, rank) arrays.

    The left arrays contain the singular values to the ``power``. If the rank exceeds the smaller size, the surplus of
    the left arrays is drawn from ``rng`` (zero without it), and that of the right arrays is zero.
    """
    keep = min(rank, *matrices.shape[1:])
    left = leading(matrices, keep)
    right = left.conj().swapaxes(-1, -2) @ matrices
    if power:
        squares, turn = linalg.eigh(right @ right.conj().swapaxes(-1, -2))
        # Any positive scales give the same product, so values below roundoff are raised to it.
        least = squares[..., -1:] * np.finfo(squares.dtype).eps ** 2
        scale = np.where(squares[..., -1:] > 0, np.maximum(squares, least), 1)[..., None, :] ** (power / 2)
        left, right = left @ (turn * scale), (turn / scale).conj().swapaxes(-1, -2) @ right
    right = right.swapaxes(-1, -2)
    if surplus := rank - keep:
        wide = (*left.shape[:2], surplus)
        more = np.zeros(wide) if rng is None else rng.standard_normal(wide) / math.sqrt(wide[1])
        left = np.concatenate([left, more.astype(left.dtype)], axis=-1)
        right = np.pad(right, [(0, 0), (0, 0), (0, surplus)])
    return left, right


def lost(matrices: np.ndarray, rank: int) -> float:
    """Return the norm of the remainder of the best approximations of rank ``rank``."""
    basis = leading(matrices, min(rank, *matrices.shape[1:]))
    return float(np.linalg.norm(matrices - basis @ (basis.conj().swapaxes(-1, -2) @ matrices)))


def pair(network: Network, target: np.ndarray) -> list[np.ndarray]:
    """Return the factors of the nearest matrix; each has the square roots of the singular values."""
    cut = cut_between(network.outer, *network.factors)
    matrices = slices(network, target, network.outer, cut)
    left, right = ranked(matrices, network.size(cut.bond), 0.5, None)
    return _laid_out(network, cut.shared, cut.bond, [(left, cut.left), (right, cut.right)])


def peel(
    network: Network, target: np.ndarray, order: Sequence[int], rng: np.random.Generator
) -> tuple[list[np.ndarray], float | None]:
    """Return the factors of a longer chain, split off in ``order``, and an upper bound of the error, or None.

    Each factor that is split off has orthonormal columns, so squared errors add up. The bound exists if the remainder
    has no inner axes except those of the last bond. Then its slices are contractions of those of the target. The
    squared error is at most the sum of the squared errors of each truncation of the target itself (for TT-SVD,
    Oseledets 2011, theorem 2.2).
    """
    absent = tuple(a for a in network.outer if not any(a in axes for axes in network.factors))
    axes = tuple(a for a in network.outer if a not in absent)
    copies = network.size(absent)
    rest = gather(target, network.outer, axes) / copies
    whole, whole_axes = rest, axes
    found: dict[int, np.ndarray] = {}
    spread = gather(target, network.outer, axes + absent).reshape((*rest.shape, copies)) - rest[..., None]
    squares: float | None = float(np.linalg.norm(spread)) ** 2
    for place, number in enumerate(order[:-1]):
        mine, others = network.factors[number], order[place + 1 :]
        theirs = {a for k in others for a in network.factors[k]}
        cut = cut_between(axes, mine, theirs)
        left, right = ranked(slices(network, rest, axes, cut), network.size(cut.bond), 0.0, rng)
        have = cut.shared + cut.left + cut.bond
        found[number] = gather(left.reshape(network.shape(have)), have, mine)
        axes = cut.shared + cut.right + cut.bond
        rest = right.reshape(network.shape(axes))
        done = {a for k in order[: place + 1] for a in network.factors[k]}
        full = cut_between(whole_axes, done, theirs)
        if squares is not None and set(cut.shared) <= set(whole_axes) and full.bond == cut.bond:
            squares += copies * lost(slices(network, whole, whole_axes, full), network.size(full.bond)) ** 2
        else:
            squares = None
    last = order[-1]
    found[last] = gather(rest, axes, network.factors[last])
    return [found[k] for k in range(len(order))], None if squares is None else math.sqrt(squares)


def regrouped_pair(structure: Structure, target: np.ndarray) -> list[np.ndarray] | None:
    """Return the nearest matrix of two steps with any regrouping between them; None if an axis is carried.

    Element u of the intermediate vector connects one row of W0 with one column of W1. So it adds a rank-1 term to slice
    (block of W1, block of W0) of the matrix. The rank of a slice is at most the number of its elements u.
    """
    first, second = structure.steps
    if first.carried or second.carried:
        return None
    sizes = dict(structure.sizes)

    def size(axes: str) -> int:
        return math.prod(sizes[a] for a in axes)

    def place(state: str, axes: str) -> np.ndarray:
        """Return the place among ``axes`` of each element of ``state``, in row-major order."""
        grid = np.arange(size(axes)).reshape([sizes[a] if a in axes else 1 for a in state])
        return np.broadcast_to(grid, [sizes[a] for a in state]).reshape(-1)

    def ordered(state: str, axes: str) -> str:
        return "".join(a for a in state if a in axes)

    batch0, free0 = ordered(first.output, first.batch), ordered(first.output, first.free)
    batch1, contracted1 = ordered(second.input, second.batch), ordered(second.input, second.contracted)
    p0, f0 = place(first.output, batch0), place(first.output, free0)
    p1, c1 = place(second.input, batch1), place(second.input, contracted1)
    cells = p1 * size(batch0) + p0
    order = np.argsort(cells, kind="stable")
    starts = np.searchsorted(cells[order], cells[order], side="left")
    slot = np.empty_like(order)
    slot[order] = np.arange(len(order)) - starts

    grid = target.reshape([sizes[a] for a in second.output] + [sizes[a] for a in first.input])
    letters = {a: i for i, a in enumerate(second.output)} | {
        a + "'": len(second.output) + i for i, a in enumerate(first.input)
    }
    axes = tuple(range(grid.ndim))
    wanted = [*batch1, *second.free, *(a + "'" for a in batch0), *(a + "'" for a in first.contracted)]
    matrices = gather(grid, axes, tuple(letters[a] for a in wanted)).reshape(
        size(batch1), size(second.free), size(batch0), size(first.contracted)
    )
    u, s, vh = linalg.svd(matrices.swapaxes(1, 2), full_matrices=False)
    values = np.sqrt(s)
    short = max(0, int(slot.max()) + 1 - s.shape[-1])
    left = np.pad(u * values[..., None, :], [(0, 0)] * 3 + [(0, short)])
    right = np.pad(vh * values[..., None], [(0, 0)] * 2 + [(0, short), (0, 0)])

    w0 = np.zeros((size(batch0), size(free0), size(first.contracted)), dtype=target.dtype)
    w1 = np.zeros((size(batch1), size(contracted1), size(second.free)), dtype=target.dtype)
    w0[p0, f0] = right[p1, p0, slot]
    w1[p1, c1] = left[p1, p0, :, slot]

    def laid_out(array: np.ndarray, have: str, axes: str) -> np.ndarray:
        return array.reshape([sizes[a] for a in have]).transpose([have.index(a) for a in axes])

    return [
        laid_out(w0, batch0 + free0 + first.contracted, first.factor),
        laid_out(w1, batch1 + contracted1 + second.free, second.factor),
    ]


@dataclass(frozen=True)
class WeightedCut:
    """The axes of two factors if the columns have a covariance.

    ``near`` is the factor that has the column axes which are not shared, ``far`` the other one. ``rows`` and
    ``shared`` are the row and the column axes of both, ``inside`` the column axes of ``near`` alone.
    """

    rows: Axes
    far: Axes
    near_rows: Axes
    shared: Axes
    inside: Axes
    bond: Axes
    near_first: bool

    @classmethod
    def of(cls, network: Network) -> WeightedCut | None:
        """Return the cut; None if an axis is in rows and columns, or both factors have unshared column axes."""
        columns = set(network.columns)
        if columns & set(network.rows):
            return None
        cut = cut_between(network.outer, *network.factors)
        left, right = (tuple(a for a in axes if a in columns) for axes in (cut.left, cut.right))
        if left and right:
            return None
        near, far = (cut.left, cut.right) if left else (cut.right, cut.left)
        rows, near_rows = (tuple(a for a in axes if a not in columns) for axes in (cut.shared, near))
        shared = tuple(a for a in cut.shared if a in columns)
        return cls(rows, far, near_rows, shared, left or right, cut.bond, bool(left))

    def blocks(self, network: Network, covariance: np.ndarray) -> np.ndarray:
        """Return the covariance with axes (n, k, n, k), n of the shared columns and k of those inside."""
        places = [network.columns.index(a) for a in (*self.shared, *self.inside)]
        blocks = covariance.reshape(network.shape(network.columns) * 2)
        blocks = blocks.transpose(places + [i + len(places) for i in places])
        return blocks.reshape((network.size(self.shared), network.size(self.inside)) * 2)


@dataclass(frozen=True)
class Weighted:
    """Slices (slice, far, near) of a weighted pair, and the same times a root of their covariance."""

    matrices: np.ndarray
    scaled: np.ndarray
    cut: WeightedCut


def weighted(network: Network, target: np.ndarray, covariance: np.ndarray, drop: bool = False) -> Weighted | None:
    """Return slices whose truncation minimizes ``|| (target - A) covariance^(1/2) ||``, or None.

    There must be no diagonal axes, one factor must have all column axes that are not shared, and the covariance must
    not couple different values of the shared ones. With ``drop``, such a coupling is ignored.
    """
    cut = WeightedCut.of(network)
    if cut is None:
        return None
    blocks = cut.blocks(network, covariance)
    n, k = blocks.shape[:2]
    if not drop and np.any(blocks * (1 - np.eye(n))[:, None, :, None]):
        return None
    roots = square_root(blocks[np.arange(n), :, np.arange(n)])
    matrices = gather(target, network.outer, cut.rows + cut.shared + cut.far + cut.near_rows + cut.inside)
    matrices = matrices.reshape(network.size(cut.rows), n, network.size(cut.far + cut.near_rows), k)
    flat = (network.size(cut.rows) * n, network.size(cut.far), -1)
    return Weighted(matrices.reshape(flat), (matrices @ roots).reshape(flat), cut)


def weighted_pair(
    network: Network, target: np.ndarray, covariance: np.ndarray, drop: bool = False
) -> list[np.ndarray] | None:
    """Return the nearest pair in the weighted norm, or None if it has no closed form (:func:`weighted`).

    Each slice minimizes ``|| (M - X Y) R ||`` over X with r columns, where R is a root of the slice's covariance. X
    spans the leading left singular vectors U of ``M R``, and ``X Y = U U^H M``.
    """
    found = weighted(network, target, covariance, drop)
    if found is None:
        return None
    cut = found.cut
    rank = network.size(cut.bond)
    u = leading(found.scaled, min(rank, *found.scaled.shape[1:]))
    inner, near = ranked(u.conj().swapaxes(-1, -2) @ found.matrices, rank, 0.5, None)
    groups = [(u @ inner, cut.far), (near, cut.near_rows + cut.inside)]
    return _laid_out(network, cut.rows + cut.shared, cut.bond, groups[::-1] if cut.near_first else groups)


def square_root(matrix: np.ndarray) -> np.ndarray:
    """Return R with ``R R^H = matrix`` for a positive semidefinite matrix or a batch of them.

    If all are definite, R is the Cholesky factor, which takes a tenth of the time of eigenvectors.
    """
    try:
        return linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        values, vectors = linalg.eigh(matrix)
    return vectors * np.sqrt(np.maximum(values, 0))[..., None, :]


def _laid_out(
    network: Network, shared: Axes, bond: Axes, groups: Sequence[tuple[np.ndarray, Axes]]
) -> list[np.ndarray]:
    """Return arrays (shared, own, bond) with the axes of each factor in their order."""
    factors = []
    for (array, own), wanted in zip(groups, network.factors, strict=True):
        axes = shared + own + bond
        factors.append(gather(array.reshape(network.shape(axes)), axes, wanted))
    return factors
