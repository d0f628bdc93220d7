"""Block diagonal: independent dense blocks."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure
from structlin.structures._common import divide, positive_int


@register("block_diagonal")
class BlockDiagonal(NamedOperator):
    """``A = diag(B_1, ..., B_b)``, with the blocks stacked in one array of shape (b, d_out / b, d_in / b).

    Parameters = MACs = ``d_in d_out / b``.

    Examples
    --------
    >>> import numpy as np
    >>> BlockDiagonal(np.arange(1.0, 3.0).reshape(2, 1, 1)).to_dense()
    array([[1., 0.],
           [0., 2.]])
    """

    formula = "pa,poa->po"
    parameters = "d_in d_out / b"
    source = "-"
    examples = (((15, 6), {"blocks": 3}), ((6, 15), {"blocks": 3}), ((8, 12), {}))

    @staticmethod
    def design(shape: tuple[int, int], /, *, blocks: int = 4) -> Structure:
        """``blocks`` blocks, which must divide d_out and d_in; ValueError naming the nearest sizes otherwise."""
        b = positive_int("blocks", blocks)
        return Structure.parse(
            BlockDiagonal.formula, p=b, a=divide("d_in", shape[1], b), o=divide("d_out", shape[0], b)
        )
