"""Conformance checks of named structures, for this and other packages.

A new structure is one class in one file. Its test is one call:

>>> import structlin
>>> from structlin.testing import check_structure
>>> for name in ("dense", "low_rank"):
...     check_structure(structlin.structure_class(name))

The checks compare products with a matrix in double precision that shares no code with them (:func:`dense_matrix`). For
a chain of einsums, opt_einsum contracts all factors at once. For any other structure, its ``dense`` method computes the
matrix from the definition. The checks also compare the number of MACs that a structure states with that of its einsums;
for other structures, with the products that it computes. This module imports NumPy only. torch and jax are imported if
``backend`` names them.
"""

from __future__ import annotations

import inspect
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from opt_einsum import contract, get_symbol

from structlin import counting
from structlin._arrays import Array, backend_of, dtype_name, on_cpu, ops, to_backend
from structlin._counted import counted
from structlin.registry import NamedOperator, design
from structlin.scale import OPTIMIZERS, RULES, init_std, lr_multipliers, random_factors
from structlin.structure import AbstractStructure, Structure

__all__ = [
    "check_design",
    "check_instance",
    "check_structure",
    "dense_matrix",
    "random_chain",
    "to_numpy",
    "unit_roundoff",
]

Apply = Callable[[Sequence[Array], Array], Array]
_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_SUBNORMAL = {"float16": 2.0**-24}  # smallest positive number, for dtypes in which usual products can be near it
_LEADING_SHAPES = ((), (1,), (0,), (2, 3), (2, 0, 3))
_SAFETY = 8  # roundoffs that each step may lose, relative to the product of absolute values


def check_structure(
    cls: type[NamedOperator],
    /,
    *,
    backend: str = "numpy",
    dtype: str = "float64",
    seed: int = 0,
    transform: Callable[[Apply], Apply] | None = None,
    quick: bool = False,
) -> None:
    """Check a named structure on each of its ``examples``.

    Runs :func:`check_design` on every example, and checks that ``design`` takes its options by name.

    Parameters
    ----------
    cls
        The class, a subclass of `structlin.NamedOperator`; it need not be registered.
    backend
        `"numpy"`, `"torch"` or `"jax"`.
    dtype
        Name of a floating or complex dtype of that library.
    seed
        Seed of the random factors and vectors.
    transform
        Function that wraps the products `(factors, x) -> y`, such as `jax.jit` or `torch.compile`.
    quick
        Check one batch shape instead of all, for transforms that compile for each shape.

    Raises
    ------
    AssertionError
        If a check fails. The message states the structure, the numbers compared and the largest error.
    ValueError
        If the class has no examples.
    """
    if not cls.examples:
        raise ValueError(f"{cls.__qualname__} has no examples; set examples = ((shape, options), ...)")
    name = cls.__qualname__
    for attribute in ("formula", "parameters", "source"):
        _require(bool(getattr(cls, attribute)), f"{name} has no {attribute}; set this attribute of the class")
    _, *rest = inspect.signature(cls.design).parameters.values()
    _require(
        all(p.kind is p.KEYWORD_ONLY for p in rest),
        f"{name}.design must take its options by name only, without **, got {', '.join(map(str, rest))}",
    )
    for shape, options in cls.examples:
        check_design(cls, shape, options, backend=backend, dtype=dtype, seed=seed, transform=transform, quick=quick)


def check_design(
    cls: type[NamedOperator],
    shape: tuple[int, int],
    options: Mapping[str, Any] | None = None,
    /,
    *,
    backend: str = "numpy",
    dtype: str = "float64",
    seed: int = 0,
    transform: Callable[[Apply], Apply] | None = None,
    quick: bool = False,
) -> None:
    r"""Check a named structure at one shape.

    The checks are:

    - the shapes, and the counts of the structure against those of the arrays;
    - products with rows of every batch shape (empty ones included), with columns and with strided input, against
      :func:`dense_matrix`;
    - the adjoint identity :math:`\langle A x, y \rangle = \langle x, A^* y \rangle`;
    - the transpose, and the transpose of the transpose;
    - the bound of the rank;
    - the identity :math:`\prod_k \mathrm{fan\_out}_k / \mathrm{fan\_in}_k = d_\text{out} / d_\text{in}`;
    - the scale rules;
    - the operator, from arrays and at random.

    Parameters
    ----------
    cls
        The class, a subclass of `structlin.NamedOperator`.
    shape
        Shape `(d_out, d_in)` of the matrix.
    options
        Options of `cls.design`.
    backend, dtype, seed, transform, quick
        As for :func:`check_structure`.

    Raises
    ------
    AssertionError
        If a check fails. Errors that `cls.design` raises for the shape or options pass through.
    """
    structure = design(cls, shape, **(options or {}))
    _require(structure.shape == tuple(shape), f"{structure!r} has shape {structure.shape}, not {tuple(shape)}")
    check_instance(structure, backend=backend, dtype=dtype, seed=seed, transform=transform, quick=quick)
    _check_operator(cls, structure, options or {}, backend, dtype, seed)


