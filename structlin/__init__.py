"""Structured matrices for linear algebra and for neural networks.

A structured matrix is an operator of shape (d_out, d_in) on NumPy, torch or jax arrays (:mod:`structlin.structures`).
It is defined by an ordered chain of einsums (:class:`Structure`), from which parameters, multiply-accumulates,
transpose and the spectral scale are derived. The functions of :mod:`structlin.linalg` and CoLA (``cola.inv``,
``logdet``, ``diag``) use the structure. :mod:`structlin.interop` converts operators to and from other libraries.
"""

__version__ = "0.1.0"

from structlin import _cola_compat
from structlin import execution as execution
from structlin._array_scales import ArrayScale, array_scales
from structlin.conversion import conversions, convert, exact_rank
from structlin.counting import (
    Work,
    activation_bytes,
    flops,
    intensity,
    macs,
    num_bytes,
    num_params,
    register_work,
    work_of,
)
from structlin.factorize import factorize, nearest_sizes
from structlin.interop import as_operator, from_cola, from_scipy, to_cola, to_jax, to_numpy, to_scipy, to_torch
from structlin.linalg import (
    SVD,
    ConvergenceError,
    add_tensor_trains,
    frobenius_norm,
    inner_product,
    round_tensor_train,
    solve,
    spectral_norm,
    svd,
)
from structlin.operators import StructuredOperator
from structlin.projection import Projection, project
from structlin.registry import (
    NamedOperator,
    design,
    register,
    structure_class,
    structure_names,
    structure_options,
    unregister,
)
from structlin.scale import init_std, lr_multipliers, random_factors, rank_corrections, rms_cap
from structlin.structure import AbstractStructure, Factor, Step, Structure
from structlin.structures import (
    Blast,
    BlockDiagonal,
    BlockTensorTrain,
    Butterfly,
    Circulant,
    Coordinates,
    Cosine,
    Dense,
    Diagonal,
    EinsumSpace,
    Fourier,
    Hadamard,
    Hankel,
    Kronecker,
    LowRank,
    Monarch,
    Permutation,
    TensorTrain,
    Theta,
    Toeplitz,
    coordinates,
    theta_of,
)

_cola_compat.install()

__all__ = [
    "SVD",
    "AbstractStructure",
    "ArrayScale",
    "Blast",
    "BlockDiagonal",
    "BlockTensorTrain",
    "Butterfly",
    "Circulant",
    "ConvergenceError",
    "Coordinates",
    "Cosine",
    "Dense",
    "Diagonal",
    "EinsumSpace",
    "Factor",
    "Fourier",
    "Hadamard",
    "Hankel",
    "Kronecker",
    "LowRank",
    "Monarch",
    "NamedOperator",
    "Permutation",
    "Projection",
    "Step",
    "Structure",
    "StructuredOperator",
    "TensorTrain",
    "Theta",
    "Toeplitz",
    "Work",
    "activation_bytes",
    "add_tensor_trains",
    "array_scales",
    "as_operator",
    "conversions",
    "convert",
    "coordinates",
    "design",
    "exact_rank",
    "factorize",
    "flops",
    "frobenius_norm",
    "from_cola",
    "from_scipy",
    "init_std",
    "inner_product",
    "intensity",
    "lr_multipliers",
    "macs",
    "nearest_sizes",
    "num_bytes",
    "num_params",
    "project",
    "random_factors",
    "rank_corrections",
    "register",
    "register_work",
    "rms_cap",
    "round_tensor_train",
    "solve",
    "spectral_norm",
    "structure_class",
    "structure_names",
    "structure_options",
    "svd",
    "theta_of",
    "to_cola",
    "to_jax",
    "to_numpy",
    "to_scipy",
    "to_torch",
    "unregister",
    "work_of",
]
