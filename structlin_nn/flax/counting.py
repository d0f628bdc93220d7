"""Multiply-accumulates (MACs) of jax functions and flax.nnx models, counted in their jaxpr.

A jaxpr lists every operation with its shapes, so the count is exact and nothing is computed. There are three classes of
primitives. Those that compute products (matrix products, convolutions, factorisations of LAPACK) have a formula; they
are counted inside jit, scan, checkpoint, custom derivatives and conditionals too. Those that compute no products are
listed by name. Those of unknown cost are reported first, because their products are missing. 1 MAC = 2 FLOPs.

>>> import jax.numpy as jnp
>>> counted = count(lambda x, w: jnp.tanh(x @ w), jnp.zeros((3, 8)), jnp.zeros((8, 5)))
>>> counted.macs, counted.uncounted_ops
(120, {'tanh': 1})
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
from flax import nnx
from jax.extend import core

from structlin.execution.jax_cpu import as_chains, macs_of
from structlin_nn.flax._primitives import FREE, UNKNOWN, classify, formula_of, register_primitive

__all__ = ["JaxCount", "UnknownPrimitiveError", "count"]


class UnknownPrimitiveError(ValueError):
    """Error of a strict count for a primitive of unknown cost."""


for _name in ("structlin_chain", "structlin_chain_gradients", "structlin_chain_tangent"):
    register_primitive(_name)(macs_of)


@dataclass
class JaxCount:
    """Result of :func:`count`; attributes of the same names are those of :class:`structlin_nn.torch.ModelCount`.

    Attributes
    ----------
    products
        MACs by operation: ``dot_general``, ``conv_general_dilated``, factorisations, and ``structlin_chain``, a chain
        of a structured matrix that is compiled as a whole. Its derivatives do not count recomputed products.
    params
        Number of elements of the parameters (nnx.Param) of a model; 0 for a function.
    training_macs
        MACs of the function and its gradient; None without ``training``.
    training_other_flops
        FLOPs of FFTs in the function and its gradient.
    unbounded
        MACs of one iteration of each ``while`` loop, whose number of iterations is unknown. ``macs`` does not include
        them.
    """

    products: dict[str, int] = field(default_factory=dict)
    params: int = 0
    training_macs: int | None = None
    uncounted_ops: dict[str, int] = field(default_factory=dict)
    unbounded: tuple[int, ...] = ()
    unknown_ops: dict[str, int] = field(default_factory=dict)
    other_flops: int = 0
    training_other_flops: int | None = None

    @property
    def macs(self) -> int:
        """MACs of all products."""
        return sum(self.products.values())

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes and the total, as values for ``json.dumps``."""
        return asdict(self) | {"macs": self.macs}

    def to_json(self, **options: Any) -> str:
        """Return :meth:`to_dict` as JSON; ``options`` are those of ``json.dumps``."""
        return json.dumps(self.to_dict(), **options)

    def __str__(self) -> str:
        missing = ", ".join(f"{name} x{number}" for name, number in self.unknown_ops.items())
        note = f"  without UNKNOWN primitives: {missing}" if missing else ""
        lines = [f"UNKNOWN primitives: {missing}"] if missing else []
        lines += [f"{'parameters':<24}{self.params:>20,}", f"{'forward MACs':<24}{self.macs:>20,}{note}"]
        lines += [f"{'  ' + name:<24}{macs:>20,}" for name, macs in self.products.items()]
        if self.training_macs is not None:
            lines.append(f"{'training MACs':<24}{self.training_macs:>20,}{note}")
        if self.other_flops:
            lines.append(f"{'other FLOPs, forward':<24}{self.other_flops:>20,}")
        if self.unbounded:
            lines.append(f"MACs of one round of each while loop, not counted: {', '.join(map(str, self.unbounded))}")
        free = ", ".join(f"{name} x{number}" for name, number in self.uncounted_ops.items())
        return "\n".join([*lines, f"not counted (no products): {free or 'none'}"])


