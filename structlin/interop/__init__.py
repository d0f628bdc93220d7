"""Conversion to and from other libraries: arrays, SciPy, operators of CoLA, lineax, linear_operator and GPyTorch."""

from structlin.interop._arrays import to_jax, to_numpy, to_torch
from structlin.interop._cola import from_cola, to_cola
from structlin.interop._linear_operator import to_linear_operator
from structlin.interop._lineax import to_lineax
from structlin.interop._scipy import FromSciPy, as_operator, from_scipy, to_scipy

__all__ = [
    "FromSciPy",
    "as_operator",
    "from_cola",
    "from_scipy",
    "to_cola",
    "to_jax",
    "to_linear_operator",
    "to_lineax",
    "to_numpy",
    "to_scipy",
    "to_torch",
]
