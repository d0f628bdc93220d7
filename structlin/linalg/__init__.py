"""Linear algebra that uses the structure of operators.

Importing structlin registers rules with CoLA's dispatch. ``cola.inv``, ``solve``, ``pinv``, ``logdet``, ``slogdet``,
``diag``, ``trace``, ``eig``, ``exp``, ``log``, ``pow``, ``sqrt`` and products and sums of operators then use closed
forms of the structure. ``docs/linalg.md`` lists methods and costs. This package has the same functions, and functions
that CoLA lacks.

These statements hold for all functions:

- ``A`` is an operator of structlin or CoLA over NumPy, torch or jax; any other object raises TypeError. ``b`` is an
  array of its library. Results have the library and device of A.
- LAPACK needs float32, float64 or a complex dtype; half precision raises ValueError.
- ``tolerance`` bounds a relative error or residual. ``max_iterations`` bounds the number of iterations. ``seed`` seeds
  random vectors of an estimate or the start of an iteration. Closed forms do not use them.
- Functions with ``full_output=True`` return a :class:`structlin.verdicts.Answer` instead of the value.
- A matrix that is singular to working precision raises ``numpy.linalg.LinAlgError``, which is a ValueError. An
  iteration that does not converge raises :class:`ConvergenceError`.
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
