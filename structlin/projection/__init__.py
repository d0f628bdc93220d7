"""The nearest structured matrix to a dense one: :func:`project`.

For a chain, the roles of its axes decide on the method. Any other structure implements ``nearest`` itself.

=========================================  ============================================================================
structure                                  method; *optimal* means that no matrix of the structure is nearer
=========================================  ============================================================================
one factor (dense, block diagonal)         linear least squares: optimal
two factors                                singular values of the slices: optimal. Low rank; Kronecker (Van Loan and
                                           Pitsianis 1993); Tensor-Train, Block Tensor-Train and Monarch of two cores,
                                           also if padded or regrouped; the einsum space. Exceptions: axes carried past
                                           a regrouping whose sizes do not nest, and padding that cuts through slices,
                                           as in a padded Kronecker product
circulant, Toeplitz, diagonal              averages along the diagonals: optimal
permutation                                linear assignment: optimal
three or more factors (Tensor-Train,       factors are split off one by one with singular values, from both ends (for
Block Tensor-Train, Kronecker, butterfly,  Tensor-Train this is TT-SVD, Oseledets 2011), followed by alternating least
BLAST, any einsum chain)                   squares. Exact if the matrix has the structure and the splits are unique.
                                           Except for BLAST, they are, and there is an ``error_bound``
=========================================  ============================================================================

With ``input_covariance`` C the error is ``|| (W - A) C^(1/2) ||``. For ``C = E[x x^H]`` it is the error of the outputs.
One factor, circulant, Toeplitz, diagonal and permutation have closed forms for any C. Two factors have one under two
conditions: one of them has all input axes that they do not share, and C does not couple different values of the shared
ones. So low rank has one for any C, and Block Tensor-Train and Monarch of two cores for a C that is block diagonal over
m_1. For any other C these two use variable projection: one factor is eliminated exactly, and L-BFGS minimises over the
other (not Monarch whose blocks do not divide its inner size). Every other structure uses alternating least squares.
Both iterations start from the solutions for ``C = 1`` and for C without coupling, and from ``restarts`` random factors.

A closed form costs the leading singular vectors of all slices. Kronecker and Tensor-Train have a single slice of
d_in d_out entries. A sweep costs a few products that build the dense matrix from the factors; with a covariance each
takes ``d_out d_in^2`` operations. A pass of variable projection costs less than one such product.
"""

from structlin.projection._project import Projection, project
from structlin.projection._solve import Problem, Settings, Solution, estimated_error, solve, spectrum

__all__ = ["Problem", "Projection", "Settings", "Solution", "estimated_error", "project", "solve", "spectrum"]
