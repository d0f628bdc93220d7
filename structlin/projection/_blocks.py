"""Two factors in a weighted norm whose covariance couples the slices: descent over blocks of columns.

Block Tensor-Train and Monarch of two cores are matrices of low-rank blocks: block (s, p) of the rows s and the columns
p that both factors share is any matrix ``X Y`` of the bond's rank. With all other columns held fixed, the blocks of one
p are a weighted low-rank problem each, with the closed form of :func:`structlin.projection._splits.weighted_pair`:
with R the residual without them and C_pp their own part of the covariance C,

    min || R C^(1/2) - X Y E_p C^(1/2) ||  is  min || (M - X Y) C_pp^(1/2) ||  for  M = (R C)_p C_pp^+.

The first sweep takes both factors of each block to their joint optimum. Later ones make one step of subspace iteration
from the last basis X, which is an exact least-squares step for Y and one for X: the error never rises, the limit is the
same, and no singular values are computed. A sweep costs about one product ``d_out d_in^2``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from structlin.algebra.numbered import Axes, Network
from structlin.projection._contract import expression, gather
from structlin.projection._leading import leading, orthonormal
from structlin.projection._splits import cut_between, pair

ROUNDOFF = 1e-14
FRESH = 10  # sweeps after which the gradient, which each block updates, is computed anew; it takes as long as a sweep


class BlockFit:
    """``min || (target - A) covariance^(1/2) ||`` over chains of two factors, ``target`` on the axes of the network.

    Made by :meth:`of`, for networks without diagonals whose column axes, but those that both factors share, stand in
    one factor.
    """

    def __init__(self, network: Network, target: np.ndarray, covariance: np.ndarray, order: tuple[Axes, ...]) -> None:
        self.network = network
        rows, far, near_rows, shared, inside = order
        self.axes = rows + far + near_rows + shared + inside
        self.sizes = tuple(network.size(axes) for axes in (rows, far, near_rows, shared, inside))
        self.target = self._matrix(target)
        n, k = self.sizes[3:]
        places = [network.columns.index(a) for a in (*shared, *inside)]
        blocks = covariance.reshape(network.shape(network.columns) * 2)
        self.covariance = blocks.transpose(places + [i + len(places) for i in places]).reshape(n * k, n * k)
        own = self.covariance.reshape(n, k, n, k)[np.arange(n), :, np.arange(n)]
        values, vectors = np.linalg.eigh(own)
        values = np.maximum(values, 0)
        tiny = values <= values.max() * k * np.finfo(float).eps
        self.roots = vectors * np.sqrt(values)[:, None, :]
        inverse = np.where(tiny, 0, 1 / np.where(tiny, 1, values))
        self.inverses = (vectors * inverse[:, None, :]) @ vectors.conj().swapaxes(-1, -2)
        self.bond = network.size(cut_between(network.outer, *network.factors).bond)
        operands = [*network.factors, *(axes for axes, _ in network.constants)]
        self._product = expression(operands, network.outer, network.sizes)

    @classmethod
    def of(cls, network: Network, target: np.ndarray, covariance: np.ndarray) -> BlockFit | None:
        """None where the network is another one."""
        columns = set(network.columns)
        if len(network.factors) != 2 or network.joined or columns & set(network.rows):
            return None
        cut = cut_between(network.outer, *network.factors)
        left, right = (tuple(a for a in axes if a in columns) for axes in (cut.left, cut.right))
        if left and right:
            return None
        near, far = (cut.left, cut.right) if left else (cut.right, cut.left)
        shared = tuple(a for a in cut.shared if a in columns)
        rows = tuple(a for a in cut.shared if a not in columns)
        near_rows = tuple(a for a in near if a not in columns)
        if {*rows, *far, *near_rows, *shared, *left, *right} != set(network.outer):
            return None  # an axis that stands in no factor
        return cls(network, target, covariance, (rows, far, near_rows, shared, left or right))

    def _matrix(self, array: np.ndarray) -> np.ndarray:
        """(rows, columns), each in the order of the blocks."""
        f, e, b, n, k = self.sizes
        return gather(array, self.network.outer, self.axes).reshape(f * e * b, n * k)

    def _tensor(self, matrix: np.ndarray) -> np.ndarray:
        return gather(matrix.reshape(self.network.shape(self.axes)), self.axes, self.network.outer)

    def run(
        self, factors: Sequence[np.ndarray], sweeps: int, tolerance: float
    ) -> tuple[list[np.ndarray], float, int, bool]:
        """As :meth:`structlin.projection._als.Fit.run`: (factors, residual norm, sweeps, converged)."""
        f, e, b, n, k = self.sizes
        C = self.covariance
        A = self._matrix(self._product(*factors, *(array for _, array in self.network.constants)))
        scale = self._norm(self.target, self.target @ C)
        G = (self.target - A) @ C
        error, calm, sweep, done = self._norm(self.target - A, G), 0, 0, False
        bases: list[np.ndarray] = []
        while sweep < sweeps and not done:
            sweep += 1
            before = error
            for p in range(n):
                mine = slice(p * k, (p + 1) * k)
                M = (G[:, mine] + A[:, mine] @ C[mine, mine]) @ self.inverses[p]
                scaled = (M @ self.roots[p]).reshape(f, e, b * k)
                if sweep == 1:
                    bases.append(leading(scaled, min(self.bond, e, b * k)))
                else:  # a step of subspace iteration from the last basis: alternating least squares on this block
                    adjoint = scaled.conj().swapaxes(-1, -2)
                    bases[p] = orthonormal(scaled @ (adjoint @ bases[p]))
                X = bases[p]
                new = (X @ (X.conj().swapaxes(-1, -2) @ M.reshape(f, e, b * k))).reshape(-1, k)
                G -= (new - A[:, mine]) @ C[mine]
                A[:, mine] = new
            error = self._norm(self.target - A, G)
            if sweep % FRESH == 0 or error < 1e-3 * scale or sweep == sweeps:  # no roundoff piles up
                G = (self.target - A) @ C
                error = self._norm(self.target - A, G)
            calm = calm + 1 if before - error <= tolerance * before else 0
            done = error <= ROUNDOFF * scale or calm == 3
        return pair(self.network, self._tensor(A)), error, sweep, done

    @staticmethod
    def _norm(x: np.ndarray, weighted: np.ndarray) -> float:
        return float(np.sqrt(max(0.0, np.vdot(x, weighted).real)))
