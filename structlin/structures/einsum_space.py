"""The continuous space of two-factor einsums, and its three coordinates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from structlin.factorize import divisors
from structlin.registry import NamedOperator, register
from structlin.structure import Structure

_AXES = {"alpha": "a", "beta": "b", "gamma": "g", "delta": "d", "epsilon": "e", "phi": "f", "rho": "r"}


class Theta(NamedTuple):
    r"""Exponents of the axis sizes of a two-factor einsum.

    The axes of the input have sizes :math:`a = d_\text{in}^\alpha`, :math:`b = d_\text{in}^\beta` and
    :math:`g = d_\text{in}^\gamma`. Those of the output have sizes :math:`d = d_\text{out}^\delta`,
    :math:`e = d_\text{out}^\epsilon` and :math:`f = d_\text{out}^\phi`. The rank axis has size
    :math:`r = \min(d_\text{in}, d_\text{out})^\rho`. All exponents lie in [0, 1], with
    :math:`\alpha + \beta + \gamma = \delta + \epsilon + \phi = 1`.
    """

    alpha: float
    beta: float
    gamma: float
    delta: float
    epsilon: float
    phi: float
    rho: float


class Coordinates(NamedTuple):
    r"""Exponents with which a family of square matrices grows with its size d.

    The number of MACs grows as :math:`d^{1 + \nu}`. The rank grows as :math:`d^\psi`; :math:`\psi = 1` is full rank.
    The number of MACs for each parameter grows as :math:`d^\omega`; :math:`\omega = 0` means that no weight is shared.
    """

    omega: float
    psi: float
    nu: float


def coordinates(theta: Sequence[float]) -> Coordinates:
    r"""Return omega, psi and nu of a structure of the space (Potapczynski et al. 2024, section 3).

    The rank exponent psi is the smallest exponent of a cut that separates input and output. A cut with both factors on
    one side has exponent 1. With only :math:`W^{(0)}` on the side of the input the exponent is
    :math:`2 + \rho - \alpha - \epsilon`, the term of the paper. With only :math:`W^{(1)}` there it is
    :math:`2 + \rho - \beta - \delta`.

    Parameters
    ----------
    theta
        Seven exponents (:class:`Theta`).

    Returns
    -------
    Coordinates
        The three exponents.

    Raises
    ------
    ValueError
        If theta lies outside the space.

    Examples
    --------
    >>> coordinates((0.5, 0, 0.5, 0, 0.5, 0.5, 0))  # Block Tensor-Train of rank 1
    Coordinates(omega=0.0, psi=1.0, nu=0.5)
    >>> coordinates((0.5, 0.5, 0, 0.5, 0.5, 0, 0))  # Kronecker
    Coordinates(omega=0.5, psi=1.0, nu=0.5)
    """
    t = check_theta(theta)
    return Coordinates(
        omega=min(t.alpha + t.delta, t.beta + t.epsilon) - min(t.alpha, t.epsilon),
        psi=1 + min(0.0, 1 + t.rho - t.alpha - t.epsilon, 1 + t.rho - t.beta - t.delta),
        nu=1 + t.rho - min(t.alpha, t.epsilon),
    )


def check_theta(theta: Sequence[float]) -> Theta:
    """Return ``theta`` as a :class:`Theta`; ValueError unless both sums are 1 and every entry lies in [0, 1]."""
    if len(theta) != 7:
        raise ValueError(f"theta has seven entries ({', '.join(_AXES)}), got {len(theta)}")
    t = Theta(*map(float, theta))
    if any(not 0 <= v <= 1 for v in t):
        raise ValueError(f"every entry of theta must lie in [0, 1], got {tuple(t)}")
    for names in (("alpha", "beta", "gamma"), ("delta", "epsilon", "phi")):
        total = sum(getattr(t, n) for n in names)
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"{' + '.join(names)} must be 1, got {total:g}")
    return t


@register("einsum")
class EinsumSpace(NamedOperator):
    r"""Member of the continuous space of two-factor einsums, with axis sizes set by the exponents theta.

    .. math:: A_{fed, gba} = \sum_r W^{(1)}_{fergb} W^{(0)}_{gfdra}

    Dense, low-rank, Kronecker, Tensor-Train, Monarch and Block Tensor-Train matrices are corners of the space. The
    number of parameters is :math:`a f d r g + f e r g b`, that of MACs :math:`g f r b d (a + e)`, where each letter is
    the size of its axis.

    The sizes of axes are divisors of :math:`d_\text{in}` and :math:`d_\text{out}`, so theta is met only approximately.
    :func:`theta_of` returns the theta of a structure.

    Parameters
    ----------
    *factors
        The arrays :math:`W^{(0)}` of shape (g, f, d, r, a) and :math:`W^{(1)}` of shape (f, e, r, g, b).

    Examples
    --------
    >>> s = EinsumSpace.design((64, 64), theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0))
    >>> s.num_params, s.macs
    (1024, 1024)
    """

    formula = "gba,gfdra->frgbd; frgbd,fergb->fed"
    parameters = "a f d r g + f e r g b"
    source = (
        "Potapczynski et al. (2024), "
        "Searching for Efficient Linear Layers over a Continuous Space of Structured Matrices"
    )
    examples = (
        ((60, 70), {"theta": (0.4, 0.2, 0.4, 0.2, 0.4, 0.4, 0.2)}),
        ((42, 30), {"theta": (0.5, 0.5, 0, 0.5, 0.5, 0, 0.3)}),
    )

    @staticmethod
    def design(shape: tuple[int, int], /, *, theta: Sequence[float] = (0.5, 0.0, 0.5, 0.0, 0.5, 0.5, 0.0)) -> Structure:
        """Return the structure whose axis sizes are nearest to those of ``theta`` on a logarithmic scale.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        theta
            Seven exponents (:class:`Theta`). Default: Block Tensor-Train of rank 1.

        Returns
        -------
        Structure
            The structure, without arrays.

        Raises
        ------
        ValueError
            If theta lies outside the space, or if an axis gets size 1 although its exponent gives at least 2, because
            the size of the matrix does not have the divisors.
        """
        t = check_theta(theta)
        d_out, d_in = shape
        a, b, g = _nearest(d_in, (t.alpha, t.beta, t.gamma))
        d, e, f = _nearest(d_out, (t.delta, t.epsilon, t.phi))
        r = max(1, round(min(shape) ** t.rho))
        for total, exponents, found in ((d_in, t[:3], (a, b, g)), (d_out, t[3:6], (d, e, f))):
            if any(n == 1 and total**x >= 2 for n, x in zip(found, exponents, strict=True)):
                raise ValueError(
                    f"{total} has no factors near {', '.join(f'{total**x:.3g}' for x in exponents)}, the sizes that "
                    f"theta {tuple(t)} gives; choose a size with more divisors"
                )
        return Structure.parse(EinsumSpace.formula, a=a, b=b, g=g, d=d, e=e, f=f, r=r)


def theta_of(structure: Structure) -> Theta:
    """Return the theta of a structure of this space.

    Parameters
    ----------
    structure
        A chain of the form of :class:`EinsumSpace`.

    Returns
    -------
    Theta
        The exponents of the axis sizes.

    Raises
    ------
    ValueError
        If the chain has another form, or d_in or d_out is 1.

    Examples
    --------
    >>> theta_of(EinsumSpace.design((64, 64), theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0))).alpha
    0.5
    """
    if "; ".join(map(str, structure.steps)) != EinsumSpace.formula or min(structure.shape) < 2:
        raise ValueError(
            f"theta is defined for chains {EinsumSpace.formula!r} with d_in and d_out above 1, got {structure!r}"
        )
    sizes = dict(structure.sizes)
    bases = dict.fromkeys("abg", structure.d_in) | dict.fromkeys("def", structure.d_out)
    bases["r"] = min(structure.shape)
    return Theta(**{name: math.log(sizes[axis], bases[axis]) for name, axis in _AXES.items()})


def _nearest(n: int, exponents: Sequence[float]) -> tuple[int, int, int]:
    """Return three factors of ``n`` whose logarithms are nearest to ``exponents * log(n)``."""
    wanted = [x * math.log(n) for x in exponents]
    triples = ((x, y, n // (x * y)) for x in divisors(n) for y in divisors(n // x))
    return min(triples, key=lambda t: sum((math.log(k) - w) ** 2 for k, w in zip(t, wanted, strict=True)))
