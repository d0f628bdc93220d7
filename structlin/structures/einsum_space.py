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
    """Exponents of the axis sizes: ``a = d_in^alpha`` and so on; alpha+beta+gamma = delta+epsilon+phi = 1.

    alpha, beta, gamma split the input, delta, epsilon, phi the output (sizes ``d_out^delta``, ...), and rho is the
    rank, of size ``min(d_in, d_out)^rho``.
    """

    alpha: float
    beta: float
    gamma: float
    delta: float
    epsilon: float
    phi: float
    rho: float


class Coordinates(NamedTuple):
    """omega: parameter sharing (0: none); psi: rank exponent (1: full rank); nu: compute exponent.

    MACs grow as ``d^(1 + nu)``, the rank as ``d^psi``, and MACs for each parameter as ``d^omega``.
    """

    omega: float
    psi: float
    nu: float


def coordinates(theta: Sequence[float]) -> Coordinates:
    """(omega, psi, nu) of a structure of the space (Potapczynski et al. 2024, section 3).

    psi is the exponent of the narrowest cut between input and output: 1 with both factors on one side,
    ``2 + rho - alpha - epsilon`` with W0 on the input's side (the paper's term), ``2 + rho - beta - delta`` with W1.

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
    """``theta`` as a :class:`Theta`; ValueError unless both sums are 1 and all lie in [0, 1]."""
    if len(theta) != 7:
        raise ValueError(f"theta has seven entries {', '.join(_AXES)}, got {len(theta)}")
    t = Theta(*map(float, theta))
    if any(not 0 <= v <= 1 for v in t):
        raise ValueError(f"every entry of theta lies in [0, 1], got {tuple(t)}")
    for names in (("alpha", "beta", "gamma"), ("delta", "epsilon", "phi")):
        total = sum(getattr(t, n) for n in names)
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"{' + '.join(names)} must be 1, got {total:g}")
    return t


@register("einsum")
class EinsumSpace(NamedOperator):
    """``y[f,e,d] = sum_{r,g,b} W1[f,e,r,g,b] sum_a W0[g,f,d,r,a] x[g,b,a]``, with sizes set by theta.

    The space holds dense, low rank, Kronecker, Tensor-Train, Monarch and Block Tensor-Train as corners. W0 has shape
    (g, f, d, r, a), W1 has shape (f, e, r, g, b). Axis sizes must be divisors, so that theta is met as nearly as the
    sizes allow: :func:`theta_of` tells which theta was reached.

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
        """Axis sizes nearest to ``theta`` in the logarithm; the default is Block Tensor-Train of rank 1.

        Raises ValueError for a theta outside the space, and where an axis with a positive exponent would be left
        with size 1 though the exponent asks for at least 2 (the size has no such divisors).
        """
        t = check_theta(theta)
        d_out, d_in = shape
        a, b, g = _nearest(d_in, (t.alpha, t.beta, t.gamma))
        d, e, f = _nearest(d_out, (t.delta, t.epsilon, t.phi))
        r = max(1, round(min(shape) ** t.rho))
        for total, exponents, found in ((d_in, t[:3], (a, b, g)), (d_out, t[3:6], (d, e, f))):
            if any(n == 1 and total**x >= 2 for n, x in zip(found, exponents, strict=True)):
                raise ValueError(
                    f"{total} has no factors near {', '.join(f'{total**x:.3g}' for x in exponents)}, "
                    f"as theta {tuple(t)} asks; choose a size with more divisors"
                )
        return Structure.parse(EinsumSpace.formula, a=a, b=b, g=g, d=d, e=e, f=f, r=r)


def theta_of(structure: Structure) -> Theta:
    """Return the theta that a structure of this space has; ValueError for any other chain.

    Examples
    --------
    >>> theta_of(EinsumSpace.design((64, 64), theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0))).alpha
    0.5
    """
    if "; ".join(map(str, structure.steps)) != EinsumSpace.formula or min(structure.shape) < 2:
        raise ValueError(f"a chain {EinsumSpace.formula!r} of sizes above 1 is needed, got {structure!r}")
    sizes = dict(structure.sizes)
    bases = dict.fromkeys("abg", structure.d_in) | dict.fromkeys("def", structure.d_out)
    bases["r"] = min(structure.shape)
    return Theta(**{name: math.log(sizes[axis], bases[axis]) for name, axis in _AXES.items()})


def _nearest(n: int, exponents: Sequence[float]) -> tuple[int, int, int]:
    """Three factors of ``n`` whose logarithms are nearest to ``exponents * log(n)``."""
    wanted = [x * math.log(n) for x in exponents]
    triples = ((x, y, n // (x * y)) for x in divisors(n) for y in divisors(n // x))
    return min(triples, key=lambda t: sum((math.log(k) - w) ** 2 for k, w in zip(t, wanted, strict=True)))
