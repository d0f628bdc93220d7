"""Linear algebra that uses the structure.

Its rules stand in CoLA's dispatch once structlin is imported, so that ``cola.inv``, ``solve``, ``pinv``, ``logdet``,
``slogdet``, ``diag``, ``trace``, ``eig``, ``exp``, ``log``, ``pow``, ``sqrt`` and products and sums of operators use
what the structure allows; ``docs/linalg.md`` says what that is, with costs. What CoLA has no name for is here.
"""

# Imported for the rules that they register.
from structlin.linalg import _closures as _closures
from structlin.linalg import _cola as _cola
from structlin.linalg import _determinant as _determinant
from structlin.linalg import _diagonal as _diagonal
from structlin.linalg import _functions as _functions
from structlin.linalg import _inverse as _inverse
from structlin.linalg import _woodbury as _woodbury
from structlin.linalg._cola import use_for_solve
from structlin.linalg._common import DENSE_LIMIT
from structlin.linalg._iterative import ConvergenceError
from structlin.linalg._norms import frobenius_norm, inner, spectral_norm
from structlin.linalg._solve import solve
from structlin.linalg._spectrum import SVD, svd
from structlin.linalg._tensor_train import add_tensor_trains, round_tensor_train

use_for_solve(solve)

__all__ = [
    "DENSE_LIMIT",
    "SVD",
    "ConvergenceError",
    "add_tensor_trains",
    "frobenius_norm",
    "inner",
    "round_tensor_train",
    "solve",
    "spectral_norm",
    "svd",
]
