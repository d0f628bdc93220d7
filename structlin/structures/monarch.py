"""Monarch matrices of any number of blocks."""

from __future__ import annotations

from structlin.registry import NamedOperator, infer_from_chain, register
from structlin.structure import Structure
from structlin.structures._common import positive_int

_REGROUPED = "pa,pqa->pq; gl,log->lo"
_CHAIN = "pa,pfra->frp; frp,ferp->fe"


@register("monarch")
class Monarch(NamedOperator):
    """Two block-diagonal matrices of b blocks with a fixed permutation between them.

    With p = ceil(d_in / b), s = ceil(d_out / b) and inner block size q = min(p, s), the first factor holds b blocks
    of (q, p), the second b blocks of (s, q). Between them the b q numbers are dealt out in turn to the b blocks, in
    runs of q / b where b divides q, else one by one. Where b divides q this is the Block Tensor-Train chain with
    m_1 = n_0 = b and rank q / b, and the factors have the shapes (b, b, q / b, p) and (b, s, q / b, b); otherwise
    (b, q, p) and (b, s, q). Where b does not divide d_in (d_out), the input is padded with zeros (the output cut).
    Parameters = MACs = ``b q (p + s)``.

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
    parameters = "b q (p + s)"
    source = "Dao et al. (2022), Monarch: Expressive Structured Matrices for Efficient and Accurate Training"
    examples = (
        ((12, 8), {"blocks": 2}),
        ((10, 21), {"blocks": 3}),
        ((23, 14), {"blocks": 3}),
        ((33, 44), {}),
    )

    @staticmethod
    def design(shape: tuple[int, int], /, *, blocks: int = 4) -> Structure:
        """``blocks`` blocks in both factors. Raises ValueError for fewer than one."""
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
