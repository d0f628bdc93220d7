"""Butterfly matrices: log2(d) stages of 2 x 2 blocks."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure, axis_letter


@register("butterfly")
class Butterfly(NamedOperator):
    r"""Product of log2(d) sparse matrices in the pattern of the fast Fourier transform, with free entries.

    Stage k combines pairs of elements at distance :math:`2^k` by matrices of shape (2, 2):

    .. math:: y_{unv} = \sum_a W^{(k)}_{uvna} \, x_{uav},

    with axes of sizes :math:`u = d / 2^{k+1}`, :math:`v = 2^k` and :math:`n = a = 2`. The outputs of a stage take the
    positions of its inputs. The number of parameters and that of MACs are :math:`2 d \log_2 d`. The matrix is a Block
    Tensor-Train of rank 1 with :math:`\log_2 d` cores, up to the order of its rows.

    The initial deviations of the scale rule (:func:`structlin.init_std`) control each factor. The spectral norm of the
    product of :math:`\log_2 d` random factors still grows with d: 2.8 at d = 64, 4.4 at 256, 21 at 1024.

    Parameters
    ----------
    *factors
        One array of shape (u, v, 2, 2) for each stage, stage 0 first.

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
        """Return the structure of a (d, d) butterfly matrix.

        Parameters
        ----------
        shape
            Shape ``(d, d)`` of the matrix, where d is a power of two and at least 2.

        Returns
        -------
        Structure
            The structure, without arrays.

        Raises
        ------
        ValueError
            For any other shape. The message names the nearest sizes that are allowed.
        """
        d = shape[0]
        if shape[0] != shape[1]:
            raise ValueError(f"a butterfly matrix is square, got shape {shape}; use ({min(shape)}, {min(shape)})")
        if d < 2 or d & (d - 1):
            low = 1 << (d.bit_length() - 1)
            near = f"{low} and {2 * low}" if low > 1 else "2"
            raise ValueError(f"the size of a butterfly matrix is a power of two, got {d}; the nearest sizes are {near}")
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
            needed = f"; {len(shapes)} factors must have shapes {wanted}" if structure else ""
            raise ValueError(
                f"factor k of a butterfly matrix must have shape (d / 2^(k+1), 2^k, 2, 2){needed}, "
                f"got shapes {shapes or 'none'}"
            )
        return structure
