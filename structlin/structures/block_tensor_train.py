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
    """Tensor-Train whose cores depend on every live axis.

    For two cores of rank r,

    ``A[(n_0, n_1), (m_1, m_0)] = sum_r W1[n_0, n_1, r, m_1] W0[m_1, n_0, r, m_0]``,

    with d_in = m_1 m_0 and d_out = n_0 n_1. W0 has shape (m_1, n_0, r, m_0), W1 has shape (n_0, n_1, r, m_1).
    Parameters = MACs = ``r m_1 n_0 (m_0 + n_1)``; rank at most ``min(d_in, d_out, r m_1 n_0)``. Rank 1 with equal
    sizes is a Monarch matrix of sqrt(d) blocks; rank sqrt(d) represents every matrix. Core k of more than two has
    every output axis already made and every input axis still to come in batch.

    Examples
    --------
    >>> import numpy as np
    >>> A = BlockTensorTrain(np.ones((3, 5, 2, 4)), np.ones((5, 7, 2, 3)))
    >>> A.shape, A.structure.num_params
    ((35, 12), 330)
    """

    formula = "pa,pfra->frp; frp,ferp->fe"
    parameters = "r m_1 n_0 (m_0 + n_1)"
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
        """``cores`` cores with inner ranks ``rank`` (one for all, or cores - 1 of them).

        Sizes by rule, or given as ``((n_0, ...), (m_0, ...))``. Raises ValueError for sizes that cannot be split
        and ranks below 1.
        """
        sizes = split_shape(shape, cores, factorization)
        return block_tensor_train_chain(*sizes, bond_sizes(rank, cores))

    @classmethod
    def exact_rank(  # type: ignore[override]
        cls, shape: tuple[int, int], *, cores: int = 2, factorization: Factorization = "balanced"
    ) -> tuple[int, ...]:
        """Bond k: the smaller of the inputs read before it and the outputs written behind it."""
        outs, ins = split_shape(shape, cores, factorization)
        return exact_bonds(ins, outs)

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> Structure:
        """Core k has shape (n_0..n_{k-1}, m_{c-1}..m_{k+1}, n_k, [r_k+1], [r_k], m_k)."""
        count = len(shapes)
        wanted = [count + (k > 0) + (k < count - 1) + 1 for k in range(count)]
        if not shapes or [len(s) for s in shapes] != wanted:
            raise ValueError(
                f"{count} cores of a Block Tensor-Train have {wanted} axes, "
                f"got shapes {', '.join(map(str, shapes)) or 'none'}"
            )
        outs = [s[count - 1] for s in shapes]
        ins = [s[-1] for s in shapes]
        ranks = [s[count] for s in shapes[:-1]]
        structure = block_tensor_train_chain(outs, ins, ranks)
        expected = tuple(f.shape for f in structure.factors)
        if tuple(shapes) != expected:
            raise ValueError(
                f"cores of shapes {shapes} contradict one another; sizes read off their ends need {expected}"
            )
        return structure
