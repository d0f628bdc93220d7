"""Multiply-accumulates (MACs) of jax functions and flax.nnx models, counted in their jaxpr.

A jaxpr lists every operation with its shapes, so that nothing is run and nothing estimated: matrix products and
convolutions are counted, what is inside jit, scan, checkpoint, custom derivatives and conditionals too, and everything
else is listed by name. 1 MAC = 2 FLOPs.

>>> import jax.numpy as jnp
>>> counted = count(lambda x, w: jnp.tanh(x @ w), jnp.zeros((3, 8)), jnp.zeros((8, 5)))
>>> counted.macs, counted.uncounted_ops
(120, {'tanh': 1})
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from flax import nnx
from jax.extend import core

from structlin.execution.jax_cpu import as_chains, macs_of, single_products

__all__ = ["JaxCount", "count", "xla_flops"]

# Operations that only name, share or rearrange memory.
_FREE = {
    "broadcast_in_dim", "concatenate", "copy", "copy_p", "dynamic_slice", "dynamic_update_slice", "expand_dims", "iota",
    "optimization_barrier", "pad", "reshape", "rev", "sharding_constraint", "slice", "split", "squeeze",
    "stop_gradient", "transpose",
}  # fmt: skip


@dataclass
class JaxCount:
    """What :func:`count` returns.

    Attributes:
        products: MACs by operation: ``dot_general``, ``conv_general_dilated``, and the chains of structured matrices
            (``structlin_chain``, with its derivatives, which do not count what they compute again) where they are
            compiled as a whole.
        params: numbers of a model's parameters (nnx.Param); 0 for a function.
        training_macs: of the function and its gradient; None where that was not asked for.
        uncounted_ops: other operations and how often they run, those that only move data left out.
        unbounded: MACs of one round of each ``while`` loop, which jax does not say how often it runs. They are not
            part of ``macs``.
    """

    products: dict[str, int] = field(default_factory=dict)
    params: int = 0
    training_macs: int | None = None
    uncounted_ops: dict[str, int] = field(default_factory=dict)
    unbounded: tuple[int, ...] = ()

    @property
    def macs(self) -> int:
        """MACs of all products."""
        return sum(self.products.values())


class _Walk:
    def __init__(self) -> None:
        self.products: Counter[str] = Counter()
        self.other: Counter[str] = Counter()
        self.unbounded: list[int] = []

    def jaxpr(self, jaxpr: Any, times: int = 1) -> None:
        for equation in jaxpr.eqns:
            self.equation(equation, times)

    def equation(self, equation: Any, times: int) -> None:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            self.products[name] += times * _product(equation)
        elif name == "conv_general_dilated":
            self.products[name] += times * _convolution(equation)
        elif (macs := macs_of(equation)) is not None:
            self.products[name] += times * macs
        elif name == "scan":
            self.jaxpr(parameters["jaxpr"].jaxpr, times * parameters["length"])
        elif name == "while":
            inside = [_walk(parameters[key].jaxpr) for key in ("body_jaxpr", "cond_jaxpr")]
            if any(walk.products or walk.unbounded for walk in inside):
                self.unbounded.append(sum(sum(walk.products.values()) for walk in inside))
                for walk in inside:
                    self.unbounded += walk.unbounded
            self.other[name] += times
        elif name == "cond":
            # One branch runs: the dearest is counted.
            walks = [_walk(branch.jaxpr) for branch in parameters["branches"]]
            self.add(max(walks, key=lambda walk: sum(walk.products.values())), times)
        elif inner := list(_inner(parameters)):
            if "custom_jvp" in name or "custom_vjp" in name:
                inner = inner[:1]  # the function; the others are its derivatives
            for jaxpr in inner:
                self.jaxpr(jaxpr, times)
        elif name not in _FREE:
            self.other[name] += times

    def add(self, walk: _Walk, times: int) -> None:
        for name, macs in walk.products.items():
            self.products[name] += times * macs
        for name, calls in walk.other.items():
            self.other[name] += times * calls
        self.unbounded += walk.unbounded


def _walk(jaxpr: Any) -> _Walk:
    walk = _Walk()
    walk.jaxpr(jaxpr)
    return walk


def _inner(parameters: dict[str, Any]) -> Any:
    for value in parameters.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _convolution(equation: Any) -> int:
    """Each number of the result meets one kernel over the channels of its group, dilated zeros included."""
    kernel = equation.invars[1].aval.shape
    layout = equation.params["dimension_numbers"].rhs_spec  # (features out, features in, spatial...)
    return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[axis] for axis in layout[1:])


def count(model: Callable[..., Any], *inputs: Any, training: bool = False, **keywords: Any) -> JaxCount:
    """Count the products of ``model(*inputs, **keywords)``.

    Args:
        model: an nnx.Module, or any function of arrays that jax can trace.
        inputs, keywords: arrays, or ``jax.ShapeDtypeStruct`` in their place: nothing is computed.
        training: also count the gradient of the sum of the results, with respect to the parameters of a module, or
            to all floating inputs of a function. Products that a backward pass computes again count again.

    Raises:
        TypeError: ``model`` cannot be called.

    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: nnx.Linear(8, 5, rngs=nnx.Rngs(0)))
    >>> counted = count(model, jax.ShapeDtypeStruct((3, 8), "float32"), training=True)
    >>> counted.params, counted.macs, counted.training_macs
    (45, 120, 240)
    """
    if not callable(model):
        raise TypeError(f"a module or a function is needed, got {model!r}")
    params = 0
    if isinstance(model, nnx.Module):
        graph, state, rest = nnx.split(model, nnx.Param, ...)
        params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))

        def call(state: Any, rest: Any, *inputs: Any, **keywords: Any) -> Any:
            return nnx.merge(graph, state, rest)(*inputs, **keywords)

        with as_chains():
            walk = _walk(jax.make_jaxpr(call)(state, rest, *inputs, **keywords).jaxpr)
        arguments: tuple[Any, ...] = (state, rest, *inputs)
        wanted: tuple[int, ...] = (0,)
    else:
        call = model
        with as_chains():
            walk = _walk(jax.make_jaxpr(model)(*inputs, **keywords).jaxpr)
        arguments = inputs
        wanted = tuple(
            number
            for number, x in enumerate(inputs)
            if all(jax.numpy.issubdtype(leaf.dtype, jax.numpy.inexact) for leaf in jax.tree.leaves(x))
        )
    counted = JaxCount(dict(walk.products), params, None, dict(sorted(walk.other.items())), tuple(walk.unbounded))
    if training:

        def loss(*arguments: Any, **keywords: Any) -> Any:
            return sum(leaf.sum() for leaf in jax.tree.leaves(call(*arguments, **keywords)))

        with as_chains():
            both = jax.make_jaxpr(jax.value_and_grad(loss, argnums=wanted))(*arguments, **keywords)
        counted.training_macs = sum(_walk(both.jaxpr).products.values())
    return counted


def xla_flops(function: Callable[..., Any], *inputs: Any, **keywords: Any) -> float:
    """FLOPs of a jitted function by XLA's own analysis of what it is lowered to, before it is optimised.

    Additions, comparisons and the like count there, transcendental functions do not, and loops count once: an upper
    check of :func:`count`, equal to ``2 * macs`` where there is nothing but products.

    >>> import jax.numpy as jnp
    >>> xla_flops(jnp.matmul, jnp.zeros((3, 8)), jnp.zeros((8, 5)))
    240.0
    """

    def call(*inputs: Any, **keywords: Any) -> Any:  # a function that has not been lowered before
        return function(*inputs, **keywords)

    with single_products():
        return float(jax.jit(call).lower(*inputs, **keywords).cost_analysis()["flops"])
