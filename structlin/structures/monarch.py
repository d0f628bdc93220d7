"""Monarch matrices of any number of blocks."""

from __future__ import annotations

from structlin.registry import NamedOperator, infer_from_chain, register
from structlin.structure import Structure
from structlin.structures._common import positive_int

_REGROUPED = "pa,pqa->pq; gl,log->lo"
_CHAIN = "pa,pfra->frp; frp,ferp->fe"


@register("monarch")
class Monarch(NamedOperator):
    r"""Two block-diagonal matrices of b blocks with a fixed permutation between them.

    The first factor holds b blocks of shape (q, a), the second b blocks of shape (e, q), with

    .. math:: a = \lceil d_\text{in} / b \rceil, \quad e = \lceil d_\text{out} / b \rceil, \quad q = \min(a, e).

    The number of parameters and that of MACs are :math:`b q (a + e)`. If b does not divide :math:`d_\text{in}`, the
    input is padded with zeros. If b does not divide :math:`d_\text{out}`, the end of the output is cut off.

    The permutation distributes the b q outputs of the first factor over the blocks of the second. If b divides q, block
    f of the second factor receives the f-th run of :math:`r = q / b` outputs of each block of the first. This is a
    Block Tensor-Train,

    .. math:: A_{fe, pa} = \sum_r W^{(1)}_{ferp} W^{(0)}_{pfra}, \quad p = f = b,

    and the factors have shapes (b, b, r, a) and (b, e, r, b). Otherwise output u of the first factor goes to block u
    mod b of the second, and the factors have shapes (b, q, a) and (b, e, q).

    Parameters
    ----------
    *factors
        The two arrays, in the order in which they are applied.

    Examples
    --------
    >>> Monarch.design((12, 8), blocks=2)
    Structure.parse('pa,pfra->frp; frp,ferp->fe', p=2, a=4, f=2, r=2, e=6)
    >>> Monarch.design((10, 7), blocks=3)
    Structure.parse('pa,pfra->frp; frp,ferp->fe', p=3, a=3, f=3, r=1, e=4, d_in=7, d_out=10)
    >>> Monarch.design((44, 44), blocks=4).factors[1].shape
    (4, 11, 11)
    """

    formula = _CHAIN
    parameters = "p f r (a + e)"
    source = "Dao et al. (2022), Monarch: Expressive Structured Matrices for Efficient and Accurate Training"
    examples = (
        ((12, 8), {"blocks": 2}),
        ((10, 21), {"blocks": 3}),
        ((23, 14), {"blocks": 3}),
        ((33, 44), {}),
    )

    @staticmethod
    def design(shape: tuple[int, int], /, *, blocks: int = 4) -> Structure:
        """Return the structure of a (d_out, d_in) Monarch matrix.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        blocks
            Number of blocks of each factor.

        Returns
        -------
        Structure
            The structure, without arrays.

        Raises
        ------
        ValueError
            If ``blocks`` is below 1.
        """
        b = positive_int("blocks", blocks)
        d_out, d_in = shape
        p, s = -(-d_in // b), -(-d_out // b)
        q = min(p, s)
        if q % b:
            return Structure.parse(_REGROUPED, p=b, a=p, q=q, g=q, l=b, o=s, d_in=d_in, d_out=d_out)
        return Structure.parse(_CHAIN, p=b, a=p, f=b, r=q // b, e=s, d_in=d_in, d_out=d_out)

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> Structure:
        """Unpadded sizes; a padded Monarch is ``StructuredOperator(Monarch.design(...), factors)``."""
        regrouped = bool(shapes) and len(shapes[0]) == 3
        structure = infer_from_chain("Monarch", _REGROUPED if regrouped else _CHAIN, shapes)
        sizes = dict(structure.sizes)
        if not regrouped and sizes["p"] != sizes["f"]:
            raise ValueError(f"Monarch factors have equal numbers of blocks, got shapes {shapes}")
        return structure
