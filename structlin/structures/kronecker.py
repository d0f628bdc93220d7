"""Kronecker products of any number of factors."""

from __future__ import annotations

from structlin.registry import NamedOperator, register
from structlin.structure import Structure, axis_letter
from structlin.structures._common import Factorization, split_shape


def _structure(out_sizes: tuple[int, ...], in_sizes: tuple[int, ...]) -> Structure:
    count = len(in_sizes)
    ins = [axis_letter(k) for k in range(count)]
    outs = [axis_letter(count + k) for k in range(count)]
    steps, state = [], list(ins)
    for k in range(count):
        after = [*state[:k], outs[k], *state[k + 1 :]]
        steps.append(f"{''.join(state)},{outs[k]}{ins[k]}->{''.join(after)}")
        state = after
    sizes = dict(zip(ins + outs, (*in_sizes, *out_sizes), strict=True))
    return Structure.parse("; ".join(steps), sizes)


@register("kronecker")
class Kronecker(NamedOperator):
    r"""Kronecker product of two or more small matrices.

    .. math:: A = W^{(0)} \otimes W^{(1)} \otimes \dots \otimes W^{(c-1)}

    Factor :math:`W^{(k)}` has shape (n_k, m_k), with :math:`d_\text{out} = \prod_k n_k` and
    :math:`d_\text{in} = \prod_k m_k`. The factors are applied in this order. The number of parameters is
    :math:`\sum_k n_k m_k`.

    Two factors have the axes of the einsums: :math:`A_{ab, ij} = W^{(0)}_{ai} W^{(1)}_{bj}`, with sizes
    :math:`a = n_0`, :math:`b = n_1`, :math:`i = m_0` and :math:`j = m_1`. Their number of MACs is
    :math:`a j (i + b)`.

    Parameters
    ----------
    *factors
        The matrices, of shape (n_k, m_k), in the order of the product.

    Examples
    --------
    >>> import numpy as np
    >>> A, B = np.arange(6.0).reshape(2, 3), np.arange(8.0).reshape(4, 2)
    >>> np.array_equal(Kronecker(A, B).to_dense(), np.kron(A, B))
    True
    """

    formula = "ij,ai->aj; aj,bj->ab"
    parameters = "sum_k n_k m_k"
    source = "Van Loan (2000), The ubiquitous Kronecker product"
    examples = (
        ((35, 6), {}),
        ((6, 35), {"factorization": ((2, 3), (5, 7))}),
        ((30, 24), {"cores": 3, "factorization": "greedy"}),
    )

    @staticmethod
    def design(shape: tuple[int, int], /, *, cores: int = 2, factorization: Factorization = "balanced") -> Structure:
        """Return the structure of a (d_out, d_in) Kronecker product.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.
        cores
            Number of factors.
        factorization
            Name of a rule that splits both sizes (:func:`structlin.factorize`), or the sizes of the factors as
            ``((n_0, n_1, ...), (m_0, m_1, ...))``.

        Returns
        -------
        Structure
            The structure, without arrays.

        Raises
        ------
        ValueError
            If a size cannot be split in this way.
        """
        return _structure(*split_shape(shape, cores, factorization))

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> Structure:
        if not shapes or any(len(s) != 2 for s in shapes):
            raise ValueError(
                f"Kronecker takes one matrix or more, got arrays of shape {', '.join(map(str, shapes)) or 'none'}"
            )
        return _structure(tuple(s[0] for s in shapes), tuple(s[1] for s in shapes))
