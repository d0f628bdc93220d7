r"""The spectral scale rule: the initial deviation of each factor, and the multiplier of its learning rate.

The matrix and its update should have a spectral norm of order :math:`\sqrt{d_\text{out} / d_\text{in}}` (Yang, Simon,
Bernstein, *A Spectral Condition for Feature Learning*, 2023). Qiu et al. (*Compute Better Spent*, ICML 2024, section 3)
apply this condition to each factor, with the fans that follow from the roles of its axes:

- The initial deviation is :math:`\sigma = \sqrt{\min(\mathrm{fan\_in}, \mathrm{fan\_out})} / \mathrm{fan\_in}`.
- Adam and optimizers that use the sign of the gradient multiply the learning rate by
  :math:`d_\text{in}^\text{base} / (c \cdot \mathrm{fan\_in})`, where c is the number of factors.
- SGD multiplies it by :math:`\text{blocks} \cdot \text{carried} \cdot (\mathrm{fan\_out} / \mathrm{fan\_in}) /
  (d_\text{out}^\text{base} / d_\text{in}^\text{base})`.

The base sizes are those of the dense layer for which the learning rate was tuned. By default they are the sizes of the
layer itself.
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
    r"""Return the initial standard deviation of each factor; 0 for index arrays.

    Parameters
    ----------
    structure
        Any structure.
    rule
        ``paper``: :math:`\sqrt{\min(\mathrm{fan\_in}, \mathrm{fan\_out})} / \mathrm{fan\_in}`. ``rank_corrected``: the
        same times :func:`rank_corrections`, so that the gain of the product does not decrease with the rank.
    zero_last
        Set the factor that is applied last to zero, as in output layers, query projections and the last layers of
        residual branches. With ``rank_corrected``, a structure whose rank is smaller than its sizes (low rank) then
        has its other factors drawn with deviation :math:`\sqrt{1 / \mathrm{fan\_in}}`. The zeroed factor learns from
        their output, which would otherwise vanish with the width.

    Returns
    -------
    tuple of float
        One deviation for each factor, in the order in which they are applied.

    Raises
    ------
    ValueError
        If the rule is unknown.

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
    r"""Return the number by which ``rule="rank_corrected"`` multiplies the initial deviation of each factor.

    A chain of independent random factors, each of spectral norm :math:`\sqrt{\mathrm{fan\_out} / \mathrm{fan\_in}}`,
    has the squared RMS gain :math:`G = \prod_k \min(1, \mathrm{fan\_out}_k / \mathrm{fan\_in}_k)` on a generic vector.
    A matrix of rank R with all singular values of order :math:`\sqrt{d_\text{out} / d_\text{in}}` has a gain of order
    :math:`R / d_\text{in}`. Rank axes are the axes that belong neither to the input nor to the output. If they grow
    from 1 to their size, the gain of the product falls behind by the factor by which :math:`R / G` grows.

    The factor that contracts a rank axis is multiplied by the square root of that factor. The correction is
    :math:`\sqrt r` for square Block Tensor-Train and Tensor-Train matrices. It is 1 for low rank and Monarch, whose
    gain does not depend on the rank. Learning rates are not corrected, because updates add up coherently over the rank.

    Parameters
    ----------
    structure
        Any structure.

    Returns
    -------
    tuple of float
        One number for each factor, in the order in which they are applied.

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
    """Return the steps, divided where the vector is regrouped."""
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
    """Return the multiplier of each factor for the learning rate tuned for a dense layer of the base sizes.

    The rule of SGD contains blocks and carried positions, because the gradient that reaches an intermediate of
    ``blocks * carried * fan_out`` features is smaller by their number. Without this factor the feature updates vanish
    with the width. Gradients of shared weights add up over the carried positions, but mostly those of different
    vectors.

    Parameters
    ----------
    structure
        Any structure.
    optimizer
        ``adam``, ``adamw``, ``sgd`` or ``sign``. The last one stands for signSGD and Lion and has the rule of Adam.
    base_d_in, base_d_out
        Sizes of the dense layer for which the rate was tuned. Default: those of the structure. Only ``sgd`` uses
        ``base_d_out``.

    Returns
    -------
    tuple of float
        One multiplier for each factor; 0 for index arrays.

    Raises
    ------
    ValueError
        If the optimizer is unknown or a base size is below 1.

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
    r"""Return a factor whose root mean square is at most ``sigma``, times a gain (Qiu et al. 2024, section 4.3).

    .. math:: W \cdot g \cdot \min\left(1, \frac{\sigma}{\operatorname{RMS}(W)}\right)

    The result is differentiable, also at W = 0, and its computation does not wait for a GPU. In half precision the RMS
    is computed in float32.

    Parameters
    ----------
    factor
        The array W.
    sigma
        Largest RMS, usually the initial deviation of the factor.
    gain
        The scalar g: a number, or a learned array with one element.

    Returns
    -------
    Array
        Array of the shape of ``factor``.

    Raises
    ------
    ValueError
        If ``sigma`` is not positive.

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
    """Draw Gaussian factors with the deviations of :func:`init_std`; index arrays are random permutations.

    NumPy draws the values in float64, so one seed gives the same values in all array libraries.

    Parameters
    ----------
    structure
        Any structure.
    seed
        Seed or generator, as for ``numpy.random.default_rng``. None gives different values each time.
    backend
        ``numpy``, ``torch`` or ``jax``.
    dtype
        Dtype of the factors. Default: float64 for NumPy, float32 for torch and jax. A complex dtype gives independent
        real and imaginary parts; the deviation is that of the complex number.
    device
        Device of the factors, as the array library takes it.
    rule, zero_last
        Options of :func:`init_std`.

    Returns
    -------
    tuple of Array
        Factors in the order in which they are applied.

    Raises
    ------
    ValueError
        If the rule, the array library or the dtype is unknown, or the library cannot have the dtype on this device.

    Examples
    --------
    >>> s = Structure.parse("i,ri->r; r,or->o", i=64, r=4, o=48)
    >>> [w.shape for w in random_factors(s, seed=0)]
    [(4, 64), (48, 4)]
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
