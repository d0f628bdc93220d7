"""Robust fits of many problems at once: Huber losses of ``log L - log(E + A N^-alpha + B D^-beta)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MAX_EXPONENT = 10.0
_LEAST = -30.0  # lower bound of log E and of the logarithms of both terms at the centre, relative to the smallest loss
_STEPS = 300


class Problem:
    """Points of one or several groups, and the mapping from the parameters of the fit to the terms of each group.

    The terms of a point are ``p[index[group]]``, in the order log E, log A, alpha, log B, beta. Both coefficients are
    taken at the geometric mean of the sizes (``centre``), where they are nearly independent of the exponents.

    `n`, `d` and `y` are the logarithms of both sizes and of the loss, and `group` the index of the group of each point,
    of shape (points,). As attributes, the logarithms are relative to `centre`: the means of the sizes, and the smallest
    loss. `index` is the index of each term in the parameters, shape (groups, 5), and `delta` the threshold of the Huber
    loss.
    """

    def __init__(self, n: Array, d: Array, y: Array, group: Array, index: Array, delta: float) -> None:
        self.centre = n.mean(), d.mean(), y.min()
        self.n, self.d, self.y = n - self.centre[0], d - self.centre[1], y - self.centre[2]
        self.group, self.index, self.delta = group, index, delta
        self.size = int(index.max()) + 1
        kinds = np.empty(self.size, dtype=int)
        kinds[index.ravel()] = np.tile(np.arange(5), len(index))
        exponent = np.isin(kinds, (2, 4))
        self.lower = np.where(exponent, 0.0, _LEAST)
        self.upper = np.where(exponent, MAX_EXPONENT, np.where(kinds == 0, float(self.y.max()), -_LEAST))

    def natural(self, p: Array) -> Array:
        """Convert parameters, shape (k, size), to those of the laws, shape (k, groups, 5)."""
        q = p[:, self.index].copy()
        q[..., 1] += q[..., 2] * self.centre[0]
        q[..., 3] += q[..., 4] * self.centre[1]
        q[..., (0, 1, 3)] += self.centre[2]
        return q

    def logs(self, p: Array) -> tuple[Array, Array, Array]:
        """Return the logarithms of the three terms at every point, for parameters of shape (k, size)."""
        q = p[:, self.index[self.group]]
        return q[..., 0], q[..., 1] - q[..., 2] * self.n, q[..., 3] - q[..., 4] * self.d

    def predicted(self, p: Array) -> Array:
        """Return the logarithm of the law at every point, shape (k, points)."""
        return np.logaddexp.reduce(self.logs(p), axis=0)

    def value(self, p: Array, y: Array, weights: Array) -> Array:
        """Return the objective, shape (k,)."""
        r = np.abs(y - self.predicted(p))
        huber = np.where(r <= self.delta, 0.5 * r * r, self.delta * (r - 0.5 * self.delta))
        return (weights * huber).sum(axis=1)

    def jacobian(self, p: Array) -> Array:
        """Return the derivatives of the predicted logarithms, of shape (k, points, size)."""
        terms = np.stack(self.logs(p))
        e, a, b = np.exp(terms - np.logaddexp.reduce(terms, axis=0))
        own = np.stack([e, a, -a * self.n, b, -b * self.d], axis=-1)
        found = np.zeros((*own.shape[:2], self.size))
        points = np.arange(own.shape[1])
        for column in range(5):
            found[:, points, self.index[self.group, column]] += own[..., column]
        return found

    def gradient(self, p: Array, y: Array, weights: Array) -> Array:
        """Return the derivatives of the objective, of shape (k, size)."""
        pull = weights * np.clip(y - self.predicted(p), -self.delta, self.delta)
        return -np.einsum("ki,kij->kj", pull, self.jacobian(p))

    def solve(self, start: Array, y: Array | None = None, weights: Array | None = None) -> tuple[Array, Array]:
        """Minimise from each of the k starts.

        The method is iteratively reweighted least squares: damped Gauss-Newton steps on a quadratic upper bound of the
        Huber loss. A step is accepted if the objective decreases. All problems are computed at once.

        `y` and `weights`, of shape (points,) for all starts or (k, points), replace the data and the weights 1. Returns
        parameters and objective, of shapes (k, size) and (k,).
        """
        k = len(start)
        data = np.broadcast_to(self.y if y is None else y, (k, len(self.y)))
        weight = np.broadcast_to(1.0 if weights is None else weights, data.shape)
        best = np.clip(start, self.lower, self.upper)
        value = self.value(best, data, weight)
        damping = np.full(k, 1e-3)
        still = np.zeros(k, dtype=int)
        going = np.arange(k)
        for _ in range(_STEPS):
            if not len(going):
                break
            p, own, w, lam = best[going], data[going], weight[going], damping[going]
            residual = own - self.predicted(p)
            jacobian = self.jacobian(p)
            # The weight psi(r) / r of a square in iteratively reweighted least squares.
            curvature = w * self.delta / np.maximum(np.abs(residual), self.delta)
            pull = np.einsum("ki,kij->kj", curvature * residual, jacobian)
            square = np.einsum("kij,ki,kil->kjl", jacobian, curvature, jacobian, optimize=True)
            # A parameter at its bound does not move if the gradient points outwards.
            held = ((p <= self.lower) & (pull < 0)) | ((p >= self.upper) & (pull > 0))
            pull[held] = 0
            square *= ~held[:, :, None] & ~held[:, None, :]
            scale = np.einsum("kjj->kj", square)
            floor = 1e-10 * scale.max(axis=1, keepdims=True) + 1e-300
            index = np.arange(self.size)
            square[:, index, index] += lam[:, None] * scale + floor + held
            step = np.linalg.solve(square, pull[..., None])[..., 0]
            tried = np.clip(p + step, self.lower, self.upper)
            found = self.value(tried, own, w)
            better = found < value[going]
            gain = (value[going] - found) / np.maximum(value[going], 1e-300)
            damping[going] = np.clip(np.where(better, lam * 0.3, lam * 5), 1e-12, 1e12)
            # Stop after several small gains in a row, or if no damped step decreases the objective.
            still[going] = np.where(better & (gain > 1e-11), 0, still[going] + 1)
            chosen = going[better]
            best[chosen], value[chosen] = tried[better], found[better]
            going = going[(still[going] < 8) & (value[going] > 1e-28)]
        return best, value
