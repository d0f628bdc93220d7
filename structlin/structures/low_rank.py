"""Low rank: the product of a wide and a tall matrix."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure
from structlin.structures._common import matrix_rank


@register("low_rank")
class LowRank(NamedOperator):
    r"""Product of a tall and a wide matrix.

    .. math:: A_{oi} = \sum_r W^{(1)}_{or} W^{(0)}_{ri}

    The constructor takes the factors in the order in which they are applied: first :math:`W^{(0)}` of shape (r, d_in),
    then :math:`W^{(1)}` of shape (d_out, r). The number of parameters and that of MACs are
    :math:`r (d_\text{in} + d_\text{out})`. The rank is at most r.

    Parameters
    ----------
    *factors
        The arrays :math:`W^{(0)}` and :math:`W^{(1)}`.

    Examples
    --------
    >>> import numpy as np
    >>> V, U = np.ones((1, 3)), np.array([[1.0], [2.0]])
    >>> LowRank(V, U).to_dense()
    array([[1., 1., 1.],
           [2., 2., 2.]])
    """

    formula = "i,ri->r; r,or->o"
    parameters = "r (d_in + d_out)"
    source = "Qiu et al. (2024), section 2"
    examples = (((7, 11), {"rank": 3}), ((11, 7), {"rank_fraction": 0.4}), ((5, 17), {}))

    @staticmethod
    def design(shape: tuple[int, int], /, *, rank: int | None = None, rank_fraction: float | None = None) -> Structure:
        """Return the structure of a (d_out, d_in) matrix of low rank.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        rank
            Size of the axis between the two factors. Default: ``ceil(sqrt(min(d_out, d_in)))``.
        rank_fraction
            The rank as a fraction of ``min(d_out, d_in)``, rounded up. Excludes ``rank``.

        Returns
        -------
        Structure
            The structure, without arrays.

        Raises
        ------
        ValueError
            If the rank is below 1, the fraction is outside (0, 1], or both are given.
        """
        return Structure.parse(LowRank.formula, i=shape[1], r=matrix_rank(shape, rank, rank_fraction), o=shape[0])

    @classmethod
    def exact_rank(cls, shape: tuple[int, int]) -> int:  # type: ignore[override]
        """Return ``min(d_out, d_in)``, the smallest rank at which every matrix is represented."""
        return min(shape)
