"""The spectral-scale rule: at what deviation to draw each factor, and how its learning rate scales.

Both the matrix and its update should have a spectral norm of order ``sqrt(d_out / d_in)`` (Yang, Simon, Bernstein,
*A Spectral Condition for Feature Learning*, 2023; applied to structured matrices by Qiu et al., *Compute Better
Spent*, ICML 2024, section 3). Applied to every factor, with the fans that follow from its axis roles:

- initial deviation ``sqrt(min(fan_in, fan_out)) / fan_in``;
- Adam and sign-type optimisers: learning rate times ``base_d_in / (fan_in * number of factors)``;
- SGD: learning rate times ``blocks * carried * (fan_out / fan_in) / (base_d_out / base_d_in)``.

``base_d_in`` and ``base_d_out`` are the sizes of the dense layer at the width at which the base learning rate was
tuned; left out, they are the layer's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from structlin._arrays import Array, backend_of, ops, to_backend
from structlin.structure import AbstractStructure, Structure

RULES = ("paper", "rank_corrected")
OPTIMIZERS = ("adam", "adamw", "sign", "sgd")


def init_std(structure: AbstractStructure, *, rule: str = "paper", zero_last: bool = False) -> tuple[float, ...]:
    """Return the standard deviation at which to draw each factor; 0 for index arrays.

    ``rule="paper"``: ``sqrt(min(fan_in, fan_out)) / fan_in``. ``rule="rank_corrected"``: the same times
    :func:`rank_corrections`, so that the gain of the product does not fall with the rank.

    ``zero_last`` zeroes the factor applied last (output layers, query projections, the last layer of a residual
    branch). With ``rule="rank_corrected"`` a structure that passes through a bottleneck narrower than its input
    (low rank) then has its other factors drawn at ``sqrt(1 / fan_in)``, since the zeroed factor learns from their
    output, which would otherwise vanish with width.

    Raises ValueError for an unknown rule.

    Examples
    --------
    >>> s = Structure.parse("i,ri->r; r,or->o", i=64, r=4, o=64)
    >>> init_std(s)
    (0.03125, 0.5)
    >>> init_std(s, zero_last=True)
    (0.03125, 0.0)
    >>> init_std(s, rule="rank_corrected", zero_last=True)
    (0.125, 0.0)
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; one of {', '.join(RULES)}")
    corrections = rank_corrections(structure) if rule == "rank_corrected" else (1.0,) * len(structure.factors)
    trainable = [i for i, f in enumerate(structure.factors) if f.trainable]
    narrow = structure.rank_bound < min(structure.shape)
    stds = []
    for i, (f, c) in enumerate(zip(structure.factors, corrections, strict=True)):
        std = math.sqrt(min(f.fan_in, f.fan_out)) / f.fan_in * c if f.trainable else 0.0
        if zero_last and i in trainable:
            if i == trainable[-1]:
                std = 0.0
            elif rule == "rank_corrected" and narrow:
                std = math.sqrt(1 / f.fan_in)
        stds.append(std)
    return tuple(stds)


def rank_corrections(structure: AbstractStructure) -> tuple[float, ...]:
    """Factor by which each initial deviation is raised so that the gain of the product is that of rank 1.

    A chain of independent random factors, each of spectral norm ``sqrt(fan_out / fan_in)``, maps a generic vector
    with squared RMS gain ``G = prod(min(1, fan_out / fan_in))``. A matrix of rank ``R`` whose singular values are
    all of order ``sqrt(d_out / d_in)`` has ``G`` of order ``R / d_in``. What ``R / G`` gains when the rank axes
    (those that are neither axes of the input nor of the output) grow from 1 to their size is therefore lost by the
    product, and is given back, step by step, to the factor that contracts them: ``sqrt(r)`` for square Block
    Tensor-Train and Tensor-Train, 1 for low rank and Monarch, whose gain does not depend on the rank. Initialisation
    only: updates add up coherently over the rank, so the learning rate keeps the full fan-in.

    Examples
    --------
    >>> btt = Structure.parse("pa,pfra->frp; frp,ferp->fe", p=8, a=8, f=8, r=4, e=8)
    >>> rank_corrections(btt)
    (1.0, 2.0)
    """
    if not isinstance(structure, Structure):
        return (1.0,) * len(structure.factors)
    corrections: list[float] = []
    for segment in _segments(structure):
        sizes = dict(structure.sizes)
        outer = set(segment[0].input + segment[-1].output)
        inner = {a for s in segment for a in s.input + s.output} - outer
        reduced = {a: 1 if a in inner else n for a, n in sizes.items()}
        before = _potential(segment, reduced)
        for step in segment:
            reduced |= {a: sizes[a] for a in step.contracted if a in inner}
            after = _potential(segment, reduced)
            corrections.append(math.sqrt(after / before))
            before = after
    return tuple(corrections)


