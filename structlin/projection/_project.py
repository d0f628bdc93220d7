"""The function :func:`project`: checks of the input, choice of the rank, and the operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from structlin._arrays import Array, backend_of, on_cpu, to_backend
from structlin.operators import StructuredOperator
from structlin.projection._solve import Problem, Settings, Solution, solve, spectrum
from structlin.registry import NamedOperator, design, structure_class, structure_names, structure_options
from structlin.structure import AbstractStructure, Structure


@dataclass(frozen=True, eq=False)
class Projection:
    """Result of :func:`project`.

    Attributes
    ----------
    operator
        The structured matrix, with the library, dtype and device of the dense matrix.
    relative_error
        Norm of the difference over the norm of the matrix, before rounding to the dtype; with a covariance, both are
        weighted norms.
    error_bound
        Upper bound of ``relative_error``, from the singular values that were cut off; it is at most
        ``sqrt(factors - 1)`` times the smallest relative error of the structure. Equal to ``relative_error`` if that is
        optimal. None if there is no bound: for BLAST, with a covariance, and if padding cuts through slices.
    iterations
        Number of sweeps of alternating least squares, or of passes of variable projection; 0 for closed forms.
    converged
        False if ``max_sweeps`` stopped the iteration.
    optimal
        True if no matrix of the structure is nearer.
    method
        Name of the method.
    """

    operator: StructuredOperator
    relative_error: float
    error_bound: float | None
    iterations: int
    converged: bool
    optimal: bool
    method: str


def project(
    W: Array, structure: str | type[NamedOperator] | AbstractStructure, *, target_error: float | None = None,
    max_macs: int | None = None, input_covariance: Array | None = None, restarts: int | None = None,
    max_sweeps: int = 1000, tolerance: float = 1e-6, seed: int = 0, **options: Any,
) -> Projection:  # fmt: skip
    """Return the matrix A of a structure that is nearest to ``W`` in the Frobenius norm or a weighted norm.

    :mod:`structlin.projection` describes the methods. The factors are scaled such that all have the same ratio of RMS
    to the deviation of the scale rule.

    Parameters
    ----------
    W
        NumPy, torch or jax array of shape (d_out, d_in), floating or complex.
    structure
        A registered name or class, with the options of its ``design`` as keywords, or a structure.
    target_error
        Choose the smallest rank whose relative error is at most this. The ranks of several bonds grow together, each up
        to the rank at which it is exact. For two factors, one decomposition gives the rank. Otherwise it is found by
        bisection, which assumes that the error decreases with the rank.
    max_macs
        Choose the largest rank whose multiply-accumulates for one vector are within this budget, up to the rank at
        which the structure is exact.
    input_covariance
        Positive semidefinite array C of shape (d_in, d_in), of any library; the error is ``|| (W - A) C^(1/2) ||``.
    restarts
        Number of random starts, in addition to those from singular values. Default: 4 for structures without an error
        bound in the Frobenius norm, otherwise 0. With more than two starts, each runs for 30 sweeps, and the two best
        are continued.
    max_sweeps
        Largest number of sweeps of alternating least squares, or of passes of variable projection, for each start. A
        sweep solves for each factor in turn. No sweep increases the error.
    tolerance
        Stop after three successive sweeps with a relative decrease of the error of at most this, three successive
        steps of variable projection with one of at most ten times this, or at roundoff.
    seed
        Seed of the random starts.
    **options
        Options of the structure, such as ``rank``, ``blocks``, ``cores`` or ``factorization``.

    Raises
    ------
    TypeError
        If W is not an array, or the structure is neither a chain nor implements ``nearest``.
    ValueError
        If W is not a finite floating or complex matrix of the structure's shape; for unknown options; for more than one
        of rank, ``target_error`` and ``max_macs``, or for one of the last two without an option ``rank``; if no rank
        meets them; if the covariance is zero or not finite, Hermitian and positive semidefinite.

    Examples
    --------
    >>> import numpy as np
    >>> W = np.kron(np.arange(1.0, 7.0).reshape(2, 3), np.ones((4, 2)))
    >>> found = project(W, "kronecker", factorization=((2, 4), (3, 2)))
    >>> found.operator.shape, found.relative_error < 1e-12, found.optimal
    ((8, 6), True, True)
    >>> project(W, "low_rank", target_error=0.01).operator.structure.factors[0].shape
    (2, 6)
    """
    target = _matrix("W", W)
    settings = Settings(restarts, max_sweeps, tolerance, seed)
    problem = Problem(target, None if input_covariance is None else _covariance(input_covariance, target))
    shape = (target.shape[0], target.shape[1])
    scale = problem.norm(target)

    if isinstance(structure, AbstractStructure):
        if target_error is not None or max_macs is not None or options:
            raise ValueError(
                "a structure includes its rank and options; pass its name to choose them, or the structure without "
                "target_error, max_macs and options"
            )
        if structure.shape != shape:
            raise ValueError(f"the structure has shape {structure.shape}, W has shape {shape}")
        solution = solve(structure, problem, settings)
        return _result(structure, _named(structure), solution, W, scale)

    cls = structure_class(structure) if isinstance(structure, str) else structure
    if not (isinstance(cls, type) and issubclass(cls, NamedOperator)):
        raise TypeError(f"structure must be a name, a named structure or a structure, got {structure!r}")
    if target_error is None and max_macs is None:
        chosen = design(cls, shape, **options)
        return _result(chosen, cls, solve(chosen, problem, settings), W, scale)

    at = _ranks(cls, shape, options, target_error, max_macs)
    if max_macs is not None:
        chosen = _largest_within(at, max_macs, cls.name)
        return _result(chosen, cls, solve(chosen, problem, settings), W, scale)
    assert target_error is not None
    chosen, solution = _smallest_for(at, target_error, problem, settings, cls.name)
    return _result(chosen, cls, solution, W, scale)


# -- input and output --------------------------------------------------------------------------------------------------


def _matrix(name: str, array: Array) -> np.ndarray:
    """Return a finite, non-empty matrix in its own dtype; half precision becomes float32."""
    backend = backend_of(array)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(f"{name} must be a matrix (d_out, d_in) with entries, got shape {tuple(array.shape)}")
    if backend == "torch":
        complex_ = array.is_complex()
        floating = complex_ or array.is_floating_point()
        found = on_cpu(array)
        found = (found.float() if floating and not complex_ and found.element_size() < 4 else found).numpy()
    else:
        found = np.asarray(array)
        floating = found.dtype.kind == "c" or "float" in str(found.dtype)
        found = found.astype(np.float32) if floating and found.dtype.itemsize < 4 else found
    if not floating:
        raise ValueError(f"{name} must be floating or complex, got {array.dtype}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} has {int((~np.isfinite(found)).sum())} entries that are not finite")
    return found


def _covariance(array: Array, target: np.ndarray) -> np.ndarray:
    found = _matrix("input_covariance", array)
    d_in = target.shape[1]
    if found.shape != (d_in, d_in):
        raise ValueError(f"input_covariance must have shape (d_in, d_in) = ({d_in}, {d_in}), got {found.shape}")
    if np.iscomplexobj(found) and not np.iscomplexobj(target):
        raise ValueError("a complex input_covariance needs a complex W")
    if np.abs(found - found.conj().T).max() > 1e-5 * np.abs(found).max():
        raise ValueError("input_covariance is not Hermitian")
    found = (found + found.conj().T) / 2
    values = np.linalg.eigvalsh(found)
    if values[-1] <= 0 or values[0] < -1e-5 * values[-1]:
        raise ValueError(
            f"input_covariance must be positive semidefinite and not zero, its eigenvalues lie in "
            f"[{values[0]:.3g}, {values[-1]:.3g}]"
        )
    return found


def _named(structure: AbstractStructure) -> type[StructuredOperator]:
    """Return the registered class of a structure that is not a chain; several classes may have the same chain."""
    for cls in map(structure_class, () if isinstance(structure, Structure) else structure_names()):
        try:
            if cls.design(structure.shape) == structure:
                return cls
        except ValueError:
            continue
    return StructuredOperator


def _result(
    structure: AbstractStructure, cls: type[StructuredOperator], solution: Solution, W: Array, scale: float
) -> Projection:
    def relative(error: float | None) -> float | None:
        if error is None:
            return None
        return error / scale if scale else (0.0 if error == 0 else math.inf)

    backend = backend_of(W)
    device = None if backend == "numpy" else W.device
    factors = []
    for array, spec in zip(solution.factors, structure.factors, strict=True):
        if spec.trainable:
            factors.append(to_backend(array, backend, W.dtype, device))
        else:  # 32 bits, which jax has by default
            index = array.astype(np.int32) if backend == "jax" else array
            factors.append(to_backend(index, backend, None, device))
    dtype = None if any(f.trainable for f in structure.factors) else W.dtype
    error = relative(solution.error)
    assert error is not None
    return Projection(
        cls._build(structure, tuple(factors), dtype), error, relative(solution.bound), solution.iterations,
        solution.converged, solution.optimal, solution.method,
    )  # fmt: skip


# -- choice of the rank ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranks:
    """The structures of rank 1 to ``ceiling``.

    ``ceiling`` is the rank at which the structure is exact, or an upper limit if this rank is not known.

    ``plain``: that rank is known.
    """

    at: Callable[[int], AbstractStructure]
    ceiling: int
    plain: bool


def _ranks(
    cls: type[NamedOperator], shape: tuple[int, int], options: Mapping[str, Any], target_error: float | None,
    max_macs: int | None,
) -> _Ranks:  # fmt: skip
    known = structure_options(cls)
    if "rank" not in known:
        raise ValueError(f"structure {cls.name!r} has no rank to choose; its options are {', '.join(known) or 'none'}")
    given = [k for k in ("rank", "rank_fraction") if options.get(k) is not None]
    given += [k for k, v in (("target_error", target_error), ("max_macs", max_macs)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"give one of rank, target_error and max_macs, got {', '.join(given)}")
    rest = {k: v for k, v in options.items() if k not in ("rank", "rank_fraction")}
    limits = cls.exact_rank(shape, **rest)
    if limits is None:
        return _Ranks(lambda rank: design(cls, shape, rank=rank, **rest), min(shape), plain=False)
    bonds = (limits,) if isinstance(limits, int) else limits

    def at(rank: int) -> AbstractStructure:
        ranks = tuple(min(rank, bond) for bond in bonds)
        return design(cls, shape, rank=ranks[0] if isinstance(limits, int) else ranks, **rest)

    return _Ranks(at, max(bonds, default=1), plain=True)


def _first(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """Return the first number of [low, high] for which ``holds``, a monotonic condition; high + 1 if there is none."""
    high += 1
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _largest_within(ranks: _Ranks, max_macs: int, name: str) -> AbstractStructure:
    if isinstance(max_macs, bool) or not hasattr(max_macs, "__index__"):
        raise ValueError(f"max_macs must be an integer, got {max_macs!r}")
    rank = _first(1, ranks.ceiling, lambda r: ranks.at(r).macs > max_macs) - 1
    if rank == 0:
        raise ValueError(f"{name!r} of rank 1 needs {ranks.at(1).macs} MACs, more than max_macs = {max_macs}")
    return ranks.at(rank)


def _smallest_for(
    ranks: _Ranks, target_error: float, problem: Problem, settings: Settings, name: str
) -> tuple[AbstractStructure, Solution]:
    if not 0 <= target_error < math.inf:
        raise ValueError(f"target_error must be a number of at least 0, got {target_error!r}")
    allowed = target_error * problem.norm(problem.target)
    solved: dict[int, Solution] = {}

    def meets(rank: int) -> bool:
        if rank not in solved:
            solved[rank] = solve(ranks.at(rank), problem, settings)
        return solved[rank].error <= allowed

    errors = spectrum(ranks.at(1), problem) if ranks.plain else None
    if errors is not None:  # a closed form: the error of every rank from one decomposition
        rank = next((r for r, e in enumerate(errors, start=1) if e <= allowed), min(len(errors), ranks.ceiling))
        while not meets(rank) and rank < ranks.ceiling:  # roundoff
            rank += 1
    else:
        high = 1
        while high < ranks.ceiling and not meets(high):
            high = min(2 * high, ranks.ceiling)
        rank = min(_first(high // 2 + 1, high, meets), ranks.ceiling)
    if not meets(rank):
        error = solved[rank].error / problem.norm(problem.target)
        raise ValueError(f"no rank of {name!r} up to {ranks.ceiling} has a relative error of {target_error:g}; "
                         f"rank {rank} has {error:.3g}")  # fmt: skip
    return ranks.at(rank), solved[rank]
