"""Alternating least squares on a network: each step solves for one factor with the others held fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_solve

from structlin._threads import linalg
from structlin.algebra.numbered import Axes, Network
from structlin.projection._contract import expression

MAX_ELEMENTS = 2**25  # entries of one batch of normal matrices
MAX_CUBE = 2**34  # batch * size^3 of one batch, which is proportional to the work of its solution
MAX_EIGH = 64  # largest normal matrix that is solved by eigenvalues
MAX_CG = 30  # conjugate-gradient iterations of a step whose normal matrices are too large
MEMORY = 8  # sweeps that Anderson mixing combines
ROUNDOFF = 1e-14  # ratio of residual to target below which a fit counts as exact


@dataclass(frozen=True)
class _Block:
    """One connected part of the normal equations of a factor.

    The normal matrices have axes (pinned, coupled, coupled'): pinned axes of the factor number the matrices.
    """

    operands: tuple[int, ...]
    pinned: Axes
    coupled: Axes
    contract: Callable[..., Any]


class Fit:
    """Minimization of ``|| target - A(factors) ||`` over the factors of a network by least-squares steps.

    ``target`` has the axes ``network.outer``. ``mask`` has the same axes; entries where it is 0 are excluded.
    ``weight``, of shape (columns of the network, k), multiplies the matrix from the right. With a weight, ``target``
    has the axes (rows, k), and ``mask`` those of the rows.
    """

    def __init__(
        self, network: Network, target: np.ndarray, *, mask: np.ndarray | None = None, weight: np.ndarray | None = None
    ) -> None:
        self.network, self.target, self.mask = network, target, mask
        self.sizes = dict(network.sizes)
        self.outer, self.constants = network.outer, list(network.constants)
        self.masked_axes = network.outer if weight is None else tuple(dict.fromkeys(network.rows))
        self.weight_at: int | None = None
        self.normal_weight: np.ndarray | None = None
        if weight is not None:
            end = self._new(weight.shape[1])
            self.outer = (*dict.fromkeys(network.rows), end)
            self.weight_at = len(network.factors) + len(self.constants)
            self.constants.append(((*network.columns, end), weight.reshape((*network.shape(network.columns), -1))))
            matrix = weight.conj() @ weight.T
            self.normal_weight = matrix.reshape(network.shape(network.columns) * 2)
        self.axes: list[Axes] = [*network.factors, *(axes for axes, _ in self.constants)]
        self.fixed = [array for _, array in self.constants]
        self._product = expression(self.axes, self.outer, self.sizes)
        self._gradients = [
            expression([self.outer, *(a for j, a in enumerate(self.axes) if j != k)], self.axes[k], self.sizes)
            for k in range(len(network.factors))
        ]
        self._prime = {a: self._new(self.sizes[a]) for a in sorted({a for x in self.axes for a in x} - set(self.outer))}
        self._blocks = [self._plan(k) for k in range(len(network.factors))]

    def _new(self, size: int) -> int:
        number = max(self.sizes, default=-1) + 1
        self.sizes[number] = size
        return number

    # -- evaluation ------------------------------------------------------------------------------------------------

    def residual(self, factors: Sequence[np.ndarray]) -> np.ndarray:
        """Return target minus matrix on the entries that are not masked."""
        return self._masked(self.target - self._product(*factors, *self.fixed))

    def _masked(self, array: np.ndarray) -> np.ndarray:
        if self.mask is None:
            return array
        return array * (self.mask if self.weight_at is None else self.mask[..., None])

    def _gradient(self, k: int, factors: Sequence[np.ndarray], residual: np.ndarray) -> np.ndarray:
        others = [a.conj() for j, a in enumerate([*factors, *self.fixed]) if j != k]
        return self._gradients[k](residual, *others)

    def exact(self, k: int) -> bool:
        """Whether a step solves the equations of factor k directly, not by conjugate gradients."""
        return self._blocks[k][0]

    # -- normal equations ------------------------------------------------------------------------------------------

    def _plan(self, k: int) -> tuple[bool, list[_Block]]:
        """Return whether factor k's normal equations are solved directly, and their blocks.

        If a block is too large, its largest axes are pinned. Its block diagonal remains, and is a preconditioner.
        """
        pinned = {a for a in self.axes[k] if a in self.outer}
        exact = True
        while True:
            blocks = self._connected(k, pinned)
            for block in blocks:
                count = np.prod([self.sizes[a] for a in block.pinned], dtype=float)
                size = np.prod([self.sizes[a] for a in block.coupled], dtype=float)
                if len(block.coupled) > 1 and (count * size**2 > MAX_ELEMENTS or count * size**3 > MAX_CUBE):
                    pinned.add(max(block.coupled, key=lambda a: self.sizes[a]))
                    exact = False
                    break
            else:
                return exact, blocks

    def _connected(self, k: int, pinned: set[int]) -> list[_Block]:
        groups: list[tuple[set[int], set[int]]] = []  # (operands, axes that connect them)
        for number, axes in enumerate(self.axes):
            if number == k:
                continue
            members, ties = {number}, set(axes) - pinned
            apart = []
            for group in groups:
                if group[1] & ties:
                    members, ties = members | group[0], ties | group[1]
                else:
                    apart.append(group)
            groups = [*apart, (members, ties)]
        if self.mask is not None:
            groups = [(set().union(*(g[0] for g in groups)), set())]
        blocks = []
        for members, _ in groups:
            have = {a for j in members for a in self.axes[j]} | (
                set(self.masked_axes) if self.mask is not None else set()
            )
            coupled = tuple(a for a in self.axes[k] if a in have and a not in pinned)
            held = tuple(a for a in self.axes[k] if a in have and a in pinned)
            prime = {a: b for a, b in self._prime.items() if a not in pinned}
            terms: list[Axes] = []
            for j in sorted(members):
                second = tuple(prime.get(a, a) for a in self.axes[j])
                terms += [(*self.axes[j][:-1], *second[:-1])] if j == self.weight_at else [self.axes[j], second]
            if self.mask is not None:
                terms.append(self.masked_axes)
            output = held + coupled + tuple(prime[a] for a in coupled)
            blocks.append(_Block(tuple(sorted(members)), held, coupled, expression(terms, output, self.sizes)))
        return blocks

    def _normal(self, block: _Block, arrays: Sequence[np.ndarray]) -> np.ndarray:
        terms: list[np.ndarray] = []
        for j in block.operands:
            terms += [self.normal_weight] if j == self.weight_at else [arrays[j].conj(), arrays[j]]  # type: ignore[list-item]
        if self.mask is not None:
            terms.append(self.mask)
        count, size = (int(np.prod([self.sizes[a] for a in axes])) for axes in (block.pinned, block.coupled))
        return np.asarray(block.contract(*terms)).reshape(count, size, size)

    def _solver(self, k: int, factors: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        """Return the product with the pseudo-inverse of the blocks as a function."""
        arrays, axes = [*factors, *self.fixed], self.axes[k]
        steps = []
        for block in self._blocks[k][1]:
            rest = [a for a in axes if a not in block.pinned + block.coupled]
            order = [axes.index(a) for a in (*block.pinned, *block.coupled, *rest)]
            steps.append((order, _inverse(self._normal(block, arrays))))

        def apply(x: np.ndarray) -> np.ndarray:
            for order, (batch, size, solve) in steps:
                y = x.transpose(order)
                x = solve(y.reshape(batch, size, -1)).reshape(y.shape).transpose(np.argsort(order))
            return x

        return apply

    def step(self, k: int, factors: Sequence[np.ndarray], residual: np.ndarray) -> np.ndarray:
        """Return the least-squares correction of factor k for a residual.

        The normal equations are solved directly. If they are too large, conjugate gradients from zero are used, with
        the diagonal blocks as preconditioner. Neither increases the residual.
        """
        solve = self._solver(k, factors)
        gradient = self._gradient(k, factors, residual)
        if self.exact(k):
            return solve(gradient)
        others = list(factors)
        x, g = np.zeros_like(gradient), gradient
        z = solve(g)
        p, gz = z, np.vdot(g, z).real
        start = gz
        for _ in range(MAX_CG):
            if gz <= start * 1e-20:
                break
            others[k] = p
            image = self._masked(self._product(*others, *self.fixed))
            curvature = np.linalg.norm(image) ** 2
            if curvature == 0:
                break
            alpha = gz / curvature
            x = x + alpha * p
            g = g - alpha * self._gradient(k, factors, image)
            z = solve(g)
            before, gz = gz, np.vdot(g, z).real
            p = z + (gz / before) * p
        return x

    # -- iteration -------------------------------------------------------------------------------------------------

    def run(
        self, factors: Sequence[np.ndarray], sweeps: int, tolerance: float
    ) -> tuple[list[np.ndarray], float, int, bool]:
        """Sweep over the factors; return (factors, residual norm, sweeps, converged).

        A step that increases the residual is rejected. After each sweep, Anderson mixing of the last sweeps is tried.
        If it does not reduce the residual, a longer step in the direction of the sweep is tried (Harshman 1970,
        Foundations of the PARAFAC procedure). Both need fewer sweeps than plain alternation. The run has converged if
        the residual is at roundoff, or if its relative decrease is at most ``tolerance`` in three successive sweeps.
        """
        current = list(factors)
        residual = self.residual(current)
        error, scale = float(np.linalg.norm(residual)), float(np.linalg.norm(self.target))
        memory: list[tuple[np.ndarray, np.ndarray]] = []
        stretch, calm = 1.0, 0
        for sweep in range(1, sweeps + 1):
            start, origin = error, current
            for k in range(len(current)):
                trial = list(current)
                trial[k] = current[k] + self.step(k, current, residual)
                current, residual, error, _ = self._better(trial, current, residual, error)
            calm = calm + 1 if start - error <= tolerance * start else 0
            if error <= ROUNDOFF * scale or calm == 3:
                return current, error, sweep, True
            memory = [*memory[1 - MEMORY :], (_flat(current), _flat(current) - _flat(origin))]
            if len(memory) > 1:
                trial = _like(_mixed(memory), current)
                current, residual, error, improved = self._better(trial, current, residual, error)
                if not improved:
                    memory = memory[-2:]
                    trial = [new + stretch * (new - old) for new, old in zip(current, origin, strict=True)]
                    current, residual, error, improved = self._better(trial, current, residual, error)
                    stretch = stretch * 1.5 if improved else max(stretch / 2, 0.5)
        return current, error, sweeps, False

    def _better(
        self, trial: list[np.ndarray], current: list[np.ndarray], residual: np.ndarray, error: float
    ) -> tuple[list[np.ndarray], np.ndarray, float, bool]:
        new = self.residual(trial)
        norm = float(np.linalg.norm(new))
        return (trial, new, norm, True) if norm < error else (current, residual, error, False)


def _inverse(matrices: np.ndarray) -> tuple[int, int, Callable[[np.ndarray], np.ndarray]]:
    """Return the shape of a batch of semidefinite matrices, and the product with their pseudo-inverses.

    Large matrices are shifted by roundoff of their trace and inverted instead.
    """
    batch, size = matrices.shape[:2]
    epsilon = size * np.finfo(float).eps
    if size > MAX_EIGH:
        shift = np.trace(matrices, axis1=1, axis2=2).real * epsilon
        shift[shift == 0] = 1.0
        lower = linalg.cholesky(matrices + shift[:, None, None] * np.eye(size))

        def solve(x: np.ndarray) -> np.ndarray:
            pairs = zip(lower, x, strict=True)
            return np.stack([cho_solve((c, True), y, check_finite=False) for c, y in pairs])

        return batch, size, solve
    values, vectors = linalg.eigh(matrices)
    floor = np.maximum(values[:, -1:], 0) * epsilon
    inverse = np.divide(1.0, values, where=values > floor, out=np.zeros_like(values))[..., None]
    return batch, size, lambda x: vectors @ (inverse * (vectors.conj().swapaxes(-1, -2) @ x))


def _flat(factors: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([f.ravel() for f in factors])


def _like(vector: np.ndarray, factors: Sequence[np.ndarray]) -> list[np.ndarray]:
    ends = np.cumsum([f.size for f in factors])[:-1]
    return [part.reshape(f.shape) for part, f in zip(np.split(vector, ends), factors, strict=True)]


def _mixed(memory: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return the affine combination of past results whose combined change is the smallest."""
    results, changes = (np.stack(columns, axis=1) for columns in zip(*memory, strict=True))
    mix = np.linalg.lstsq(np.diff(changes), changes[:, -1], rcond=1e-12)[0]
    return results[:, -1] - np.diff(results) @ mix