def _segments(structure: Structure) -> list[list]:
    """Return the chain cut where the vector is regrouped."""
    segments = [[structure.steps[0]]]
    for before, step in zip(structure.steps, structure.steps[1:], strict=False):
        if step.input == before.output:
            segments[-1].append(step)
        else:
            segments.append([step])
    return segments


def _potential(steps: Sequence, sizes: dict[str, int]) -> float:
    used = "".join(s.input + s.factor + s.output for s in steps)
    part = Structure.parse("; ".join(map(str, steps)), {a: n for a, n in sizes.items() if a in used})
    return part.rank_bound / math.prod(min(1.0, f.fan_out / f.fan_in) for f in part.factors)


def lr_multipliers(
    structure: AbstractStructure,
    *,
    optimizer: str = "adam",
    base_d_in: int | None = None,
    base_d_out: int | None = None,
) -> tuple[float, ...]:
    """Learning-rate multiplier of each factor, on the rate tuned for the dense layer at base width.

    ``optimizer`` is one of ``adam``, ``adamw``, ``sign`` (signSGD, Lion: as Adam) and ``sgd``. ``base_d_out`` is
    used by ``sgd`` alone. Index arrays get 0. Raises ValueError for an unknown optimiser or base sizes below 1.

    Blocks and carried positions in SGD's rule: the gradient that reaches an intermediate of
    ``blocks * carried * fan_out`` features is smaller by their number, so without it feature updates vanish with
    width. (Gradients of shared weights add up over the carried positions, but mostly of unlike vectors.)

    Examples
    --------
    >>> btt = Structure.parse("pa,pfra->frp; frp,ferp->fe", p=8, a=8, f=8, r=1, e=8)
    >>> lr_multipliers(btt)
    (4.0, 4.0)
    >>> lr_multipliers(btt, optimizer="sgd")
    (8.0, 8.0)
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; one of {', '.join(OPTIMIZERS)}")
    d_in = structure.d_in if base_d_in is None else base_d_in
    d_out = structure.d_out if base_d_out is None else base_d_out
    if d_in < 1 or d_out < 1:
        raise ValueError(f"base sizes must be at least 1, got base_d_in={d_in}, base_d_out={d_out}")
    count = sum(f.trainable for f in structure.factors)
    multipliers = []
    for f in structure.factors:
        if not f.trainable:
            multipliers.append(0.0)
        elif optimizer == "sgd":
            multipliers.append(f.blocks * f.carried * (f.fan_out / f.fan_in) * (d_in / d_out))
        else:
            multipliers.append(d_in / (f.fan_in * count))
    return tuple(multipliers)


def rms_cap(factor: Array, sigma: float, gain: Array | float = 1.0) -> Array:
    """``factor * gain * min(1, sigma / RMS(factor))``: the factor with its RMS held at or below ``sigma``.

    ``gain`` is a learned scalar (a 0-d or one-element array, or a number). Differentiable, also at 0, and free of
    host synchronisation; the RMS of half precision is taken in float32. Source: Qiu et al. (2024), section 4.3.
    Raises ValueError unless ``sigma`` is positive.

    Examples
    --------
    >>> capped = rms_cap(np.full((4, 3), 2.0), 0.5)
    >>> float(np.sqrt(np.mean(capped**2)))
    0.5
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    xp = ops(backend_of(factor))
    half = xp.is_low_precision(factor)
    square = xp.mean_square(xp.to_float32(factor) if half else factor)
    # The root has no derivative at 0, where zero-initialised factors start.
    rms = xp.maximum_scalar(xp.maximum_scalar(square, (sigma / 2) ** 2) ** 0.5, sigma)
    shrink = sigma / rms
    return factor * (gain * (xp.astype(shrink, factor.dtype) if half else shrink))


def random_factors(
    structure: AbstractStructure,
    *,
    seed: int | np.random.Generator | None = None,
    backend: str = "numpy",
    dtype: Any = None,
    device: Any = None,
    rule: str = "paper",
    zero_last: bool = False,
) -> tuple[Array, ...]:
    """Gaussian factors at the deviations of :func:`init_std`; index arrays are random permutations.

    Drawn with NumPy in float64 from ``seed`` (as for ``numpy.random.default_rng``; None: other values each time), so
    that all backends get the same values from one seed. Then converted to ``dtype`` (default: float64 for NumPy,
    float32 for torch and jax). Complex dtypes get independent real and imaginary parts with the given total deviation.
    """
    rng = np.random.default_rng(seed)
    if dtype is None:
        dtype = "float64" if backend == "numpy" else "float32"
    arrays = []
    for f, std in zip(structure.factors, init_std(structure, rule=rule, zero_last=zero_last), strict=True):
        if not f.trainable:
            arrays.append(to_backend(rng.permutation(f.numel).reshape(f.shape), backend, None, device))
            continue
        values = rng.standard_normal(f.shape) * std
        if "complex" in str(dtype):
            values = (values + 1j * rng.standard_normal(f.shape) * std) / math.sqrt(2)
        arrays.append(to_backend(values, backend, dtype, device))
    return tuple(arrays)
