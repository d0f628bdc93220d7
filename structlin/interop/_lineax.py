"""Conversion to lineax, whose solvers then apply to operators of jax arrays."""

from __future__ import annotations

from typing import Any

import cola
from cola.ops import LinearOperator

from structlin._cola_compat import functions_of, library_of
from structlin.interop._arrays import require_operator


def to_lineax(A: LinearOperator, tags: Any = ()) -> Any:
    """Return an operator of jax arrays as a ``lineax.FunctionLinearOperator``.

    Parameters
    ----------
    A
        Operator of shape (d_out, d_in) of structlin or CoLA, over jax arrays.
    tags
        Additional tags of lineax. The tags of symmetric and positive semidefinite operators are added if A is real and
        annotated as ``cola.SelfAdjoint`` or ``cola.PSD``.

    Returns
    -------
    Any
        An operator of lineax. It is differentiable with respect to the factors of A and can be used under ``jax.jit``.

    Raises
    ------
    TypeError
        If A is not an operator, or not one of jax arrays.
    ImportError
        If lineax is not installed (``pip install "structlin[peers]"``).

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
        raise TypeError(
            f"lineax works on jax arrays, got an operator of {library_of(A.xnp)} arrays; build it from jax arrays"
        )
    tags = set(tags) if isinstance(tags, set | frozenset | list | tuple) else {tags}
    if not jax.numpy.issubdtype(A.dtype, jax.numpy.complexfloating):
        tags |= {lineax.symmetric_tag} if A.isa(cola.annotations.SelfAdjoint) else set()
        tags |= {lineax.positive_semidefinite_tag} if A.isa(cola.PSD) else set()
    # A pytree whose leaves are the factors, so that lineax can differentiate with respect to them.
    product = jax.tree_util.Partial(_product, A)
    return lineax.FunctionLinearOperator(product, jax.ShapeDtypeStruct((A.shape[1],), A.dtype), frozenset(tags))


def _product(A: LinearOperator, x: Any) -> Any:
    return A @ x
