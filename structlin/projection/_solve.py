"""The nearest matrix of one structure to a NumPy matrix, by a closed form or by alternating least squares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from structlin._threads import linalg
from structlin.algebra.numbered import Network, build
from structlin.projection import _splits
from structlin.projection._als import Fit
from structlin.projection._blocks import BlockFit
from structlin.projection._contract import gather
from structlin.scale import init_std, random_factors
from structlin.structure import AbstractStructure, Structure

SCOUT = 30  # sweeps from every start; the two best are then continued
RESTARTS = 4  # random starts if those from singular values have no error bound


@dataclass(frozen=True)
class Settings:
    """Parameters of the iteration, as in :func:`structlin.project`; ValueError if one is out of range."""

    restarts: int | None = None
    max_sweeps: int = 1000
    tolerance: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        starts = 0 if self.restarts is None else self.restarts
        checked = (("restarts", starts, 0), ("max_sweeps", self.max_sweeps, 1), ("seed", self.seed, 0))
        for name, value, least in checked:
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must lie in [0, 1), got {self.tolerance!r}")


@dataclass(frozen=True)
class Solution:
    """Factors as NumPy arrays, with the fields of :class:`structlin.Projection`.

    ``error`` and ``bound`` are absolute: ``relative_error`` and ``error_bound`` times the norm of the target.
    """

    factors: tuple[np.ndarray, ...]
    error: float
    method: str
    optimal: bool
    bound: float | None = None
    iterations: int = 0
    converged: bool = True


@dataclass(frozen=True)
class Problem:
    """A matrix to approximate.

    The error of a matrix A is ``|| (target - A) covariance^(1/2) ||``; without a covariance the Frobenius norm.

    Attributes
    ----------
    target
        Finite NumPy array of shape (d_out, d_in), float32 or wider.
    covariance
        Positive semidefinite array of shape (d_in, d_in), or None.
    root
        R with ``covariance = R R^H``, or None.
    """

    target: np.ndarray
    covariance: np.ndarray | None = None

    root: np.ndarray | None = field(init=False)
    known: dict[Any, BlockFit] = field(init=False, repr=False, compare=False, default_factory=dict)
    """Cache of decompositions, which structures of different ranks share."""

    def __post_init__(self) -> None:
        root = None if self.covariance is None else _splits.square_root(self.covariance)
        object.__setattr__(self, "root", root)

    def norm(self, matrix: np.ndarray) -> float:
        """Return the norm of ``matrix @ covariance^(1/2)``, summed in float64 without overflow or underflow."""
        shift = _exponent(matrix)
        matrix = _shifted(matrix, -shift)
        if self.root is not None:
            more = _exponent(self.root)
            matrix, shift = matrix @ _shifted(self.root, -more), shift + more
        wide = np.result_type(matrix.dtype, np.float64)
        rows = (row.astype(wide) for row in np.array_split(matrix, -(-matrix.size // 2**20)))
        return float(np.ldexp(math.sqrt(math.fsum(np.vdot(x, x).real for x in rows)), shift))

    @property
    def wide(self) -> Problem:
        """The problem in double precision."""
        target = self.target.astype(np.result_type(self.target, np.float64), copy=False)
        weights = self.covariance
        if weights is not None:
            weights = weights.astype(np.result_type(weights, np.float64), copy=False)
        return self if target is self.target and weights is self.covariance else Problem(target, weights)


def _exponent(array: np.ndarray) -> int:
    """Return the exponent of a power of two near the largest entry; 0 if squares need no scaling."""
    peak = float(np.max(np.abs(array), initial=0))
    exponent = math.frexp(peak)[1] // 2 * 2 if math.isfinite(peak) else 0
    return exponent if abs(exponent) > 32 else 0


def _shifted(array: np.ndarray, exponent: int) -> np.ndarray:
    """Return ``array * 2^exponent``, which is exact within the range of the dtype."""
    half = exponent // 2
    return array * 2.0**half * 2.0 ** (exponent - half) if exponent else array


def _near_one(problem: Problem, scales: bool = True) -> tuple[Problem, int, int]:
    """Return the problem with arrays whose squares are in range, and the exponents of its matrices and errors.

    Matrices of the original problem are those of this one times ``2^exponent``, and so are errors.
    """
    weights = 0 if problem.covariance is None else _exponent(problem.covariance)
    scale = _exponent(problem.target) if scales else 0
    if weights or scale:
        covariance = None if problem.covariance is None else _shifted(problem.covariance, -weights)
        problem = Problem(_shifted(problem.target, -scale), covariance)
    return problem, scale, scale + weights // 2


def solve(structure: AbstractStructure, problem: Problem, settings: Settings | None = None) -> Solution:
    """Return the nearest matrix of ``structure``, as :func:`structlin.project` does, on NumPy arrays.

    Raises
    ------
    TypeError
        If the structure is not a chain and does not implement ``nearest``.
    """
    problem, scale, back = _near_one(problem, all(f.trainable for f in structure.factors))
    found = _solved(structure, problem, settings or Settings())
    if not (scale or back):
        return found
    share, rest = divmod(scale, len(found.factors))
    factors = tuple(_shifted(f, share + (k < rest)) if scale else f for k, f in enumerate(found.factors))
    bound = None if found.bound is None else float(np.ldexp(found.bound, back))
    return replace(found, factors=factors, error=float(np.ldexp(found.error, back)), bound=bound)


def _solved(structure: AbstractStructure, problem: Problem, settings: Settings) -> Solution:
    if isinstance(structure, Structure):
        return _chain(structure, problem, settings)
    wide = problem.wide
    found = structure.nearest(wide.target, wide.covariance)
    if found is None:
        raise TypeError(
            f"cannot project onto {structure!r}: it is not a chain of einsums and does not implement `nearest`"
        )
    return _finished(structure, wide, found.factors, found.method, optimal=True)


def dense_of(structure: AbstractStructure, factors: Sequence[np.ndarray]) -> np.ndarray:
    """Return the (d_out, d_in) matrix."""
    trainable = [f for f, spec in zip(factors, structure.factors, strict=True) if spec.trainable]
    dtype = trainable[0].dtype if trainable else np.dtype(float)
    return structure.apply_columns(factors, np.eye(structure.d_in, dtype=dtype))


def _finished(
    structure: AbstractStructure, problem: Problem, factors: Sequence[np.ndarray], method: str, *, optimal: bool,
    bound: float | None = None, iterations: int = 0, converged: bool = True,
) -> Solution:  # fmt: skip
    shaped = [np.ascontiguousarray(f.reshape(spec.shape)) for f, spec in zip(factors, structure.factors, strict=True)]
    error = problem.norm(problem.target - dense_of(structure, shaped))
    bound = error if optimal else bound
    return Solution(tuple(balanced(structure, shaped)), error, method, optimal, bound, iterations, converged)


def balanced(structure: AbstractStructure, factors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Scale the factors to an equal ratio of RMS to the deviation of the scale rule, without changing their product."""
    if not all(f.trainable for f in structure.factors):
        return list(factors)
    stds = init_std(structure)
    ratios = [float(np.sqrt(np.mean(np.abs(f) ** 2))) / std for f, std in zip(factors, stds, strict=True)]
    if min(ratios) == 0:
        return list(factors)
    common = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return [f * (common / r) for f, r in zip(factors, ratios, strict=True)]


