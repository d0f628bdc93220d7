"""The nearest structured matrix to a dense one: :func:`project`.

How, by the roles of the axes (no structure is known by its name but those that are no chains):

=========================================  ============================================================================
structure                                  method; *optimal* means that no matrix of the structure is nearer
=========================================  ============================================================================
one factor (dense, block diagonal)         least squares, exact: optimal
two factors, whatever their roles          singular values of the slices: optimal. Low rank; Kronecker (the
                                           rearrangement of Van Loan and Pitsianis); Tensor-Train, Block Tensor-Train
                                           and Monarch of two cores, padded and regrouped too; the einsum space
                                           (not: axes carried past a regrouping whose sizes do not nest, or padding
                                           that cuts through slices, as in a padded Kronecker product)
circulant, Toeplitz, diagonal              averages along the diagonals: optimal
permutation                                linear assignment: optimal
three factors or more (Tensor-Train,       split off one by one with singular values, from both ends (for Tensor-Train
Block Tensor-Train, Kronecker, butterfly,  this is TT-SVD), then alternating least squares from there; exact where the
BLAST, any einsum chain)                   matrix has the structure and the splits are unique (not BLAST); with
                                           ``error_bound`` where there is one (not BLAST)
=========================================  ============================================================================

With ``input_covariance`` C the error is ``|| (W - A) C^(1/2) ||``, which for ``C = E[x x^H]`` is the error of the
outputs. One factor, circulant, Toeplitz, diagonal and permutation keep their closed forms. Two factors do if the input
axes that they do not share belong to one of them and C does not couple different values of the shared ones: low rank
with any C; Block Tensor-Train and Monarch of two cores with a C that is block diagonal over m_1. With any other C,
these two are found by variable projection: one factor is eliminated exactly, and L-BFGS minimises over the other (not
Monarch whose blocks do not divide its inner size). All other structures use alternating least squares. Both start from
the solutions for ``C = 1`` and for C without the coupling, and from as many random factors as ``restarts``.

Cost: the leading singular vectors of all slices; Kronecker and Tensor-Train have a single slice, of d_in d_out entries.
A sweep costs about as much as a few products that build the dense matrix from the factors, and with a covariance
``d_out d_in^2`` for each. A pass of variable projection costs less than one product ``d_out d_in^2``.

Computed on the host with NumPy; no gradient passes. Closed forms of singular values keep the dtype of W (half precision
is computed in float32), all else is in float64 or complex128, because least squares squares the condition.
"""

from structlin.projection._project import Projection, project
from structlin.projection._solve import Problem, Settings, Solution, estimated_error, solve, spectrum

__all__ = ["Problem", "Projection", "Settings", "Solution", "estimated_error", "project", "solve", "spectrum"]