def check_instance(
    structure: AbstractStructure,
    /,
    *,
    backend: str = "numpy",
    dtype: str = "float64",
    seed: int = 0,
    transform: Callable[[Apply], Apply] | None = None,
    quick: bool = False,
) -> None:
    """Check a structure, which need not be a named one.

    The checks are those of `structlin.testing.check_design`, without those of the operator.

    Parameters
    ----------
    structure
        Any structure.
    backend, dtype, seed, transform, quick
        As for :func:`check_structure`.

    Raises
    ------
    AssertionError
        If a check fails.
    """
    factors = random_factors(structure, seed=seed, backend=backend, dtype=dtype)
    again = pickle.loads(pickle.dumps(structure))
    _require(
        again == structure and hash(again) == hash(structure), f"{structure!r} changes when it is pickled and unpickled"
    )
    _check_counts(structure, factors)
    _check_scale(structure)
    matrix = dense_matrix(structure, factors)
    rank = np.linalg.matrix_rank(matrix)
    _require(rank <= structure.rank_bound, f"{structure!r} has rank {rank}, above its bound {structure.rank_bound}")
    values = _Values(structure, factors, matrix, dtype, np.random.default_rng(seed + 1), transform)
    values.check_rows(quick)
    values.check_columns(quick)
    values.check_adjoint()
    _check_transpose(structure, factors, matrix)


