"""Linear algebra that uses the structure, under one name for each thing.

Its rules stand in CoLA's dispatch once structlin is imported, so that ``cola.inv``, ``solve``, ``pinv``, ``logdet``,
``slogdet``, ``diag``, ``trace``, ``eig``, ``exp``, ``log``, ``pow``, ``sqrt`` and products and sums of operators use
what the structure allows; ``docs/linalg.md`` says what that is, with costs. All of it, and what CoLA has no name for,
is here too. ``tolerance``, ``max_iterations`` and ``seed`` mean the same everywhere.
"""

# Imported for the rules that they register.
from structlin import algebra as algebra
from structlin._cola_compat import use_for_solve
from structlin.algebra.tensor_train import add_tensor_trains, round_tensor_train
from structlin.linalg import _closures as _closures
from structlin.linalg import _determinant as _determinant
from structlin.linalg import _inverse as _inverse
from structlin.linalg._common import dense_limit
from structlin.linalg._diagonal import diagonal, trace
from structlin.linalg._functions import apply, expm, logm, matrix_power, sqrtm
from structlin.linalg._iterative import ConvergenceError, cg, lsmr, minres
from structlin.linalg._norms import frobenius_norm, inner_product, spectral_norm
from structlin.linalg._solve import inv_quad_logdet, inverse, logdet, lstsq, pinv, slogdet, solve
from structlin.linalg._spectrum import eig, eigsh, eigvals, svd
from structlin.verdicts import SVD, Answer, Determinant, Verdict

use_for_solve(solve)

__all__ = [
    "SVD",
    "Answer",
    "ConvergenceError",
    "Determinant",
    "Verdict",
    "add_tensor_trains",
    "apply",
    "cg",
    "dense_limit",
    "diagonal",
    "eig",
    "eigsh",
    "eigvals",
    "expm",
    "frobenius_norm",
    "inner_product",
    "inv_quad_logdet",
    "inverse",
    "logdet",
    "logm",
    "lsmr",
    "lstsq",
    "matrix_power",
    "minres",
    "pinv",
    "round_tensor_train",
    "slogdet",
    "solve",
    "spectral_norm",
    "sqrtm",
    "svd",
    "trace",
]
