"""Two factors in a weighted norm whose covariance couples the slices: variable projection and L-BFGS.

Block Tensor-Train and Monarch of two cores are matrices of low-rank blocks: block (s, p) of the rows s and the columns
p that both factors share is any matrix ``X Y`` of the bond's rank. Let ``C_pp = R_p R_p^H`` be the part of the
covariance C that belongs to the columns p. In the coordinates ``W_p R_p`` the covariance has identities on its diagonal
blocks. There the blocks of the start, which leaves out the coupling of the columns, are truncated decompositions.

Put the blocks of one s side by side: its rows are ``X Y``, where Y is block diagonal. For a given Y the best X solves

    X (Y C Y^H) = W C Y^H,

a system whose size is the number of columns p times the rank. By the envelope theorem, the gradient of the error in Y
at that X is ``-2 X^H (W - X Y) C``. L-BFGS (Liu and Nocedal 1989) minimises over Y alone (variable projection: Golub
and Pereyra 1973). A pass costs less than one product ``d_out d_in^2`` at small ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.linalg import get_lapack_funcs
from scipy.optimize import OptimizeResult, minimize

from structlin._threads import linalg, of_stack
from structlin.algebra.numbered import Network
from structlin.projection._contract import expression, gather
from structlin.projection._splits import WeightedCut, pair

ROUNDOFF = 1e-14
RIDGE = 10  # roundoff units added to systems of unit diagonal, which are singular if the covariance is
SINGLE = 1e-2  # relative error at the start above which passes are in single precision
SMALLEST = 1e-3  # least norm of a row of Y at the start, relative to the largest
COARSE = 10  # times the tolerance: 1e-4 ends within 5 % of the optimum for a trained GPT-2, after 15 to 50 passes
CHEAP = 3  # passes for a sweep of alternating least squares, which takes the time of 15 passes or more
ROUGH = 3e-3  # tolerance of an estimate
CHUNK = 2**25  # entries of Y C that are held at a time
MEMORY = 8  # pairs of vectors that L-BFGS keeps


class _LimitError(Exception):
    """The passes are used up."""


class BlockFit:
    """Minimization of ``|| (target - A) covariance^(1/2) ||`` over chains of two factors.

    Made by :meth:`of`, for networks without diagonals whose column axes, but those that both factors share, stand in
    one factor. Arrays have the axes (f, n, e, b k): f and n number the blocks, e belongs to X and b k to Y. Target and
    fit are divided by the norm of the target, ``scale``.
    """

    def __init__(self, network: Network, target: np.ndarray, covariance: np.ndarray, cut: WeightedCut) -> None:
        self._set(network, cut)
        blocks = cut.blocks(network, covariance)
        f, e, _, n, k = self.sizes
        values, vectors = linalg.eigh(blocks[np.arange(n), :, np.arange(n)])
        values = np.maximum(values, 0)
        tiny = values <= values.max() * k * np.finfo(float).eps
        self.roots = vectors * np.sqrt(values)[:, None, :]
        scales = np.where(tiny, 0, 1 / np.sqrt(np.where(tiny, 1, values)))
        self.inverses = scales[..., None] * vectors.conj().swapaxes(-1, -2)
        half = self.inverses @ blocks.reshape(n, k, n * k)
        whole = half.reshape(n * k, n, k).swapaxes(0, 1) @ self.inverses.conj().swapaxes(-1, -2)
        self.covariance = whole.reshape(n, n, k, k).transpose(1, 2, 0, 3).copy()
        self.covariance[np.arange(n), :, np.arange(n)] = np.eye(k)
        self.covariance = self.covariance.reshape(n, k, n * k)
        target = self._blocks(target)
        image = _coupled(target, self.covariance).reshape(f, n, e, n, -1).sum(axis=1).swapaxes(1, 2)
        self.scale = float(np.sqrt(max(0.0, np.vdot(target, image).real))) or 1.0
        self.target, self.image = target / self.scale, image / self.scale
        self.arrays: dict[np.dtype[Any], tuple[np.ndarray, ...]] = {
            target.dtype: (self.target, self.image, self.covariance)
        }
        self.values = linalg.svd(self.target, full_matrices=False)

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
        """Return the blocks of an array on the axes of the network, times the roots of their covariances."""
        f, e, b, n, k = self.sizes
        blocks = gather(array, self.network.outer, self.axes).reshape(f, e * b, n, k).swapaxes(1, 2) @ self.roots
        return blocks.reshape(f, n, e, b * k)

    def _factors(self, blocks: np.ndarray) -> list[np.ndarray]:
        """Return the factors of the matrix that has these blocks."""
        f, e, b, n, k = self.sizes
        matrix = self.scale * (blocks.reshape(f, n, e * b, k) @ self.inverses).swapaxes(1, 2)
        return pair(self.network, gather(matrix.reshape(self.network.shape(self.axes)), self.axes, self.network.outer))

    def run(
        self, factors: Sequence[np.ndarray] | None, sweeps: int, tolerance: float
    ) -> tuple[list[np.ndarray], float, int, bool]:
        """Return (factors, residual norm, passes, converged), as :meth:`structlin.projection._als.Fit.run` does.

        Without ``factors``, the start is the nearest matrix for the covariance without coupling of the blocks.
        """
        found = self.values
        if factors is not None:
            constants = [axes for axes, _ in self.network.constants]
            product = expression([*self.network.factors, *constants], self.network.outer, self.network.sizes)
            start = self._blocks(product(*factors, *(array for _, array in self.network.constants)))
            found = linalg.svd(start / self.scale, full_matrices=False)
        Y, _, passes, converged = self._minimise(found[1], found[2], sweeps, tolerance, tolerance >= 1e-5)
        blocks, square, _ = self._project(Y)
        return self._factors(blocks), self.scale * square**0.5, passes, converged

    def error_after(self, sweeps: int) -> float:
        """Return the error after a few passes in place of ``sweeps`` sweeps of alternating least squares."""
        return self._minimise(self.values[1], self.values[2], CHEAP * sweeps, ROUGH, True)[1]

    def _project(self, Y: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """Return the blocks of the best matrix for Y (f, n, r, b k), its squared error, and half the gradient in Y."""
        if Y.dtype not in self.arrays:
            self.arrays[Y.dtype] = tuple(array.astype(Y.dtype) for array in self.arrays[self.target.dtype])
        target, image, covariance = self.arrays[Y.dtype]
        blocks, slope, square = np.empty_like(target), np.empty_like(Y), 0.0
        some = max(1, CHUNK * len(Y) // (Y.size * Y.shape[1]))
        for start in range(0, len(Y), some):
            at = slice(start, start + some)
            blocks[at], part, slope[at] = _projected(Y[at], target[at], image[at], covariance)
            square += part
        return blocks, max(0.0, square), slope

    def _minimise(
        self, norms: np.ndarray, rows: np.ndarray, passes: int, tolerance: float, single: bool
    ) -> tuple[np.ndarray, float, int, bool]:
        """Return Y, its error, passes and whether they converged, from singular values and right vectors of a start.

        X makes up for the norms of the rows of Y. If these are the singular values, the Hessian is near the identity.
        With ``single``, passes are in single precision if the error is large enough for that.
        """
        least = max(float(norms.max(initial=0)) * SMALLEST, float(np.finfo(np.float32).tiny))
        Y = np.maximum(norms[..., : self.rank], least)[..., None] * rows[..., : self.rank, :]
        wide, kind = Y.dtype, np.dtype(np.complex64 if np.iscomplexobj(Y) else np.float32)
        used = 1
        if not single or (start := self._project(Y.astype(kind)))[1] <= SINGLE**2:
            used += single
            kind, start = wide, self._project(Y)
        square, step, shape = start[1], float(np.linalg.norm(start[2])), Y.shape
        calm, last, converged = 0, square, square <= ROUNDOFF**2 or step <= ROUNDOFF
        if used >= passes or converged:
            return Y, self.scale * square**0.5, used, converged
        known, best = [start], (math.inf, Y.reshape(-1).view(float))

        def half_square(vector: np.ndarray) -> tuple[float, np.ndarray]:
            """Return half the squared error and its gradient, both relative to a step along the first gradient."""
            nonlocal used, best
            if not known and used >= passes:
                raise _LimitError
            used += not known
            found = known.pop() if known else self._project((step * vector).view(wide).reshape(shape).astype(kind))
            value = found[1] / (2 * step**2)
            if value < best[0]:
                best = value, vector.copy()
            return value, found[2].astype(wide).reshape(-1).view(float) / step

        def stop(intermediate_result: OptimizeResult) -> None:
            nonlocal calm, last, converged
            value = 2 * step**2 * intermediate_result.fun
            calm = calm + 1 if last - value <= 2 * COARSE * tolerance * last else 0
            last, converged = value, calm == 3 or value <= ROUNDOFF**2
            if converged:
                raise StopIteration

        try:
            found = minimize(  # its first step has length 1
                half_square, np.ascontiguousarray(Y / step).reshape(-1).view(float), jac=True, method="L-BFGS-B",
                callback=stop,
                options={"maxiter": passes, "maxfun": 2 * passes, "maxcor": MEMORY, "ftol": 0, "gtol": 0},
            )  # fmt: skip
            best, converged = (found.fun, found.x), converged or tolerance > 0  # or roundoff ended the search
        except _LimitError:
            pass
        error = self.scale * step * max(0.0, 2 * best[0]) ** 0.5
        return step * best[1].view(wide).reshape(shape), error, used, converged


def _coupled(blocks: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Return the product (f, n r, n b k) of a block-diagonal matrix, of blocks (f, n, r, b k), with the covariance."""
    (f, n, r, _), k = blocks.shape, covariance.shape[1]
    product = blocks.swapaxes(0, 1).reshape(n, -1, k) @ covariance
    return product.reshape(n, f, r, -1, n, k).transpose(1, 0, 2, 4, 3, 5).reshape(f, n * r, -1)