def random_chain(rng: np.random.Generator) -> Structure:
    """Return a random chain of one to four einsums with axes of size 1 to 4, for property tests.

    The axes have every role, in any order. Chains can contain steps without a contracted or free axis, regrouped
    vectors, padded inputs and cut outputs.

    Parameters
    ----------
    rng
        Generator of the random choices.

    Returns
    -------
    Structure
        A random structure.
    """
    sizes: dict[str, int] = {}

    def new(*shape: int) -> list[str]:
        axes = [get_symbol(len(sizes) + k) for k in range(len(shape))]
        sizes.update(zip(axes, shape, strict=True))
        return axes

    def shuffled(axes: Sequence[str]) -> str:
        return "".join(rng.permutation(list(axes))) if axes else ""

    current = new(*rng.integers(1, 5, rng.integers(1, 4)).tolist())
    steps = []
    for number in range(rng.integers(1, 5)):
        if number and rng.random() < 0.25:
            total = math.prod(sizes[a] for a in current)
            first = int(rng.choice([k for k in range(1, total + 1) if total % k == 0]))
            current = new(first, total // first)
        while True:
            roles = rng.choice(["contracted", "batch", "carried"], len(current))
            grouped = {r: [a for a, b in zip(current, roles, strict=True) if b == r] for r in set(roles.tolist())}
            count = int(rng.integers(0, 3))
            kept = grouped.get("batch", []) + grouped.get("carried", [])
            weights = grouped.get("contracted", []) + grouped.get("batch", [])
            if kept + ["?"] * count and weights + ["?"] * count:
                break
        free = new(*rng.integers(1, 5, count).tolist())
        after = shuffled(kept + free)
        steps.append(f"{''.join(current)},{shuffled(weights + free)}->{after}")
        current = list(after)
    chain = "; ".join(steps)
    full = Structure.parse(chain, sizes)
    padded = {
        name: int(rng.integers(1, size + 1)) if rng.random() < 0.25 else size
        for name, size in (("d_in", full.d_in), ("d_out", full.d_out))
    }
    return Structure.parse(chain, sizes, **padded)


def dense_matrix(structure: AbstractStructure, factors: Sequence[Array]) -> np.ndarray:
    """Return the matrix in double precision, by other means than the products of the structure.

    opt_einsum contracts all factors of a chain at once, with an identity as input. Where the vector is regrouped, a
    tensor of zeros and ones connects the old axes to the new. Any other structure computes its matrix from the
    definition in ``AbstractStructure.dense``.

    Parameters
    ----------
    structure
        Any structure.
    factors
        Its factors, arrays of any library and dtype.

    Returns
    -------
    np.ndarray
        Array of shape `(d_out, d_in)`, float64 or complex128.

    Raises
    ------
    ValueError
        If the structure is not a chain and does not implement `dense`.
    """
    arrays = tuple(to_numpy(f) for f in factors)
    if not isinstance(structure, Structure):
        found = structure.dense(arrays)
        if found is None:
            raise ValueError(
                f"{structure!r} is not a chain, so it must implement `dense`, which computes the matrix from its "
                "definition in NumPy, by other means than the products"
            )
        return np.asarray(found)
    sizes = dict(structure.sizes)

    def dims(axes: str) -> tuple[int, ...]:
        return tuple(sizes[a] for a in axes)

    column = next(s for s in map(get_symbol, range(len(sizes) + 1)) if s not in sizes)
    first, last = structure.steps[0].input, structure.steps[-1].output
    terms = [first + column, *(step.factor for step in structure.steps)]
    operands = [np.eye(math.prod(dims(first))).reshape(*dims(first), -1), *arrays]
    for before, step in zip(structure.steps, structure.steps[1:], strict=False):
        if before.output != step.input:
            terms.append(before.output + step.input)
            operands.append(np.eye(math.prod(dims(step.input))).reshape(dims(terms[-1])))
    full = contract(f"{','.join(terms)}->{last}{column}", *operands)
    return np.asarray(full).reshape(-1, operands[0].shape[-1])[: structure.d_out, : structure.d_in]


def to_numpy(x: Array) -> np.ndarray:
    """Return a NumPy copy of an array: complex128, int64 or float64, by the kind of its dtype.

    Parameters
    ----------
    x
        A NumPy array, torch tensor or jax array.

    Returns
    -------
    np.ndarray
        Array of the same shape.
    """
    if backend_of(x) == "torch":
        x = on_cpu(x)
        x = x.double() if dtype_name(x.dtype) == "bfloat16" else x
    name = dtype_name(x.dtype)
    return np.asarray(x).astype("complex128" if "complex" in name else "int64" if "int" in name else "float64")


def unit_roundoff(dtype: Any) -> float:
    """Return the largest relative error of rounding to a dtype, for example 2^-53 for float64 and complex128.

    Parameters
    ----------
    dtype
        A floating or complex dtype of NumPy, torch or jax, or its name.

    Returns
    -------
    float
        The unit roundoff.

    Raises
    ------
    KeyError
        If the dtype is not one of these.
    """
    name = dtype_name(dtype)
    return _ROUNDOFF[{"complex64": "float32", "complex128": "float64"}.get(name, name)]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _check_counts(structure: AbstractStructure, factors: Sequence[Array]) -> None:
    shapes = [tuple(f.shape) for f in factors]
    _require(
        shapes == [f.shape for f in structure.factors], f"{structure!r} states other shapes of factors than {shapes}"
    )
    held = sum(math.prod(s) for s, f in zip(shapes, structure.factors, strict=True) if f.trainable)
    _require(structure.num_params == held, f"{structure!r} states {structure.num_params} parameters, has {held}")
    flops = 2 * structure.macs + sum(structure.other_flops.values())
    _require(structure.flops == flops, f"{structure!r} states {structure.flops} FLOPs, its parts add up to {flops}")
    for f in structure.factors:
        _require(
            f.blocks * f.fan_in * f.fan_out == f.numel or not isinstance(structure, Structure),
            f"{f} of {structure!r}: blocks * fan_in * fan_out is not {f.numel}, its number of elements",
        )
    if not isinstance(structure, Structure):
        _check_products(structure, factors)
        return
    sizes = dict(structure.sizes)
    macs = sum(math.prod(sizes[a] for a in set(s.input + s.factor + s.output)) for s in structure.steps)
    _require(structure.macs == macs, f"{structure!r} states {structure.macs} MACs, its einsums have {macs}")
    if structure.padding == (0, 0) and all(f.carried == 1 for f in structure.factors):
        out, into = (math.prod(getattr(f, fan) for f in structure.factors) for fan in ("fan_out", "fan_in"))
        _require(
            out * structure.d_in == into * structure.d_out,
            f"{structure!r}: prod fan_out / fan_in = {out}/{into} is not d_out / d_in",
        )


def _check_products(structure: AbstractStructure, factors: Sequence[Array]) -> None:
    """Check that a structure other than a chain computes as many MACs as it states, and no more other FLOPs."""
    arrays, tokens = tuple(to_numpy(f).real for f in factors), 3
    elementwise = tokens * sum(structure.other_flops.values()) + sum(structure.setup_flops.values())
    for apply, shape in (
        (structure.apply, (tokens, structure.d_in)),
        (structure.apply_columns, (structure.d_in, tokens)),
    ):
        found = counted(apply, arrays, np.ones(shape))
        _require(
            found.macs == tokens * structure.macs,
            f"{structure!r} states {structure.macs} MACs for a vector, but computes {found.macs} for {tokens} vectors",
        )
        _require(
            found.elementwise <= elementwise,
            f"{structure!r} states {elementwise} FLOPs other than MACs for {tokens} vectors, "
            f"but computes {found.elementwise} multiplications",
        )


def _check_scale(structure: AbstractStructure) -> None:
    trainable = [f.trainable for f in structure.factors]
    for rule in RULES:
        std = init_std(structure, rule=rule)
        positive = [s > 0 and math.isfinite(s) for s in std]
        _require(
            positive == trainable,
            f"{structure!r}: deviations {std} by rule {rule!r} must be positive for trainable factors alone",
        )
        zeroed = init_std(structure, rule=rule, zero_last=True)
        wanted = [i for i, t in enumerate(trainable) if t][-1:]
        zeros = [i for i, s in enumerate(zeroed) if s == 0 and trainable[i]]
        _require(zeros == wanted, f"{structure!r}: zero_last gives {zeroed}, but factor {wanted} alone must be zero")
    for optimizer in OPTIMIZERS:
        own = lr_multipliers(structure, optimizer=optimizer)
        _require([m > 0 for m in own] == trainable, f"{structure!r}: {optimizer} multipliers {own}")
        twice = lr_multipliers(structure, optimizer=optimizer, base_d_in=2 * structure.d_in)
        _require(
            all(math.isclose(2 * a, b) for a, b in zip(own, twice, strict=True)),
            f"{structure!r}: {optimizer} multipliers {own} do not double with base_d_in, but become {twice}",
        )


class _Values:
    """Products of one structure with random vectors against its matrix."""

    def __init__(
        self,
        structure: AbstractStructure,
        factors: Sequence[Array],
        matrix: np.ndarray,
        dtype: str,
        rng: np.random.Generator,
        transform: Callable[[Apply], Apply] | None,
    ) -> None:
        self.structure, self.factors, self.matrix, self.dtype, self.rng = structure, factors, matrix, dtype, rng
        self.transform = transform or (lambda apply: apply)
        self.apply = self.transform(structure.apply)
        self.backend = backend_of(factors[0])
        self.loss = _SAFETY * len(structure.factors) * unit_roundoff(dtype)
        self.underflow = _SAFETY * len(structure.factors) * _SUBNORMAL.get(dtype, 0.0)
        # The products without cancellation, as a bound of errors; a bound in the norm if the structure is not a chain.
        self.bound = (
            dense_matrix(structure, [np.abs(to_numpy(f)) for f in factors])
            if isinstance(structure, Structure)
            else np.full(matrix.shape, np.linalg.norm(matrix))
        )

    def random(self, shape: tuple[int, ...]) -> Array:
        values = self.rng.standard_normal(shape)
        if "complex" in self.dtype:
            values = values + 1j * self.rng.standard_normal(shape)
        return to_backend(values, self.backend, self.dtype)

    def compare(self, what: str, got: Array, wanted: np.ndarray, bound: np.ndarray) -> None:
        _require(tuple(got.shape) == wanted.shape, f"{self.structure!r}: {what} has shape {tuple(got.shape)}")
        _require(dtype_name(got.dtype) == self.dtype, f"{self.structure!r}: {what} has dtype {got.dtype}")
        error = np.abs(to_numpy(got) - wanted)
        allowed = self.loss * bound + self.underflow
        _require(
            bool(np.all(error <= allowed)),
            f"{self.structure!r} ({self.backend}, {self.dtype}): {what} is off by up to "
            f"{np.max(error - allowed, initial=0):.2e} more than the {np.max(allowed, initial=0):.2e} allowed",
        )

    def check_rows(self, quick: bool) -> None:
        d_in = self.structure.d_in
        rows = [self.random((3, d_in))]
        if not quick:
            rows += [self.random((*lead, d_in)) for lead in _LEADING_SHAPES]
            rows += [self.random((d_in, 3)).swapaxes(0, 1), self.random((6, 2 * d_in))[::2, ::2]]
        for x in rows:
            v = to_numpy(x)
            got = self.apply(self.factors, x)
            self.compare(f"A x for rows of shape {v.shape}", got, v @ self.matrix.T, np.abs(v) @ self.bound.T)

    def check_columns(self, quick: bool) -> None:
        d_in = self.structure.d_in
        columns = [self.random((d_in, 3))]
        if not quick:
            columns += [self.random((d_in, 1)), self.random((d_in, 0))]
            columns += [self.random((3, d_in)).swapaxes(0, 1), self.random((2 * d_in, 6))[::2, ::2]]
        apply = self.transform(self.structure.apply_columns)
        for x in columns:
            v = to_numpy(x)
            got = apply(self.factors, x)
            self.compare(f"A X for columns of shape {v.shape}", got, self.matrix @ v, self.bound @ np.abs(v))

    def check_adjoint(self) -> None:
        structure, conj = self.structure, ops(self.backend).conj
        x, y = self.random((3, structure.d_in)), self.random((3, structure.d_out))
        weights = [conj(f) if "complex" in dtype_name(f.dtype) else f for f in self.factors]
        mapped = self.apply(self.factors, x)
        pulled = self.transform(structure.transpose().apply)(structure.transpose_factors(weights), y)
        left, right = np.vdot(to_numpy(y), to_numpy(mapped)), np.vdot(to_numpy(pulled), to_numpy(x))
        allowed = 2 * self.loss * float(np.vdot(np.abs(to_numpy(y)), np.abs(to_numpy(x)) @ self.bound.T))
        _require(
            abs(left - right) <= allowed,
            f"{structure!r}: <A x, y> = {left} but <x, A* y> = {right}, which may differ by {allowed:.2e}",
        )


def _check_transpose(structure: AbstractStructure, factors: Sequence[Array], matrix: np.ndarray) -> None:
    flipped, pulled = structure.transpose(), structure.transpose_factors(factors)
    _require(flipped.shape == structure.shape[::-1], f"the transpose of {structure!r} has shape {flipped.shape}")
    for count in ("num_params", "macs"):
        own, theirs = getattr(structure, count), getattr(flipped, count)
        _require(own == theirs, f"{structure!r} has {count} {own}, its transpose {theirs}")
    for what, got, wanted in (
        ("transpose", dense_matrix(flipped, pulled), matrix.T),
        ("transpose of the transpose", dense_matrix(flipped.transpose(), flipped.transpose_factors(pulled)), matrix),
    ):
        error = np.max(np.abs(got - wanted), initial=0)
        _require(error <= 1e-12 * np.linalg.norm(matrix), f"the {what} of {structure!r} is off by {error:.2e}")
    _require(flipped.transpose() == structure, f"{structure!r} transposed twice is {flipped.transpose()!r}")


def _check_operator(
    cls: type[NamedOperator],
    structure: AbstractStructure,
    options: Mapping[str, Any],
    backend: str,
    dtype: str,
    seed: int,
) -> None:
    factors = random_factors(structure, seed=seed, backend=backend, dtype=dtype)
    drawn = cls.random(structure.shape, seed=seed, backend=backend, dtype=dtype, **options)
    _require(drawn.structure == structure, f"{cls.__qualname__}.random has structure {drawn.structure!r}")
    _require(dtype_name(drawn.dtype) == dtype, f"{cls.__qualname__}.random has dtype {drawn.dtype}, not {dtype}")
    operators = {"random": drawn}
    if isinstance(structure, Structure) and structure.padding == (0, 0):
        operators["constructor"] = cls(*factors)
    for how, op in operators.items():
        same = all(np.array_equal(to_numpy(a), to_numpy(b)) for a, b in zip(op.factors, factors, strict=True))
        _require(same, f"{cls.__qualname__} by its {how} has other factors")
        _require(op.structure == structure, f"{cls.__qualname__} by its {how} has structure {op.structure!r}")
        own, counted = (structure.macs, structure.flops, structure.num_params), counting.work_of(op)
        theirs = (counted.macs, counted.flops, counting.num_params(op))
        _require(own == theirs, f"{op!r}: MACs, FLOPs and parameters {theirs}, its structure says {own}")
