"""To lineax: an operator of jax arrays for its solvers."""

from __future__ import annotations

from typing import Any

import cola
from cola.ops import LinearOperator

from structlin._cola_compat import functions_of
from structlin.interop._arrays import require_operator


def to_lineax(A: LinearOperator, tags: Any = ()) -> Any:
    """Return ``A``, an operator of jax arrays, as a ``lineax.FunctionLinearOperator``.

    Parameters
    ----------
    A
        Operator of shape (d_out, d_in) of structlin or CoLA, over jax arrays.
    tags
        Further tags of lineax. Those that follow from ``cola.PSD`` and ``cola.SelfAdjoint`` annotations of a real
        operator (positive semidefinite, symmetric) are added.

    Returns
    -------
    Any
        An operator of lineax whose products are those of A, differentiable in the factors of A and usable under jit.

    Raises
    ------
    TypeError
        What is no operator, or holds no jax arrays.
    ImportError
        Where lineax is not installed (``pip install "structlin[peers]"``).

    Examples
    --------
    >>> import jax.numpy as jnp, lineax, structlin
    >>> K = cola.PSD(structlin.Kronecker(2 * jnp.eye(2), 3 * jnp.eye(3)))
    >>> found = lineax.linear_solve(to_lineax(K), jnp.ones(6), lineax.CG(rtol=1e-6, atol=1e-6))
    >>> bool(jnp.allclose(found.value, 1 / 6))
    True
    """
    import jax
    import lineax

    require_operator(A)
    if A.xnp is not functions_of("jax"):
        raise TypeError("lineax works on jax arrays; build the operator from jax arrays")
    tags = set(tags) if isinstance(tags, set | frozenset | list | tuple) else {tags}
    if not jax.numpy.issubdtype(A.dtype, jax.numpy.complexfloating):
        tags |= {lineax.symmetric_tag} if A.isa(cola.annotations.SelfAdjoint) else set()
        tags |= {lineax.positive_semidefinite_tag} if A.isa(cola.PSD) else set()
    # A pytree of its factors, so that lineax finds what it may differentiate.
    product = jax.tree_util.Partial(_product, A)
    return lineax.FunctionLinearOperator(product, jax.ShapeDtypeStruct((A.shape[1],), A.dtype), frozenset(tags))


def _product(A: LinearOperator, x: Any) -> Any:
    return A @ x
