"""BLAST: block matrices whose blocks share low-rank factors."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure
from structlin.structures._common import divide, matrix_rank, positive_int


@register("blast")
class Blast(NamedOperator):
    r"""Block matrix whose low-rank blocks share one factor for each row and one for each column of blocks.

    .. math:: A_{io, ja} = \sum_r W^{(2)}_{ior} W^{(1)}_{rij} W^{(0)}_{jra}

    Here i and j index b rows and b columns of blocks. Block (i, j) is the product of :math:`W^{(2)}_i`, a diagonal
    matrix of its own with entries :math:`W^{(1)}_{rij}`, and :math:`W^{(0)}_j`. The factors have shapes
    (b, r, d_in / b), (r, b, b) and (b, d_out / b, r). The number of parameters and that of MACs are
    :math:`r (d_\text{in} + d_\text{out} + b^2)`. The rank of the matrix is at most :math:`b r`.

    Parameters
    ----------
    *factors
        The three arrays, in the order in which they are applied.

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
        """Return the structure of a (d_out, d_in) BLAST matrix.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        blocks
            Number of rows and of columns of blocks. It must divide d_out and d_in.
        rank
            Rank of each block. Default: ``ceil(sqrt(min(d_out, d_in)))``.
        rank_fraction
            The rank as a fraction of ``min(d_out, d_in)``, rounded up. Excludes ``rank``.

        Returns
        -------
        Structure
            The structure, without arrays.

        Raises
        ------
        ValueError
            If ``blocks`` does not divide a size (the message names the nearest sizes that it divides), or for a rank
            below 1.
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
