"""A chain as an operation of jax, and its derivatives: the compiled passes, which XLA calls (:mod:`.compiled.xla`).

The operation is for a single CPU device; :mod:`.jax_ways` chooses it. The chain and its gradients have the rules of
jax's operations: differentiation of any order in both modes, vmap, transposition. Single products of the portable plan
run on other devices, on several devices, for rules that need them, and if compilation is not available.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from structlin._arrays import ops
from structlin.execution._kept import kept
from structlin.execution.choice import policy_text, using
from structlin.execution.compiled._target import CompileError, warn_once
from structlin.execution.compiled.xla import INSTEAD, XLAChain
from structlin.execution.products import products

if TYPE_CHECKING:
    from structlin.structure import Structure

__all__ = ["alone", "as_chains", "chain", "chain_of", "failing", "macs_of", "single"]

Array = Any
_FAILING = ContextVar("_FAILING", default=False)


def chain(structure: Structure, factors: Sequence[Array], x: Array, bias: Array | None, rows: bool) -> Array:
    """Return the compiled passes: (tokens, d_in) -> (tokens, d_out) plus ``bias``, or columns."""
    operands = (x, *factors) if bias is None else (x, *factors, bias)
    return _chain.bind(*operands, structure=structure, rows=rows, bias=bias is not None, kept=0)[0]


def single(structure: Structure, factors: Sequence[Array], x: Array, bias: Array | None, rows: bool) -> Array:
    """Return the single products of the portable plan: (tokens, d_in) -> (tokens, d_out) plus ``bias``, or columns."""
    y = products(structure, factors, x, ops("jax"), rows)
    return y if bias is None else y + bias


def macs_of(equation: Any) -> int | None:
    """Return the multiply-accumulates of an equation of a jaxpr; None if it is not an operation of this module."""
    name, parameters = equation.primitive.name, equation.params
    if name not in (_chain.name, _tangent.name, _gradients.name):
        return None
    structure, needs = parameters["structure"], parameters.get("needs", ())
    at = sum(needs) if name == _tangent.name else 0
    tokens = equation.invars[at].aval.shape[0 if parameters["rows"] else 1]
    if name == _chain.name:
        return structure.macs * tokens
    total, passed = 0, needs[0]
    for factor, need in zip(structure.factors, needs[1:-1], strict=True):
        total += factor.numel * factor.carried * (passed + need)
        passed = passed or need
    return total * tokens


@contextmanager
def as_chains() -> Iterator[None]:
    """Trace chains instead of their dense matrices, unless the policy names the way ``dense``."""
    with using(f"{policy_text()},-dense"):
        yield


@contextmanager
def failing() -> Iterator[None]:
    """Raise CompileError in lowering if a pass cannot be compiled, instead of using single products."""
    token = _FAILING.set(True)
    try:
        yield
    finally:
        _FAILING.reset(token)


def alone(operands: Sequence[Array], rows: bool) -> bool:
    """Whether x, the factors and a bias have one dtype and, as far as known in a trace, a single CPU device."""
    x = operands[0]
    tokens = x.shape[0 if rows else 1]
    if not isinstance(tokens, int) or tokens == 0 or jax.default_backend() != "cpu":
        return False
    if not jax.sharding.get_abstract_mesh().empty or any(not jax.typeof(t).sharding.mesh.empty for t in operands):
        return False
    return all(t.dtype == x.dtype for t in operands)


def chain_of(structure: Structure, rows: bool) -> XLAChain:
    """Return the passes of a structure, made once for it."""
    parts = structure.steps, structure.sizes, structure.d_in, structure.d_out, rows
    return kept(structure, ("jax_cpu", rows), lambda: XLAChain(*parts))


def _portable(x: Array, *operands: Array, structure: Structure, rows: bool, bias: bool) -> Array:
    factors, added = (operands[:-1], operands[-1]) if bias else (operands, None)
    return single(structure, factors, x, added, rows)


def _plain(structure: Structure, rows: bool) -> Callable[..., Array]:
    return lambda x, *factors: products(structure, factors, x, ops("jax"), rows)


def _portable_tangent(*operands: Array, structure: Structure, rows: bool, needs: tuple[bool, ...]) -> Array:
    """Return the sum of the tangents by x, factors and bias that ``needs`` selects; the primals follow them."""
    tangents, primals, places = _split(operands, structure, needs)
    given = dict(zip(places, tangents, strict=True))
    found = given.pop(len(primals), None)
    if given:
        through = _of_some(_plain(structure, rows), primals, list(given))
        _, tangent = jax.jvp(through, [primals[k] for k in given], list(given.values()))
        found = tangent if found is None else tangent + found
    return jnp.broadcast_to(found, _shape(structure, primals[0], rows))


def _portable_gradients(
    gy: Array, *operands: Array, structure: Structure, rows: bool, needs: tuple[bool, ...]
) -> tuple[Array, ...]:
    _, primals, places = _split(operands, structure, ())
    places = [k for k in range(len(primals)) if needs[k]]
    found: tuple[Array, ...] = ()
    if places:
        through = _of_some(_plain(structure, rows), primals, places)
        found = jax.vjp(through, *(primals[k] for k in places))[1](gy)
    return (*found, gy.sum(0)) if needs[-1] else found


def _split(
    operands: Sequence[Array], structure: Structure, needs: Sequence[bool]
) -> tuple[Sequence[Array], Sequence[Array], list[int]]:
    """Return the tangents, x with the factors, and which have tangents; stored activations are excluded."""
    count = sum(needs)
    return (
        operands[:count],
        operands[count : count + 1 + len(structure.steps)],
        [k for k, need in enumerate(needs) if need],
    )


def _of_some(function: Callable[..., Array], operands: Sequence[Array], places: Sequence[int]) -> Callable[..., Array]:
    """Return a function of the operands at these places, with the others held constant."""

    def changed(*some: Array) -> Array:
        new = dict(zip(places, some, strict=True))
        return function(*(new.get(k, operand) for k, operand in enumerate(operands)))

    return changed


def _shape(structure: Structure, x: Any, rows: bool) -> tuple[int, int]:
    return (x.shape[0], structure.d_out) if rows else (structure.d_out, x.shape[1])


# -- the chain ---------------------------------------------------------------------------------------------------------

_chain = Primitive("structlin_chain")
_chain.multiple_results = True
_tangent = Primitive("structlin_chain_tangent")
_gradients = Primitive("structlin_chain_gradients")
_gradients.multiple_results = True


@lru_cache(maxsize=512)
def _jitted(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(partial(primitive.bind, **dict(params)))


for _primitive in (_chain, _tangent, _gradients):
    _primitive.def_impl(
        lambda *operands, primitive=_primitive, **params: _jitted(primitive, tuple(params.items()))(*operands)
    )


@_chain.def_abstract_eval
def _(x: Any, *operands: Any, structure: Structure, rows: bool, bias: bool, kept: int) -> list[Any]:
    sizes = chain_of(structure, rows).kept_sizes(str(x.dtype), kept)
    return [ShapedArray(shape, x.dtype) for shape in (_shape(structure, x, rows), *((size,) for size in sizes))]


def _chain_portable(
    x: Array, *operands: Array, structure: Structure, rows: bool, bias: bool, kept: int
) -> list[Array]:  # fmt: skip
    y = _portable(x, *operands, structure=structure, rows=rows, bias=bias)
    return [y, *_activations(x, operands, structure, rows, kept)] if kept else [y]


def _activations(x: Array, factors: Sequence[Array], structure: Structure, rows: bool, kept: int) -> Iterator[Array]:
    """Return the activations that a compiled pass stores, in its layout, because a compiled pass may read them."""
    schedule, sizes = chain_of(structure, rows).given(str(x.dtype)).schedule, dict(structure.sizes)
    x = x[:kept] if rows else x[:, :kept].T
    for k, step in enumerate(structure.steps[:-1], 1):
        shape = [sizes[a] for a in step.output]
        part = type(structure)(structure.steps[:k], structure.sizes, structure.d_in, math.prod(shape))
        found = products(part, factors[:k], x, ops("jax")).reshape(kept, *shape)
        found = found.transpose(0, *(1 + step.output.index(a) for a in schedule.states[k])).reshape(kept, -1)
        yield jnp.pad(found, ((0, 0), (0, schedule.rows[k] - found.shape[1]))).reshape(-1)


def _chain_compiled(
    x: Array, *operands: Array, structure: Structure, rows: bool, bias: bool, kept: int
) -> tuple[Array, ...]:  # fmt: skip
    factors, added = (operands[:-1], operands[-1]) if bias else (operands, None)
    return chain_of(structure, rows).forward(x, factors, added, kept)


def _chain_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, structure: Structure, rows: bool, bias: bool, kept: int
) -> tuple[list[Array], list[Any]]:
    x = primals[0]
    needs = tuple(not isinstance(t, ad.Zero) for t in tangents) + (() if bias else (False,))
    keep = kept
    if not kept and any(needs[1:-1]):
        keep = chain_of(structure, rows).keeps(str(x.dtype), x.shape[0 if rows else 1])
    y, *activations = _chain.bind(*primals, structure=structure, rows=rows, bias=bias, kept=keep)
    given = [t for t in tangents if not isinstance(t, ad.Zero)]
    primals = primals[:-1] if bias else primals
    tangent = _tangent.bind(*given, *primals, *activations, structure=structure, rows=rows, needs=needs)
    returned = activations if kept else []
    return [y, *returned], [tangent, *(ad.Zero(jax.typeof(a).to_tangent_aval()) for a in returned)]


def _chain_transpose(
    cotangents: Sequence[Any], *operands: Any, structure: Structure, rows: bool, bias: bool, kept: int
) -> list[Any]:
    """Transpose the product, which is linear in each operand if the others (except the bias) are given."""
    needs = tuple(map(ad.is_undefined_primal, operands)) + (() if bias else (False,))
    if isinstance(cotangents[0], ad.Zero):
        return [ad.Zero(t.aval) if ad.is_undefined_primal(t) else None for t in operands]
    given = [jnp.zeros(t.aval.shape, t.aval.dtype) if ad.is_undefined_primal(t) else t for t in operands]
    given = given[:-1] if bias else given
    found = iter(_gradients.bind(cotangents[0], *given, structure=structure, rows=rows, needs=needs))
    return [next(found) if ad.is_undefined_primal(t) else None for t in operands]


def _chain_batch(
    operands: Sequence[Array], at: Sequence[int | None], *, structure: Structure, rows: bool, bias: bool, kept: int
) -> tuple[list[Array], list[int | None]]:
    """Batches of vectors are additional tokens; if the factors are batched too, the products are batched."""
    chain = 1 + len(structure.steps)
    if not any(dim is not None for dim in at[:chain]):  # of the bias alone
        y, *held = _chain.bind(*operands[:chain], structure=structure, rows=rows, bias=False, kept=kept)
        return [y + jnp.moveaxis(operands[-1], at[-1] or 0, 0)[:, None], *held], [0, *[None] * len(held)]
    # Gradients by x or factors of each batch do without what is kept.
    dtype = operands[0].dtype
    unread = [jnp.zeros(size, dtype) for size in chain_of(structure, rows).kept_sizes(str(dtype), kept)]
    if any(dim is not None for dim in at[1:]):
        single = partial(_portable, structure=structure, rows=rows, bias=bias)
        return [jax.vmap(single, at)(*operands), *unread], [0, *[None] * len(unread)]
    y = _fold(structure, operands[1:chain], operands[0], at[0] or 0, operands[-1] if bias else None, rows)
    return [y, *unread], [0 if rows else 1, *[None] * len(unread)]


def _fold(structure: Structure, factors: Sequence[Array], x: Array, at: int, bias: Array | None, rows: bool) -> Array:
    """Return batches of x as tokens: (batches, tokens, d), or (d, batches, tokens) for columns."""
    x = jnp.moveaxis(x, at, 0 if rows else 1)
    batches, tokens = x.shape[:2] if rows else x.shape[1:]
    shape = (batches * tokens, x.shape[2]) if rows else (x.shape[0], batches * tokens)
    x = x.reshape(shape)
    compiled = alone((x, *factors), rows) and chain_of(structure, rows).ready(str(x.dtype)) is not None
    y = (chain if compiled else single)(structure, factors, x, bias, rows)
    return y.reshape((batches, tokens, -1) if rows else (-1, batches, tokens))


# -- its derivatives ---------------------------------------------------------------------------------------------------
#
# The chain is linear in x and in each factor. So a tangent is a sum of chains, each with one operand replaced by its
# tangent. The same holds for tangents of tangents, and for gradients, which are linear in all other operands.


@_tangent.def_abstract_eval
def _(*operands: Any, structure: Structure, rows: bool, needs: tuple[bool, ...]) -> Any:
    x = operands[sum(needs)]
    return ShapedArray(_shape(structure, x, rows), x.dtype)


def _tangent_compiled(*operands: Array, structure: Structure, rows: bool, needs: tuple[bool, ...]) -> Array:
    tangents, primals, places = _split(operands, structure, needs)
    if not any(needs[:-1]):
        return _portable_tangent(*operands, structure=structure, rows=rows, needs=needs)
    given = dict(zip(places, tangents, strict=True))
    bias, found = given.pop(len(primals), None), None
    for place, tangent in given.items():
        x, *factors = _replaced(primals, place, tangent)
        (part,) = chain_of(structure, rows).forward(x, factors, bias, 0)
        found, bias = part if found is None else found + part, None
    return found


def _tangent_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, structure: Structure, rows: bool, needs: tuple[bool, ...]
) -> tuple[Array, Any]:
    bind = partial(_tangent.bind, structure=structure, rows=rows)
    given, given_primals, places = _split(primals, structure, needs)
    moved, moved_primals, _ = _split(tangents, structure, needs)
    held = primals[len(given) + len(given_primals) :]
    parts = []
    changed = {k: t for k, t in zip(places, moved, strict=True) if not isinstance(t, ad.Zero)}
    if changed:
        asked = tuple(k in changed for k in range(len(needs)))
        parts.append(bind(*changed.values(), *given_primals, *held, needs=asked))
    for place, tangent in zip(places, given, strict=True):
        changed = {k: t for k, t in enumerate(moved_primals) if k != place and not isinstance(t, ad.Zero)}
        if place < len(given_primals) and changed:
            asked = tuple(k in changed for k in range(len(needs)))
            parts.append(bind(*changed.values(), *_replaced(given_primals, place, tangent), needs=asked))
    y = bind(*primals, needs=needs)
    return y, sum(parts[1:], parts[0]) if parts else ad.Zero(jax.typeof(y).to_tangent_aval())


def _replaced(operands: Sequence[Array], place: int, new: Array) -> list[Array]:
    return [*operands[:place], new, *operands[place + 1 :]]


@_gradients.def_abstract_eval
def _(gy: Any, *operands: Any, structure: Structure, rows: bool, needs: tuple[bool, ...]) -> list[Any]:
    shapes = [t.shape for t in operands[: 1 + len(structure.steps)]] + [(structure.d_out,)]
    return [ShapedArray(shape, gy.dtype) for shape, need in zip(shapes, needs, strict=True) if need]


def _gradients_compiled(
    gy: Array, *operands: Array, structure: Structure, rows: bool, needs: tuple[bool, ...]
) -> tuple[Array, ...]:
    if not any(needs[:-1]):
        return _portable_gradients(gy, *operands, structure=structure, rows=rows, needs=needs)
    last = 1 + len(structure.steps)
    x, *factors = operands[:last]
    *found, end = chain_of(structure, rows).backward(gy, x, factors, needs, operands[last:])
    return (*found, end.astype(gy.dtype))


def _tangent_transpose(
    gy: Any, *operands: Any, structure: Structure, rows: bool, needs: tuple[bool, ...]
) -> list[Any]:  # fmt: skip
    count, places = sum(needs), [k for k, need in enumerate(needs) if need]
    linear, others = operands[:count], operands[count:]
    assert not any(map(ad.is_undefined_primal, others))
    asked = {k for k, t in zip(places, linear, strict=True) if ad.is_undefined_primal(t)}
    if isinstance(gy, ad.Zero):
        return [ad.Zero(t.aval) if ad.is_undefined_primal(t) else None for t in operands]
    wanted = tuple(k in asked for k in range(len(needs)))
    found = iter(_gradients.bind(gy, *others, structure=structure, rows=rows, needs=wanted))
    return [next(found) if k in asked else None for k in places] + [None] * len(others)


def _gradients_jvp(
    primals: Sequence[Array], tangents: Sequence[Any], *, structure: Structure, rows: bool, needs: tuple[bool, ...]
) -> tuple[list[Array], list[Any]]:
    bind = partial(_gradients.bind, structure=structure, rows=rows)
    gy, *operands = primals
    last = 1 + len(structure.steps)
    chain, held = operands[:last], operands[last:]
    found = bind(*primals, needs=needs)
    sums: dict[int, Array] = {}
    for place, tangent in enumerate(tangents[: 1 + last], -1):  # of gy, then of x and the factors
        asked = tuple(need and (place < 0 or k not in (place, last)) for k, need in enumerate(needs))
        if isinstance(tangent, ad.Zero) or not any(asked):
            continue
        if place < 0:
            parts = bind(tangent, *operands, needs=asked)
        else:  # the activations before the last step do not depend on the last factor
            parts = bind(gy, *_replaced(chain, place, tangent), *(held if place + 1 == last else []), needs=asked)
        for k, part in zip((k for k, need in enumerate(asked) if need), parts, strict=True):
            sums[k] = sums[k] + part if k in sums else part
    places = [k for k, need in enumerate(needs) if need]
    zeros = [ad.Zero(jax.typeof(g).to_tangent_aval()) for g in found]
    return found, [sums.get(k, zero) for k, zero in zip(places, zeros, strict=True)]


def _gradients_transpose(
    cotangents: Sequence[Any], gy: Any, *operands: Any, structure: Structure, rows: bool, needs: tuple[bool, ...]
) -> list[Any]:
    """Transpose the gradients by gy, or by x or a factor in which those of all others are linear."""
    places = [k for k, need in enumerate(needs) if need]
    given = {k: t for k, t in zip(places, cotangents, strict=True) if not isinstance(t, ad.Zero)}
    if ad.is_undefined_primal(gy):
        assert not any(map(ad.is_undefined_primal, operands))
        if not given:
            return [ad.Zero(gy.aval)] + [None] * len(operands)
        asked = tuple(k in given for k in range(len(needs)))
        found = _tangent.bind(*given.values(), *operands, structure=structure, rows=rows, needs=asked)
        return [found] + [None] * len(operands)
    (place,) = (k for k, t in enumerate(operands) if ad.is_undefined_primal(t))
    aval, chain = operands[place].aval, operands[: 1 + len(structure.steps)]
    total = None
    for k, cotangent in given.items():
        if k != place and k < len(chain):
            here = _replaced(_replaced(chain, place, jnp.zeros(aval.shape, aval.dtype)), k, cotangent)
            asked = tuple(place == n for n in range(len(needs)))
            (part,) = _gradients.bind(gy, *here, structure=structure, rows=rows, needs=asked)
            total = part if total is None else total + part
    return [None, *_replaced([None] * len(operands), place, ad.Zero(aval) if total is None else total)]


def _gradients_batch(
    operands: Sequence[Array], at: Sequence[int | None], *, structure: Structure, rows: bool, needs: tuple[bool, ...]
) -> tuple[list[Array], list[int | None]]:
    last = 2 + len(structure.steps)
    if not any(needs[1:]) and not any(dim is not None for dim in at[2:last]):
        factors = structure.transpose_factors(operands[2:last])
        if at[0] is not None:
            return [_fold(structure.transpose(), factors, operands[0], at[0], None, rows)], [0 if rows else 1]
    single = partial(_portable_gradients, structure=structure, rows=rows, needs=needs)
    found = jax.vmap(single, at[:last])(*operands[:last])
    return list(found), [0] * len(found)


def _tangent_batch(
    operands: Sequence[Array], at: Sequence[int | None], *, structure: Structure, rows: bool, needs: tuple[bool, ...]
) -> tuple[Array, int]:
    last = sum(needs) + 1 + len(structure.steps)
    if needs[0] and not any(needs[1:]) and not any(dim is not None for dim in at[1:last]):
        return _fold(structure, operands[2:last], operands[0], at[0] or 0, None, rows), 0 if rows else 1
    single = partial(_portable_tangent, structure=structure, rows=rows, needs=needs)
    return jax.vmap(single, at[:last])(*operands[:last]), 0


def _lowering(compiled: Callable[..., Any], portable: Callable[..., Any], several: bool) -> Callable[..., Any]:
    """Lower to the compiled passes on a CPU, in a program for one device of this process."""

    def lower(context: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
        module = context.module_context
        alone = getattr(module.axis_context, "num_devices", None) == 1
        exported = module.lowering_parameters.for_export
        if alone and not exported:
            try:
                return mlir.lower_fun(compiled, multiple_results=several)(context, *operands, **params)
            except CompileError as error:
                if _FAILING.get():
                    raise
                warn_once(error, INSTEAD)
        return mlir.lower_fun(portable, multiple_results=several)(context, *operands, **params)

    return lower


for _primitive, _jvp, _transpose, _batch, _compiled, _single in (
    (_chain, _chain_jvp, _chain_transpose, _chain_batch, _chain_compiled, _chain_portable),
    (_tangent, _tangent_jvp, _tangent_transpose, _tangent_batch, _tangent_compiled, _portable_tangent),
    (_gradients, _gradients_jvp, _gradients_transpose, _gradients_batch, _gradients_compiled, _portable_gradients),
):
    ad.primitive_jvps[_primitive], ad.primitive_transposes[_primitive] = _jvp, _transpose
    batching.primitive_batchers[_primitive] = _batch
    _several = _primitive.multiple_results
    mlir.register_lowering(_primitive, mlir.lower_fun(_single, multiple_results=_several))
    mlir.register_lowering(_primitive, _lowering(_compiled, _single, _several), platform="cpu")
