"""Low rank: the product of a wide and a tall matrix."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure
from structlin.structures._common import matrix_rank


@register("low_rank")
class LowRank(NamedOperator):
    """``A = U V``: factors in the order in which they meet a vector, V of shape (r, d_in), U of shape (d_out, r).

    Parameters = MACs = ``r (d_in + d_out)``; rank at most r.

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
        """Return a (d_out, d_in) matrix of rank ``rank``, or ``ceil(rank_fraction * min(d_out, d_in))``.

        With neither, the rank is ``ceil(sqrt(min(d_out, d_in)))``. Raises ValueError for a rank below 1, a
        fraction outside (0, 1], or both.
        """
        return Structure.parse(LowRank.formula, i=shape[1], r=matrix_rank(shape, rank, rank_fraction), o=shape[0])

    @classmethod
    def exact_rank(cls, shape: tuple[int, int]) -> int:  # type: ignore[override]
        """``min(d_out, d_in)``."""
        return min(shape)
