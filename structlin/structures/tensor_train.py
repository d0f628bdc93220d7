"""Tensor-Train matrices of any number of cores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from structlin.registry import NamedOperator, register
from structlin.structure import Structure, axis_letter
from structlin.structures._common import Factorization, bond_sizes, exact_bonds, split_shape


def _structure(out_sizes: tuple[int, ...], in_sizes: tuple[int, ...], bonds: tuple[int, ...]) -> Structure:
    """Return the chain; ``bonds`` holds all ranks, also the outer ones, which are 1."""
    count = len(in_sizes)
    ins, outs = ([axis_letter(start + k) for k in range(count)] for start in (0, count))
    ranks = [axis_letter(2 * count + k) for k in range(count + 1)]
    steps, state = [], [ranks[0], *ins]
    for k in range(count):
        after = [*outs[: k + 1], ranks[k + 1], *ins[k + 1 :]]
        steps.append(f"{''.join(state)},{ranks[k]}{outs[k]}{ins[k]}{ranks[k + 1]}->{''.join(after)}")
        state = after
    sizes = dict(zip(ins + outs + ranks, (*in_sizes, *out_sizes, *bonds), strict=True))
    return Structure.parse("; ".join(steps), sizes)


@register("tensor_train")
class TensorTrain(NamedOperator):
    r"""Tensor-Train matrix: each entry is a product of small matrices, one from each core.

    Core :math:`W^{(k)}` has shape (r_k, n_k, m_k, r_{k+1}), with :math:`r_0 = r_c = 1`. Two cores give

    .. math:: A_{ab, ij} = \sum_{u} W^{(0)}_{raiu} W^{(1)}_{ubjv},

    where r and v have size 1. Rows and columns are indexed as in a Kronecker product, which is the case of rank 1. The
    number of parameters is :math:`\sum_k r_k n_k m_k r_{k+1}`. Each step carries the axes that its core does not have,
    so the number of MACs is larger than that of parameters.

    Parameters
    ----------
    *factors
        The cores :math:`W^{(k)}`, of shape (r_k, n_k, m_k, r_{k+1}), core 0 first.

    Examples
    --------
    >>> import numpy as np
    >>> A, B = np.arange(6.0).reshape(1, 2, 3, 1), np.arange(8.0).reshape(1, 4, 2, 1)
    >>> np.array_equal(TensorTrain(A, B).to_dense(), np.kron(A[0, ..., 0], B[0, ..., 0]))
    True
    """

    formula = "rij,raiu->auj; auj,ubjv->abv"
    parameters = "sum_k r_k n_k m_k r_{k+1}"
    source = "Oseledets (2010), Approximation of 2^d x 2^d matrices using tensor decomposition"
    examples = (
        ((35, 6), {"rank": 4}),
        ((6, 35), {"rank": 3, "factorization": ((3, 2), (5, 7))}),
        ((30, 24), {"cores": 3, "rank": (2, 5)}),
    )

    @staticmethod
    def design(
        shape: tuple[int, int], /, *, cores: int = 2, rank: int | Sequence[int] = 8,
        factorization: Factorization = "balanced",
    ) -> Structure:  # fmt: skip
        """Return the structure of a (d_out, d_in) Tensor-Train matrix.

        Parameters
        ----------
        shape, cores, rank, factorization
            As for :meth:`structlin.BlockTensorTrain.design`.

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
        return _structure(*sizes, (1, *bond_sizes(rank, cores), 1))

    @classmethod
    def exact_rank(  # type: ignore[override]
        cls, shape: tuple[int, int], *, cores: int = 2, factorization: Factorization = "balanced"
    ) -> tuple[int, ...]:
        r"""Return the ranks between the cores at which every matrix is represented.

        The rank between cores k - 1 and k is
        :math:`\min(\prod_{j<k} n_j m_j, \prod_{j \ge k} n_j m_j)`: the smaller number of entries that the cores on one
        side index.

        Parameters
        ----------
        shape, cores, factorization
            As for :meth:`design`.

        Returns
        -------
        tuple of int
            One rank for each pair of neighbouring cores.
        """
        pairs = [n * m for n, m in zip(*split_shape(shape, cores, factorization), strict=True)]
        return exact_bonds(pairs, pairs)

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> Structure:
        bad = not shapes or any(len(s) != 4 for s in shapes)
        if bad or shapes[0][0] != 1 or shapes[-1][3] != 1 or any(a[3] != b[0] for a, b in pairwise(shapes)):
            raise ValueError(
                "core k of c must have shape (r_k, n_k, m_k, r_{k+1}) with matching ranks and r_0 = r_c = 1, got "
                + (", ".join(map(str, shapes)) or "none")
            )
        return _structure(tuple(s[1] for s in shapes), tuple(s[2] for s in shapes), (*(s[0] for s in shapes), 1))
