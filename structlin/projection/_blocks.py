"""Block descent, then L-BFGS, for two factors in a weighted norm whose covariance couples the slices.

Block Tensor-Train and Monarch of two cores are matrices of low-rank blocks. Block (s, p) of the rows s and the columns
p that both factors share is any matrix ``X Y`` of the bond's rank. Let ``C_pp = R_p R_p^H`` be the diagonal block of
the covariance C for the columns p. In the coordinates ``W_p R_p`` the diagonal blocks of the covariance are identities.
With all other columns held fixed, the optimal blocks of one p are the nearest matrices of low rank to

    S_p = W_p R_p + sum_q (W - A)_q R_q Z_qp,    Z_qp = R_q^+ C_qp R_p^(-H) for q != p.

A sweep makes one over-relaxed step of subspace iteration towards them for each p. Relaxation halves the number of
sweeps. If C couples the columns strongly, sweeps converge slowly, and L-BFGS over all factors needs fewer passes (Liu
and Nocedal 1989, On the limited memory BFGS method). A pass of either costs about one product ``d_out d_in^2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, minimize

from structlin.algebra.numbered import Network
from structlin.projection._contract import expression, gather
from structlin.projection._leading import orthonormal
from structlin.projection._splits import WeightedCut, pair

ROUNDOFF = 1e-14
SWEEPS = 4  # sweeps before L-BFGS, whose first passes gain less than a sweep
RELAXATION = 0.3  # over-relaxation: the fraction of a step that is added to it
MEMORY = 4  # pairs of vectors that L-BFGS keeps


class BlockFit:
    """Minimization of ``|| (target - A) covariance^(1/2) ||`` over chains of two factors.

    ``target`` has the axes ``network.outer``. The network must have no axis in both rows and columns, and one factor
    must have all column axes that the factors do not share. :meth:`of` checks both.
    """

    def __init__(self, network: Network, target: np.ndarray, covariance: np.ndarray, cut: WeightedCut) -> None:
        self._set(network, cut)
        blocks = cut.blocks(network, covariance)
        f, e, b, n, k = self.sizes
        values, vectors = np.linalg.eigh(blocks[np.arange(n), :, np.arange(n)])
        values = np.maximum(values, 0)
        tiny = values <= values.max() * k * np.finfo(float).eps
        self.roots = vectors * np.sqrt(values)[:, None, :]
        scales = np.where(tiny, 0, 1 / np.sqrt(np.where(tiny, 1, values)))
        self.inverses = scales[..., None] * vectors.conj().swapaxes(-1, -2)
        half = (self.inverses @ blocks.reshape(n, k, n * k)).reshape(n * k, n, k).swapaxes(0, 1)
        coupling = half @ self.inverses.conj().swapaxes(-1, -2)  # (n, n k, k): the columns of each block
        places_of = np.arange(n * k).reshape(n, k)
        coupling[np.arange(n)[:, None], places_of] = 0
        self.coupling = coupling
        self.covariance = coupling.swapaxes(0, 1).reshape(n * k, n * k) + np.eye(n * k)
        self.target = self._blocks(target)
        self.values = np.linalg.svd(self.target.reshape(n, f, e, b * k), full_matrices=False)
        self.scale = self._norm(self._rest(np.zeros((), target.dtype)))

    def _set(self, network: Network, cut: WeightedCut) -> None:
        """Set the network; another network with these decompositions may differ only in the size of its bond."""
        order = (cut.rows, cut.far, cut.near_rows, cut.shared, cut.inside)
        self.network, self.axes, self.sizes = network, sum(order, ()), tuple(map(network.size, order))
        _, e, b, _, k = self.sizes
        self.rank = min(network.size(cut.bond), e, b * k)

    @classmethod
    def of(
        cls, network: Network, target: np.ndarray, covariance: np.ndarray, known: dict[Any, BlockFit] | None = None
    ) -> BlockFit | None:
        """Return the fit of a network, or None if the class does not apply to it.

        ``known`` is a cache for one target and covariance. Networks that differ in the size of the bond share all
        decompositions.
        """
        cut = None if len(network.factors) != 2 or network.joined else WeightedCut.of(network)
        if cut is None:
            return None
        order = (cut.rows, cut.far, cut.near_rows, cut.shared, cut.inside)
        if set(sum(order, ())) != set(network.outer):
            return None  # an axis occurs in no factor
        key = (*(tuple(map(network.outer.index, axes)) for axes in order), network.shape(network.outer))
        if known is None or key not in known:
            made = cls(network, target, covariance, cut)
            return made if known is None else known.setdefault(key, made)
        known[key]._set(network, cut)
        return known[key]

    def _blocks(self, array: np.ndarray) -> np.ndarray:
        """Return blocks of columns, (n, f e b, k), times the roots of their covariances."""
        f, e, b, n, k = self.sizes
        matrix = gather(array, self.network.outer, self.axes).reshape(f * e * b, n, k)
        return np.ascontiguousarray(matrix.swapaxes(0, 1)) @ self.roots

    def _factors(self, blocks: np.ndarray) -> list[np.ndarray]:
        """Return the factors of the matrix that has these blocks."""
        f, e, b, n, k = self.sizes
        matrix = (blocks.reshape(n, f * e * b, k) @ self.inverses).swapaxes(0, 1)
        return pair(self.network, gather(matrix.reshape(self.network.shape(self.axes)), self.axes, self.network.outer))

    def _rest(self, matrix: np.ndarray) -> np.ndarray:
        """Return target minus blocks (n, f, e, b k), with shape (f e b, n k)."""
        rest = self.target - matrix.reshape(self.target.shape if matrix.ndim else ())
        return np.ascontiguousarray(rest.swapaxes(0, 1)).reshape(rest.shape[1], -1)

    def _norm(self, rest: np.ndarray) -> float:
        return float(np.sqrt(max(0.0, np.vdot(rest, rest @ self.covariance).real)))

    def run(
        self, factors: Sequence[np.ndarray] | None, sweeps: int, tolerance: float
    ) -> tuple[list[np.ndarray], float, int, bool]:
        """Return (factors, residual norm, passes, converged), as :meth:`structlin.projection._als.Fit.run` does.

        Without ``factors``, the start is the nearest matrix for the covariance without coupling of the blocks.
        """
        _, e, b, n, k = self.sizes
        found = self.values
        if factors is not None:
            constants = [axes for axes, _ in self.network.constants]
            product = expression([*self.network.factors, *constants], self.network.outer, self.network.sizes)
            start = self._blocks(product(*factors, *(array for _, array in self.network.constants)))
            found = np.linalg.svd(start.reshape(n, -1, e, b * k), full_matrices=False)
        X, Y, error, used, done = self._descend(found, sweeps, tolerance)
        return self._factors(X @ Y), error, used, done

    def error_after(self, sweeps: int) -> float:
        """Return the error after ``sweeps`` sweeps."""
        return self._descend(self.values, min(sweeps, SWEEPS), 0.0)[2]

    def _descend(
        self, start: tuple[np.ndarray, np.ndarray, np.ndarray], sweeps: int, tolerance: float
    ) -> tuple[np.ndarray, np.ndarray, float, int, bool]:
        """Return factors, error, passes and whether they converged, from singular values of a start's blocks."""
        u, s, v = start
        X, Y = u[..., : self.rank], s[..., : self.rank, None] * v[..., : self.rank, :]
        error = self._norm(self._rest(X @ Y))
        used, calm, done, more = 0, 0, error <= ROUNDOFF * self.scale, RELAXATION
        while used < sweeps and not done:
            before, trial = error, self._sweep(X, Y, more if used else 0.0)
            found = self._norm(self._rest(trial[0] @ trial[1]))
            if found > error and more:  # a step that is too long
                more = 0.0
                continue
            (X, Y), error, used = trial, found, used + 1
            calm = calm + 1 if before - error <= tolerance * before else 0
            done = error <= ROUNDOFF * self.scale or calm == 3
            if used == SWEEPS and not done and used < sweeps:
                single = tolerance >= 1e-5 and error > 1e-2 * self.scale
                X, Y, error, passes = self._quasi_newton(X, Y, error, sweeps - used, tolerance, single)
                used, more, calm = used + passes, 0.0, 2
        return X, Y, error, used, done

    def _sweep(self, X: np.ndarray, Y: np.ndarray, more: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the factors after a step towards the optimum of each block of columns in turn; X is orthonormal."""
        f, e, b, n, k = self.sizes
        rest = self._rest(X @ Y)
        X, Y = X.copy(), Y.copy()
        for p in range(n):
            mine = rest[:, p * k : (p + 1) * k]
            S = self.target[p] + rest @ self.coupling[p]
            if more:
                S += more * (S - self.target[p] + mine)
            S = S.reshape(f, e, b * k)
            X[p] = orthonormal(S @ (S.conj().swapaxes(-1, -2) @ X[p]))
            Y[p] = X[p].conj().swapaxes(-1, -2) @ S
            mine[...] = self.target[p] - (X[p] @ Y[p]).reshape(-1, k)
        return X, Y

    def _quasi_newton(
        self, X: np.ndarray, Y: np.ndarray, error: float, passes: int, tolerance: float, single: bool
    ) -> tuple[np.ndarray, np.ndarray, float, int]:
        """Return the factors after L-BFGS, X orthonormal again, with the error and the number of passes.

        With ``single`` its passes are in single precision.
        """
        f, e, b, n, k = self.sizes
        norms = np.linalg.norm(Y, axis=-1)
        root = np.sqrt(np.where(norms == 0, 1, norms))
        X, Y = X * root[..., None, :], Y / root[..., None]
        split, calm, last, kind = X.size, 0, 1.0, X.dtype
        target, covariance = self.target, self.covariance
        if single:
            kind = np.result_type(np.complex64 if np.iscomplexobj(X) else np.float32)
            target, covariance = target.astype(kind), covariance.astype(kind)

        def parts(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            vector = vector.view(X.dtype)
            return vector[:split].reshape(X.shape), vector[split:].reshape(Y.shape)

        def half_square(vector: np.ndarray) -> tuple[float, np.ndarray]:
            """Return the squared error relative to that at the start, and its gradient."""
            x, y = (part.astype(kind, copy=False) for part in parts(vector))
            rest = target - (x @ y).reshape(target.shape)
            rest = np.ascontiguousarray(rest.swapaxes(0, 1)).reshape(len(target[0]), -1)
            image = rest @ covariance
            slope = image.reshape(-1, n, k).swapaxes(0, 1).reshape(n, f, e, b * k)
            slopes = (slope @ y.conj().swapaxes(-1, -2), x.conj().swapaxes(-1, -2) @ slope)
            gradient = np.concatenate([part.ravel() for part in slopes]).astype(X.dtype, copy=False).view(float)
            return float(np.vdot(rest, image).real) / error**2, gradient * (-2 / error**2)

        def stop(intermediate_result: OptimizeResult) -> None:
            nonlocal calm, last
            value = intermediate_result.fun
            calm = calm + 1 if last - value <= 2 * tolerance * last else 0
            last = value
            if calm == 3:
                raise StopIteration

        found = minimize(
            half_square, np.concatenate([X.ravel(), Y.ravel()]).view(float), jac=True, method="L-BFGS-B", callback=stop,
            options={"maxiter": passes, "maxfun": passes, "maxcor": MEMORY, "ftol": 0, "gtol": 0},
        )  # fmt: skip
        X, Y = parts(found.x)
        X, turn = np.linalg.qr(X)
        Y = turn @ Y
        return X, Y, self._norm(self._rest(X @ Y)), found.nfev
