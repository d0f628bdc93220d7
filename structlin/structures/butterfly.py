"""Butterfly matrices: log2(d) stages of 2 x 2 blocks."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure, axis_letter


@register("butterfly")
class Butterfly(NamedOperator):
    """The pattern of the fast Fourier transform, with free entries: Block Tensor-Train of rank 1, all cores 2 x 2.

    Stage k mixes the pairs of elements that are 2^k apart. Its factor has shape (d / 2^(k+1), 2^k, 2, 2), indexed
    [group, place in the group, output, input]. Outputs keep the places of their inputs. Parameters = MACs =
    ``2 d log2(d)``. Drawn by the paper's rule, a product of log2(d) random factors, its spectral norm grows with d:
    2.8 at d = 64, 4.4 at 256, 21 at 1024.

    Examples
    --------
    >>> Butterfly.design((8, 8)).num_params
    48
    """

    formula = "uav,uvna->unv, once for each bit"
    parameters = "2 d log2(d)"
    source = "Dao et al. (2019), Learning Fast Algorithms for Linear Transforms Using Butterfly Factorizations"
    examples = (((8, 8), {}), ((2, 2), {}), ((64, 64), {}))

    @staticmethod
    def design(shape: tuple[int, int], /) -> Structure:
        """Return a square matrix whose size is a power of two; ValueError naming the nearest sizes otherwise."""
        d = shape[0]
        if shape[0] != shape[1]:
            raise ValueError(f"a butterfly matrix is square, got shape {shape}; ({min(shape)}, {min(shape)}) would do")
        if d < 2 or d & (d - 1):
            low = 1 << (d.bit_length() - 1)
            near = f"{low} and {2 * low}" if low > 1 else "2"
            raise ValueError(f"the size of a butterfly matrix is a power of two, got {d}; the nearest are {near}")
        stages, steps = d.bit_length() - 1, []
        sizes: dict[str, int] = {}
        for k in range(stages):
            u, a, v, n = (axis_letter(4 * k + i) for i in range(4))
            sizes |= {u: d >> (k + 1), a: 2, v: 1 << k, n: 2}
            steps.append(f"{u}{a}{v},{u}{v}{n}{a}->{u}{n}{v}")
        return Structure.parse("; ".join(steps), sizes)

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> Structure:
        d = 2 ** len(shapes)
        structure = Butterfly.design((d, d)) if shapes else None
        if structure is None or (wanted := tuple(f.shape for f in structure.factors)) != tuple(shapes):
            needed = f", {len(shapes)} of them shapes {wanted}" if structure else ""
            raise ValueError(
                f"a butterfly has factors of shape (d / 2^(k+1), 2^k, 2, 2){needed}, got {shapes or 'none'}"
            )
        return structure