@dataclass(frozen=True)
class Chain:
    """A chain as a network, with the target padded to its full size."""

    structure: Structure
    network: Network
    rows: np.ndarray  # padded target, (full d_out, full d_in)
    covariance: np.ndarray | None
    root: np.ndarray | None

    @classmethod
    def of(cls, structure: Structure, problem: Problem) -> Chain:
        more_in, more_out = structure.padding
        covariance, root = problem.covariance, problem.root
        if covariance is not None and root is not None:
            covariance, root = np.pad(covariance, ((0, more_in),) * 2), np.pad(root, ((0, more_in), (0, 0)))
        return cls(structure, build(structure), np.pad(problem.target, ((0, more_out), (0, more_in))), covariance, root)

    @property
    def target(self) -> np.ndarray:
        """The target on the outer axes, without entries that are zero for every matrix of the structure."""
        axes = self.network.rows + self.network.columns
        return gather(self.rows.reshape(self.network.shape(axes)), axes, self.network.outer)

    @property
    def mask(self) -> np.ndarray | None:
        """0 for padding and 1 for other entries, on the outer axes; None if there is nothing to mask.

        A covariance is zero for padded columns, so they need no mask.
        """
        more_in, more_out = self.structure.padding
        if self.root is not None:
            more_in = 0
        if not more_in + more_out:
            return None
        kept = np.ones_like(self.rows, dtype=float)
        kept[len(kept) - more_out :] = 0
        kept[:, kept.shape[1] - more_in :] = 0
        axes = self.network.rows + self.network.columns
        return gather(kept.reshape(self.network.shape(axes)), axes, self.network.outer)

    def rectangular(self) -> bool:
        """Whether the entries that are not masked form a rectangle of each slice, so that zeros can fill the rest."""
        mask = self.mask
        if mask is None:
            return True
        cut = _splits.cut_between(self.network.outer, *self.network.factors)
        kept = _splits.slices(self.network, mask, self.network.outer, cut)
        rectangle = kept.max(axis=2, keepdims=True) * kept.max(axis=1, keepdims=True)
        return bool(np.all(kept == rectangle) and np.all((kept == 0) | (kept == 1)))

    def fit(self) -> Fit:
        if self.root is None:
            return Fit(self.network, self.target, mask=self.mask)
        rows = tuple(dict.fromkeys(self.network.rows))
        target = (self.rows @ self.root).reshape((*self.network.shape(rows), -1))
        if not self.structure.padding[1]:
            return Fit(self.network, target, weight=self.root)
        kept = np.arange(len(self.rows)) < self.structure.d_out
        mask = gather(kept.astype(float).reshape(self.network.shape(self.network.rows)), self.network.rows, rows)
        return Fit(self.network, target, mask=mask, weight=self.root)


