"""Block Tensor-Train (BTT) of any number of cores."""

from __future__ import annotations

from collections.abc import Sequence

from structlin.registry import NamedOperator, register
from structlin.structure import Structure, axis_letter
from structlin.structures._common import Factorization, bond_sizes, exact_bonds, split_shape


def block_tensor_train_chain(out_sizes: Sequence[int], in_sizes: Sequence[int], ranks: Sequence[int]) -> Structure:
    """Return the BTT chain with core sizes n_k, m_k (core 0 first) and the inner ranks between the cores.

    Each intermediate is written in the order (batch axes of the next step, its contracted axes), and each factor
    as (batch, free, contracted) in the same order, so that a step reads both without a copy.
    """
    count = len(in_sizes)
    ins, outs = ([axis_letter(start + k) for k in range(count)] for start in (0, count))
    bonds = ["", *(axis_letter(2 * count + k) for k in range(count - 1)), ""]
    steps, state = [], "".join(reversed(ins))
    for k in range(count):
        batch = "".join(a for a in state if a in outs[:k] or a in ins[k + 1 :])
        factor = batch + outs[k] + bonds[k + 1] + bonds[k] + ins[k]
        waiting = "".join(reversed(ins[k + 2 :])) + bonds[k + 1] + "".join(ins[k + 1 : k + 2])
        after = "".join(outs[: k + 1]) + waiting
        steps.append(f"{state},{factor}->{after}")
        state = after
    sizes = dict(zip([*ins, *outs, *bonds[1:-1]], (*in_sizes, *out_sizes, *ranks), strict=True))
    return Structure.parse("; ".join(steps), sizes)


@register("block_tensor_train")
class BlockTensorTrain(NamedOperator):
    r"""Tensor-Train matrix without weight sharing: each core has every axis that is present at its step.

    Two cores of rank r give, with :math:`d_\text{in} = p a` and :math:`d_\text{out} = f e`,

    .. math:: A_{fe, pa} = \sum_r W^{(1)}_{ferp} W^{(0)}_{pfra}.

    The number of parameters and that of MACs are :math:`p f r (a + e)`. The rank of the matrix is at most
    :math:`\min(d_\text{in}, d_\text{out}, p f r)`. If all sizes are equal, rank r = 1 is a Monarch matrix of
    :math:`\sqrt d` blocks, and rank :math:`r = \sqrt d` represents every matrix.

    For any number of cores, :math:`d_\text{in} = \prod_k m_k` and :math:`d_\text{out} = \prod_k n_k`. The batch axes of
    core k are the output axes of earlier cores and the input axes of later ones. Two cores have :math:`p = m_1`,
    :math:`a = m_0`, :math:`f = n_0` and :math:`e = n_1`.

    Parameters
    ----------
    *factors
        The cores, core 0 first. Two cores have shapes (p, f, r, a) and (f, e, r, p).

    Examples
    --------
    >>> import numpy as np
    >>> A = BlockTensorTrain(np.ones((3, 5, 2, 4)), np.ones((5, 7, 2, 3)))
    >>> A.shape, A.structure.num_params
    ((35, 12), 330)
    """

    formula = "pa,pfra->frp; frp,ferp->fe"
    parameters = "p f r (a + e)"
    source = "Qiu et al. (2024), section 3.2"
    examples = (
        ((35, 6), {"rank": 2}),
        ((6, 35), {"rank": 3, "factorization": ((3, 2), (7, 5))}),
        ((30, 24), {"cores": 3, "rank": (2, 5)}),
        ((210, 120), {"cores": 4, "factorization": "greedy"}),
    )

    @staticmethod
    def design(
        shape: tuple[int, int], /, *, cores: int = 2, rank: int | Sequence[int] = 1,
        factorization: Factorization = "balanced",
    ) -> Structure:  # fmt: skip
        """Return the structure of a (d_out, d_in) Block Tensor-Train matrix.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        cores
            Number of cores.
        rank
            Ranks between the cores: one integer for all, or ``cores - 1`` of them.
        factorization
            Name of a rule that splits both sizes (:func:`structlin.factorize`), or the sizes of the cores as
            ``((n_0, n_1, ...), (m_0, m_1, ...))``.

        Returns
        -------
        Structure
            The structure, without arrays.

        Raises
        ------
        ValueError
            If a size cannot be split in this way or a rank is below 1.
        """
        sizes = split_shape(shape, cores, factorization)
        return block_tensor_train_chain(*sizes, bond_sizes(rank, cores))

    @classmethod
    def exact_rank(  # type: ignore[override]
        cls, shape: tuple[int, int], *, cores: int = 2, factorization: Factorization = "balanced"
    ) -> tuple[int, ...]:
        r"""Return the ranks between the cores at which every matrix is represented.

        The rank between cores k - 1 and k is :math:`\min(\prod_{j<k} m_j, \prod_{j \ge k} n_j)`: these are the only
        axes that the cores on the two sides do not share.

        Parameters
        ----------
        shape, cores, factorization
            As for :meth:`design`.

        Returns
        -------
        tuple of int
            One rank for each pair of neighbouring cores.
        """
        outs, ins = split_shape(shape, cores, factorization)
        return exact_bonds(ins, outs)

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> Structure:
        """Read the sizes off cores of shape (n_0, ..., n_{k-1}, m_{c-1}, ..., m_{k+1}, n_k, r_{k+1}, r_k, m_k).

        The first core has no r_k, the last one no r_{k+1}.
        """
        count = len(shapes)
        wanted = [count + (k > 0) + (k < count - 1) + 1 for k in range(count)]
        if not shapes or [len(s) for s in shapes] != wanted:
            raise ValueError(
                f"{count} cores of a Block Tensor-Train must have {wanted} axes, "
                f"got shapes {', '.join(map(str, shapes)) or 'none'}"
            )
        outs = [s[count - 1] for s in shapes]
        ins = [s[-1] for s in shapes]
        ranks = [s[count] for s in shapes[:-1]]
        structure = block_tensor_train_chain(outs, ins, ranks)
        expected = tuple(f.shape for f in structure.factors)
        if tuple(shapes) != expected:
            raise ValueError(
                f"the shapes {shapes} of the cores contradict one another; the sizes n_k, m_k and r_k that they "
                f"contain need {expected}"
            )
        return structure
