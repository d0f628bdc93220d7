r"""Scaling laws: fits of error against compute, with intervals, and comparisons at equal error.

The law in one variable is :math:`\mathrm{error} = a \, C^{-\alpha}`, optionally plus an irreducible error, and is
fitted to the logarithms (Hestness et al., *Deep Learning Scaling is Predictable, Empirically*, 2017; Hoffmann et al.,
*Training Compute-Optimal Large Language Models*, 2022). The compute C may have any unit: MACs of one sample, MACs of a
training run, or parameters.

The law in two variables, the sizes of the model and of the data, is :math:`L = E + A N^{-\alpha} + B D^{-\beta}`
(:func:`fit_loss_law`). It gives the optimal split of a compute budget. :func:`fit_isoflop` and :func:`fit_envelope`
find that split without a law of the loss.

>>> import numpy as np
>>> macs = np.array([1e6, 3e6, 1e7, 3e7, 1e8, 3e8])
>>> noise = np.exp(0.01 * np.random.default_rng(0).standard_normal((2, 6)))
>>> dense = fit_power_law(macs, 2.0 * macs**-0.10 * noise[0])
>>> structured = fit_power_law(macs, 2.0 * macs**-0.13 * noise[1])
>>> compare_exponents(structured.bootstrap(200), dense.bootstrap(200)).excludes(0)
True
"""

from structlin.scaling_laws._allocation import (
    Allocation,
    Envelope,
    IsoFlop,
    Parabola,
    fit_envelope,
    fit_isoflop,
)
from structlin.scaling_laws._compare import (
    Multiplier,
    compare_exponents,
    compute_multiplier,
    interpolated_multiplier,
)
from structlin.scaling_laws._frontier import pareto_frontier
from structlin.scaling_laws._law import LOSSES, METHODS, Bootstrap, Estimate, PowerLaw, PowerLawFit, fit_power_law
from structlin.scaling_laws._loss_law import (
    FLOPS,
    TERMS,
    LossBootstrap,
    LossLaw,
    LossLawFit,
    Optimum,
    fit_loss_law,
    lacks_sizes,
)

__all__ = [
    "FLOPS",
    "LOSSES",
    "METHODS",
    "TERMS",
    "Allocation",
    "Bootstrap",
    "Envelope",
    "Estimate",
    "IsoFlop",
    "LossBootstrap",
    "LossLaw",
    "LossLawFit",
    "Multiplier",
    "Optimum",
    "Parabola",
    "PowerLaw",
    "PowerLawFit",
    "compare_exponents",
    "compute_multiplier",
    "fit_envelope",
    "fit_isoflop",
    "fit_loss_law",
    "fit_power_law",
    "interpolated_multiplier",
    "lacks_sizes",
    "pareto_frontier",
]