def closed_form(chain: Chain) -> list[np.ndarray] | None:
    """Return the factors of the nearest matrix, or None if the roles of the axes give no closed form."""
    network = chain.network
    if len(network.factors) != 2:
        return None
    if network.joined:
        return None if chain.root is not None else _splits.regrouped_pair(chain.structure, chain.rows)
    if not chain.rectangular():
        return None
    if chain.covariance is not None:
        return _splits.weighted_pair(network, chain.target, chain.covariance)
    return _splits.pair(network, chain.target)


def spectrum(structure: AbstractStructure, problem: Problem) -> np.ndarray | None:
    """Return the errors of ranks 1, 2, ... of a chain of two factors, given at rank 1.

    The errors are absolute, as in :class:`Solution`. The result is None if there is no closed form.
    """
    if not isinstance(structure, Structure) or len(structure.steps) != 2:
        return None
    problem, _, back = _near_one(problem)
    chain = Chain.of(structure, problem)
    network, target = chain.network, chain.target
    if network.joined or not chain.rectangular():
        return None
    offset, copies = 0.0, 1
    if chain.covariance is None:
        cut = _splits.cut_between(network.outer, *network.factors)
        matrices = _splits.slices(network, target, network.outer, cut)
        if matrices.size < chain.rows.size:  # entries off a diagonal, or copies that are averaged
            copies = target.size // matrices.size
            offset = float(np.linalg.norm(chain.rows)) ** 2 - copies * float(np.linalg.norm(matrices)) ** 2
    else:
        weighted = _splits.weighted(network, target, chain.covariance)
        if weighted is None:
            return None
        matrices = weighted.scaled
    squares = linalg.svd(matrices, compute_uv=False) ** 2
    beyond = np.cumsum(squares.sum(axis=0)[::-1])[::-1]
    return np.ldexp(np.sqrt(max(0.0, offset) + copies * np.append(beyond[1:], 0.0)).astype(float), back)