class _Walk:
    def __init__(self) -> None:
        self.products: Counter[str] = Counter()
        self.other: Counter[str] = Counter()
        self.unknown: Counter[str] = Counter()
        self.flops = 0
        self.unbounded: list[int] = []

    def jaxpr(self, jaxpr: Any, times: int = 1) -> None:
        for equation in jaxpr.eqns:
            self.equation(equation, times)

    def equation(self, equation: Any, times: int) -> None:
        name, parameters = equation.primitive.name, equation.params
        if (formula := formula_of(name)) is not None:
            work = formula(equation)
            self.products[name] += times * work.macs
            self.flops += times * work.other_flops
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
            # Only one branch runs; the one with the most MACs is counted.
            walks = [_walk(branch.jaxpr) for branch in parameters["branches"]]
            self.add(max(walks, key=lambda walk: sum(walk.products.values())), times)
        elif name == "custom_linear_solve":
            self.jaxpr(parameters["jaxprs"].solve.jaxpr, times)  # the others are its derivatives and checks
        elif inner := list(_inner(parameters)):
            if "custom_jvp" in name or "custom_vjp" in name:
                inner = inner[:1]  # the function; the others are its derivatives
            for jaxpr in inner:
                self.jaxpr(jaxpr, times)
        elif classify(name) == UNKNOWN:
            self.unknown[name] += times
        elif name not in FREE:
            self.other[name] += times

    def add(self, walk: _Walk, times: int) -> None:
        for own, more in ((self.products, walk.products), (self.other, walk.other), (self.unknown, walk.unknown)):
            for name, number in more.items():
                own[name] += times * number
        self.flops += times * walk.flops
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


def count(
    model: Callable[..., Any], *inputs: Any, training: bool = False, strict: bool = False, **keywords: Any
) -> JaxCount:
    """Count the products of ``model(*inputs, **keywords)``.

    Parameters
    ----------
    model
        An nnx.Module, or a function of arrays that jax can trace.
    *inputs, **keywords
        Arrays or ``jax.ShapeDtypeStruct``. Nothing is computed.
    training
        Also count the gradient of the sum of the results with respect to the parameters of a module, or to all floating
        inputs of a function. Products that the backward pass computes again count again.
    strict
        Raise an error for a primitive of unknown cost.

    Examples
    --------
    >>> from flax import nnx
    >>> model = nnx.eval_shape(lambda: nnx.Linear(8, 5, rngs=nnx.Rngs(0)))
    >>> counted = count(model, jax.ShapeDtypeStruct((3, 8), "float32"), training=True)
    >>> counted.params, counted.macs, counted.training_macs
    (45, 120, 240)
    """
    if not callable(model):
        raise TypeError(f"model must be an nnx.Module or a function, got {model!r}")
    params, call, arguments = 0, model, inputs
    wanted: tuple[int, ...] = (0,)
    if isinstance(model, nnx.Module):
        split: Any = nnx.split(model, nnx.Param, ...)
        graph, state, rest = split
        params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))

        def call(state: Any, rest: Any, *inputs: Any, **keywords: Any) -> Any:
            return nnx.merge(graph, state, rest)(*inputs, **keywords)

        arguments = (state, rest, *inputs)
    else:
        kinds = [[jax.numpy.result_type(leaf) for leaf in jax.tree.leaves(x)] for x in inputs]
        wanted = tuple(n for n, own in enumerate(kinds) if all(jax.numpy.issubdtype(k, jax.numpy.inexact) for k in own))
    with as_chains():
        walk = _walk(jax.make_jaxpr(call)(*arguments, **keywords).jaxpr)
    products = {name: macs for name, macs in walk.products.items() if macs or name != "fft"}
    counted = JaxCount(
        products, params, None, dict(sorted(walk.other.items())), tuple(walk.unbounded), dict(walk.unknown), walk.flops
    )
    if training:

        def loss(*arguments: Any, **keywords: Any) -> Any:
            return sum(leaf.sum() for leaf in jax.tree.leaves(call(*arguments, **keywords)))

        with as_chains():
            both = jax.make_jaxpr(jax.value_and_grad(loss, argnums=wanted))(*arguments, **keywords)
        again = _walk(both.jaxpr)
        counted.training_macs, counted.training_other_flops = sum(again.products.values()), again.flops
        counted.unknown_ops = {**again.unknown, **counted.unknown_ops}
    if strict and counted.unknown_ops:
        names = ", ".join(f"{name} x{number}" for name, number in counted.unknown_ops.items())
        raise UnknownPrimitiveError(
            f"the cost of these primitives is unknown: {names}; register them with register_primitive or "
            "register_no_product"
        )
    return counted
