"""The dense matrix, as a chain of one step: the baseline of every comparison."""

from __future__ import annotations

import numpy as np

from structlin._arrays import Array
from structlin.registry import NamedOperator, register
from structlin.structure import Structure


@register("dense")
class Dense(NamedOperator):
    r"""Dense matrix, the baseline of every comparison.

    .. math:: A_{oi} = W^{(0)}_{oi}

    The factor has shape (d_out, d_in). The number of parameters and that of MACs are :math:`d_\text{in} d_\text{out}`.

    Parameters
    ----------
    *factors
        One array of shape (d_out, d_in).

    Examples
    --------
    >>> import numpy as np
    >>> Dense(np.arange(6.0).reshape(2, 3)) @ np.ones(3)
    array([ 3., 12.])
    """

    formula = "i,oi->o"
    parameters = "d_in d_out"
    source = "-"
    examples = (((5, 7), {}), ((7, 5), {}), ((1, 6), {}))

    def _entries(self, i: np.ndarray, j: np.ndarray) -> Array:
        step, W = self.structure.steps[0], self.factors[0]  # type: ignore[attr-defined]
        return W[i, j] if step.factor[0] == step.output else W[j, i]  # the transpose keeps the layout

    @staticmethod
    def design(shape: tuple[int, int], /) -> Structure:
        """Return the structure of a (d_out, d_in) dense matrix. There are no options.

        Parameters
        ----------
        shape
            Shape ``(d_out, d_in)`` of the matrix.

        Returns
        -------
        Structure
            The structure, without arrays.
        """
        return Structure.parse(Dense.formula, i=shape[1], o=shape[0])