def _chain(structure: Structure, problem: Problem, settings: Settings) -> Solution:
    chain = Chain.of(structure, problem)
    closed = closed_form(chain)
    if closed is not None:
        return _finished(structure, problem, closed, "singular values", optimal=True)
    problem = problem.wide  # least squares squares the condition
    chain = Chain.of(structure, problem)
    blocks = None
    if chain.covariance is not None and chain.rectangular():
        blocks = BlockFit.of(chain.network, chain.target, chain.covariance, problem.known)
    fit = blocks or chain.fit()
    if len(structure.steps) == 1 and isinstance(fit, Fit) and fit.exact(0):
        start, _ = _splits.peel(chain.network, chain.target, (0,), np.random.default_rng(0))
        nearest = start[0] + fit.step(0, start, fit.residual(start))
        return _finished(structure, problem, [nearest], "least squares", optimal=True)
    starts: list[list[np.ndarray] | None]
    if blocks is None:
        given, bound = _starts(chain, settings)
        starts = [*given]
    else:
        rng = np.random.default_rng(settings.seed)
        starts, bound = [None, *_drawn(chain, settings.restarts or 0, rng)], None
    factors, sweeps, converged = _best(fit, starts, settings)
    method = "alternating least squares" if blocks is None else "variable projection"
    return _finished(
        structure, problem, factors, method, optimal=False, bound=bound, iterations=sweeps, converged=converged
    )


def _best(fit: Fit | BlockFit, starts: Sequence[Any], settings: Settings) -> tuple[list[np.ndarray], int, bool]:
    """Return the factors of the best run, the number of its sweeps, and whether it converged."""
    short = min(SCOUT, settings.max_sweeps) if len(starts) > 2 else settings.max_sweeps
    runs = sorted((fit.run(start, short, settings.tolerance) for start in starts), key=lambda run: run[1])[:2]
    for place, (factors, _, sweeps, converged) in enumerate(runs):
        if not converged and sweeps < settings.max_sweeps:
            after = fit.run(factors, settings.max_sweeps - sweeps, settings.tolerance)
            runs[place] = (after[0], after[1], sweeps + after[2], after[3])
    factors, _, sweeps, converged = min(runs, key=lambda run: run[1])
    return factors, sweeps, converged


def _starts(chain: Chain, settings: Settings) -> tuple[list[list[np.ndarray]], float | None]:
    """Return starts (splits from both ends, solutions of similar problems, random ones), and the error bound."""
    network, count = chain.network, len(chain.network.factors)
    rng = np.random.default_rng(settings.seed)
    starts: list[list[np.ndarray]] = []
    bound = None
    if not network.joined:
        forth, bound = _splits.peel(network, chain.target, range(count), rng)
        starts.append(forth)
        if count > 2:
            back, other = _splits.peel(network, chain.target, range(count - 1, -1, -1), rng)
            starts.append(back)
            bound = min((b for b in (bound, other) if b is not None), default=None)
        elif chain.covariance is not None:
            uncoupled = _splits.weighted_pair(network, chain.target, chain.covariance, drop=True)
            starts += [] if uncoupled is None else [uncoupled]
    elif count == 2 and (pair := _splits.regrouped_pair(chain.structure, chain.rows)) is not None:
        starts.append(network.split(pair))
    if chain.mask is not None:  # the splits fit zeros to masked entries
        bound = None
    restarts = settings.restarts
    if restarts is None:
        restarts = RESTARTS if bound is None else 0
    if chain.covariance is not None:
        bound = None
    elif bound is not None and set(network.rows) & set(network.columns):
        diagonal = float(np.linalg.norm(chain.target))
        bound = math.sqrt(bound**2 + max(0.0, float(np.linalg.norm(chain.rows)) ** 2 - diagonal**2))
    return [*starts, *_drawn(chain, restarts if starts else max(1, restarts), rng)], bound


def _drawn(chain: Chain, count: int, rng: np.random.Generator) -> list[list[np.ndarray]]:
    dtype = "complex128" if np.iscomplexobj(chain.rows) else "float64"
    return [chain.network.split(random_factors(chain.structure, seed=rng, dtype=dtype)) for _ in range(count)]


def estimated_error(structure: AbstractStructure, problem: Problem, sweeps: int) -> float:
    """Return an upper bound of the error of the nearest matrix, from ``sweeps`` sweeps if there is no closed form.

    The error is absolute, as in :class:`Solution`. ``problem`` and errors raised are those of :func:`solve`.
    """
    if isinstance(structure, Structure):
        near, _, back = _near_one(problem)
        chain = Chain.of(structure, near.wide)
        if chain.covariance is not None and len(chain.network.factors) == 2 and chain.rectangular():
            blocks = BlockFit.of(chain.network, chain.target, chain.covariance, near.known)
            if blocks is not None:
                return float(np.ldexp(blocks.error_after(sweeps), back))
    return solve(structure, problem, Settings(restarts=0, max_sweeps=sweeps)).error