def _projected(
    Y: np.ndarray, target: np.ndarray, best: np.ndarray, covariance: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """As :meth:`BlockFit._project`, for some rows of blocks; ``best`` is the target times the covariance."""
    f, n, r, _ = Y.shape
    image, adjoint = _coupled(Y, covariance), Y.conj().swapaxes(-1, -2).copy()
    system = image.reshape(f, n * r, n, -1).swapaxes(1, 2) @ adjoint
    system = system.swapaxes(1, 2).reshape(f, n * r, n * r)
    right = (best @ adjoint).swapaxes(1, 2).reshape(f, -1, n * r)
    norms = np.sqrt(np.einsum("fii->fi", system).real)[..., None]
    norms = np.where(norms == 0, 1, norms)
    system = system / norms / norms.swapaxes(1, 2)
    system += (RIDGE * np.finfo(Y.dtype).eps) * np.eye(n * r, dtype=Y.dtype)
    X = _divided(right / norms.swapaxes(1, 2), system) / norms.swapaxes(1, 2)
    slope = best - (X @ image).reshape(f, -1, n, best.shape[-1]).swapaxes(1, 2)
    X = X.reshape(f, -1, n, r).swapaxes(1, 2)
    blocks = X @ Y
    square = float(np.vdot(target - blocks, slope).real)
    return blocks, square, -(X.conj().swapaxes(-1, -2) @ slope)


def _divided(right: np.ndarray, systems: np.ndarray) -> np.ndarray:
    """Return ``right @ systems^-1`` for Hermitian systems, by Cholesky decompositions where they are definite."""
    (solve,) = get_lapack_funcs(("posv",), (systems,))  # np.linalg.solve takes twice as long
    found = np.empty_like(right)
    with of_stack(systems):
        for x, b, system in zip(found, right, systems, strict=True):
            _, solution, info = solve(system.T, b.T)
            x[...] = (np.linalg.solve(system.T, b.T) if info else solution).T
    return found
