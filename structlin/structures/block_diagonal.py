"""Block diagonal: independent dense blocks."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure
from structlin.structures._common import divide, positive_int


@register("block_diagonal")
class BlockDiagonal(NamedOperator):
    r"""Block-diagonal matrix of dense blocks that share no parameters.

    .. math:: A_{po, qa} = \begin{cases} W^{(0)}_{poa} & p = q \\ 0 & p \ne q \end{cases}

    The blocks are stacked in one array of shape (b, d_out / b, d_in / b), where b is the number of blocks. The number
    of parameters and that of MACs are :math:`d_\text{in} d_\text{out} / b`.

    Parameters
    ----------
    *factors
        One array of shape (b, d_out / b, d_in / b).

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
        """Return the structure of a (d_out, d_in) block-diagonal matrix.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        blocks
            Number of blocks. It must divide d_out and d_in.

        Returns
        -------
        Structure
            The structure, without arrays.

        Raises
        ------
        ValueError
            If ``blocks`` is below 1 or does not divide a size. The message names the nearest sizes that it divides.
        """
        b = positive_int("blocks", blocks)
        return Structure.parse(
            BlockDiagonal.formula, p=b, a=divide("d_in", shape[1], b), o=divide("d_out", shape[0], b)
        )
