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
    """``A = A_1 (x) ... (x) A_c``, factors of shape (n_k, m_k), with ``d_out = prod n_k`` and ``d_in = prod m_k``.

    Parameters ``sum n_k m_k``; MACs of two factors ``n_1 m_2 (m_1 + n_2)``. The first factor is applied first.

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
        """``cores`` factors, with sizes by rule or given as ``((n_1, ...), (m_1, ...))``.

        Raises ValueError for sizes that cannot be split.
        """
        return _structure(*split_shape(shape, cores, factorization))

    @classmethod
    def _infer(cls, *shapes: tuple[int, ...]) -> Structure:
        if not shapes or any(len(s) != 2 for s in shapes):
            raise ValueError(
                f"Kronecker takes one matrix or more, got arrays of shape {', '.join(map(str, shapes)) or 'none'}"
            )
        return _structure(tuple(s[0] for s in shapes), tuple(s[1] for s in shapes))
