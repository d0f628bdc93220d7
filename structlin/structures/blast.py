"""BLAST: block matrices whose blocks share low-rank factors."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure
from structlin.structures._common import divide, matrix_rank, positive_int


@register("blast")
class Blast(NamedOperator):
    """Block (i, j) is ``U_i diag(s_ij) V_j``: shared factors, coupled by one vector for each block.

    Factors: V of shape (b, r, d_in / b), s of shape (r, b, b) indexed [rank, i, j], U of shape (b, d_out / b, r).
    Parameters = MACs = ``r (d_in + d_out + b^2)``; rank at most ``b r``.

    Examples
    --------
    >>> Blast.design((12, 8), blocks=2, rank=3).num_params
    72
    """

    formula = "ja,jra->jr; jr,rij->ir; ir,ior->io"
    parameters = "r (d_in + d_out + b^2)"
    source = "Lee et al. (2024), BLAST: Block-Level Adaptive Structured Matrices"
    examples = (((15, 6), {"blocks": 3, "rank": 2}), ((8, 20), {"rank_fraction": 0.3}))

    @staticmethod
    def design(
        shape: tuple[int, int],
        /,
        *,
        blocks: int = 4,
        rank: int | None = None,
        rank_fraction: float | None = None,
    ) -> Structure:
        """``blocks`` by ``blocks`` blocks, which must divide both sizes, and a rank as in low rank.

        Raises ValueError for sizes that do not divide (naming the nearest that do) and ranks below 1.
        """
        b = positive_int("blocks", blocks)
        return Structure.parse(
            Blast.formula,
            j=b,
            a=divide("d_in", shape[1], b),
            r=matrix_rank(shape, rank, rank_fraction),
            i=b,
            o=divide("d_out", shape[0], b),
        )
