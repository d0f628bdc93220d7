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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.extend import core

from structlin.execution.jax_cpu import as_chains, macs_of
from structlin_nn._flops import FLOPS, fft_flops, qr_flops, svd_flops
from structlin_nn._text import occurrences

__all__ = ["JaxCount", "UnknownPrimitiveError", "count"]

PRODUCT, NO_PRODUCT, UNKNOWN, COMPOSITE = "product", "no product", "unknown", "composite"


class UnknownPrimitiveError(ValueError):
    """Error of a strict count for a primitive of unknown cost."""


class Work(NamedTuple):
    """MACs of an equation of a jaxpr, and its FLOPs other than products."""

    macs: int = 0
    other_flops: int = 0


# Primitives that only name, share or rearrange memory.
_FREE_TEXT = """
    bcoo_transpose bitcast_convert_type box_get box_set broadcast_in_dim broadcast_to concatenate copy copy_p
    dynamic_slice dynamic_update_slice expand_dims iota layout_constraint name optimization_barrier pad pvary reshape
    reshard rev sharding_constraint slice split squeeze stack stop_gradient tile transpose unstack
"""
FREE = frozenset(_FREE_TEXT.split())

# Elementwise primitives, reductions, sorting, random numbers, communication between devices, and copies; conversions of
# sparse arrays, of references, and of arrays over several processes.
_NAMED_TEXT = """
    abs accum_grad_in_ref acos acosh add add_any addupdate after_all all_gather all_gather_done all_gather_invariant
    all_gather_reduced all_gather_reduced_start all_gather_start all_to_all all_to_all_done all_to_all_start and
    approx_top_k argmax argmin asin asinh atan atan2 atanh axis_index bessel_i0e bessel_i1e cbrt ceil clamp clz complex
    conj convert_element_type cos cosh create_linear create_token cumlogsumexp cummax cummin cumprod cumsum dce_sink
    debug_callback debug_print device_put digamma dim_as_value dimension_size div empty empty2 empty_ref eq eq_to erf
    erf_inv erfc exp exp2 expm1 floor free_ref freeze from_edtype gather ge get gt igamma igamma_grad_a igammac imag
    inspect_sharding integer_pow iota_2x32_shape is_finite le le_to lgamma log log1p log_extend log_read logistic lt
    lt_to lu_pivots_to_permutation max min mul mulhi ne neg new_box new_log new_ref nextafter not or pbroadcast
    pbroadcast_done pbroadcast_start philox2x32 philox4x32 pin platform_index pmax pmin polygamma population_count pow
    ppermute ppermute_done ppermute_start precv preduced psend psum psum_done psum_invariant psum_invariant_start
    psum_start ragged_all_to_all random_bits random_clone random_fold_in random_gamma random_seed random_split
    random_unwrap random_wrap real reduce reduce_and reduce_max reduce_min reduce_or reduce_precision reduce_prod
    reduce_scatter reduce_scatter_done reduce_scatter_start reduce_sum reduce_window reduce_window_max
    reduce_window_min reduce_window_sum reduce_xor reduced_vary_cast_p regularized_incomplete_beta rem
    rng_bit_generator rng_uniform round rsqrt scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub
    select_and_gather_add select_and_scatter select_and_scatter_add select_n shape_assertion shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sort sqrt square sub swap tan tanh threefry2x32
    threefry4x32 tie to_edtype top_k unpin unreachable unreduced_psum unreduced_psum_start unreduced_reduce_scatter
    unreduced_reduce_scatter_start vary_unreduced_cast_p xor zeta

    bcoo_extract bcoo_fromdense bcoo_sort_indices bcoo_sum_duplicates bcoo_todense bcsr_extract bcsr_fromdense
    bcsr_todense check coo_fromdense coo_todense csr_fromdense csr_todense get_variable
    global_array_to_host_local_array host_local_array_to_global_array new_variable set_variable todense
    with_memory_space_constraint
"""
_NAMED = frozenset(_NAMED_TEXT.split())

# Primitives with inner jaxprs, which are counted.
_COMPOSITE_TEXT = """
    call call_hi_primitive checkpoint closed_call composite cond core_call core_map cudnn_fusion custom_jvp_call
    custom_jvp_call_jaxpr custom_linear_solve custom_partitioning custom_vjp_call custom_vjp_call_jaxpr
    custom_vmap_call eval_jaxpr jit linear_call pjit remat remat2 remat_opt run_state scan shard_map stage while
"""
_COMPOSITE = frozenset(_COMPOSITE_TEXT.split())

_FORMULAS: dict[str, Callable[[Any], Work]] = {}
_REGISTERED_FREE: set[str] = set()


def register_primitive(name: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Return a decorator that registers a function which counts the work of a primitive.

    The function takes the equation of the jaxpr (``invars``, ``outvars``, ``params``). It returns MACs, or a pair of
    MACs and other FLOPs.

    Examples
    --------
    >>> @register_primitive("structlin_example")
    ... def _(equation):
    ...     return math.prod(equation.outvars[0].aval.shape)
    >>> classify("structlin_example"), classify("dot_general"), classify("tanh"), classify("ffi_call")
    ('product', 'product', 'no product', 'unknown')
    """

    def add(formula: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def work(equation: Any) -> Work:
            found = formula(equation)
            return Work(*found) if isinstance(found, tuple) else Work(int(found))

        _FORMULAS[name] = work
        _REGISTERED_FREE.discard(name)
        return formula

    return add


def register_no_product(name: str) -> None:
    """Register a primitive that computes no products."""
    _FORMULAS.pop(name, None)
    _REGISTERED_FREE.add(name)


def classify(name: str) -> str:
    """Return the class of a primitive: ``product``, ``no product``, ``unknown``, or ``composite``."""
    if name in _FORMULAS:
        return PRODUCT
    if name in _REGISTERED_FREE or name in FREE | _NAMED:
        return NO_PRODUCT
    return COMPOSITE if name in _COMPOSITE else UNKNOWN


# -- formulas: functions of the shapes of operands and results, and of the parameters -------------------------------

Shapes = list[tuple[int, ...]]
Parameters = Mapping[str, Any]
prod = math.prod


def _register(table: Mapping[str, Callable[[Shapes, Shapes, Parameters], Any]]) -> None:
    def work(formula: Callable[[Shapes, Shapes, Parameters], Any], equation: Any) -> Any:
        return formula(*_shapes(equation), equation.params)

    for names, formula in table.items():
        for name in names.split():
            register_primitive(name)(partial(work, formula))


def _shapes(equation: Any) -> tuple[Shapes, Shapes]:
    """Return the shapes of operands and results."""
    sides = (equation.invars, equation.outvars)
    inputs, outputs = ([tuple(getattr(x.aval, "shape", ())) for x in side] for side in sides)
    return inputs, outputs


def _contraction(inputs: Shapes, outputs: Shapes, p: Parameters) -> int:
    """Count one product along the contracted axes for each element of the result."""
    (contracted, _), _ = p["dimension_numbers"]
    return prod(outputs[0]) * prod(inputs[0][axis] for axis in contracted)


def _ragged(inputs: Shapes, outputs: Shapes, p: Parameters) -> int:
    """Count a grouped product, with groups of rows, of the contracted axis or of the batch."""
    numbers = p["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    left, _, sizes = inputs
    macs = prod(outputs[0]) * prod(left[axis] for axis in contracted)
    inner = not numbers.rhs_group_dimensions and set(numbers.lhs_ragged_dimensions) <= set(contracted)
    return macs // sizes[-1] if inner and sizes[-1] else macs


def _convolution(inputs: Shapes, outputs: Shapes, p: Parameters) -> int:
    """Count a convolution: each output element multiplies one kernel over the channels of its group, with zeros."""
    layout = p["dimension_numbers"].rhs_spec  # (features out, features in, spatial...)
    return prod(outputs[0]) * prod(inputs[1][axis] for axis in layout[1:])


def _scores(inputs: Shapes, p: Parameters) -> int:
    """Count one product of the size of the scores, for queries and keys (batch, tokens, heads, size)."""
    q, k = inputs[:2]
    return prod(q) * k[2 if p.get("layout", 0) else 1]


def _sparse(inputs: Shapes, outputs: Shapes, p: Parameters) -> int:
    """Count a sparse product: each stored number, padding included, multiplies the free axes of the other operand."""
    (_, contracted), (_, batched) = p["dimension_numbers"]
    return prod(inputs[0]) * prod(n for axis, n in enumerate(inputs[-1]) if axis not in {*contracted, *batched})


def _fft(inputs: Shapes, outputs: Shapes, p: Parameters) -> Work:
    """Count an FFT; a real FFT (RFFT, IRFFT) costs half as much as a complex one."""
    kind, n = p["fft_type"].name, prod(p["fft_lengths"])
    signal = outputs[0] if kind == "IRFFT" else inputs[0]
    return Work(0, prod(signal) // n * fft_flops(n, "RFFT" in kind) if n else 0)


def _lapack(flops: Callable[[int, int, Parameters, Shapes], Fraction | int], of: int = 0) -> Callable[..., int]:
    """Count the FLOPs of one m x n matrix, the operand ``of``, by its sizes, parameters and the shapes of operands."""

    def formula(inputs: Shapes, outputs: Shapes, p: Parameters) -> int:
        *batch, m, n = inputs[of]
        return round(prod(batch) * flops(m, n, p, inputs) / 2)

    return formula


def _eigen(m: int, n: int, p: Parameters, x: Shapes) -> Fraction | int:
    vectors = p.get("compute_left_eigenvectors", True) or p.get("compute_right_eigenvectors", True)
    return FLOPS["eig" if vectors else "eigvals"](n)


def _reflections(m: int, n: int, p: Parameters, x: Shapes) -> Fraction | int:
    length, columns = (m, n) if p.get("left", True) else (n, m)
    return FLOPS["householder_apply"](length, columns, x[1][-1])


_register({
    "dot_general scaled_dot bcoo_dot_general_sampled": _contraction,
    "ragged_dot_general": _ragged,
    "conv_general_dilated": _convolution,
    "scaled_matmul scaled_matmul_wrapper": lambda x, y, p: prod(y[0]) * x[0][-1],
    """
    dot_product_attention_fwd dot_product_attention_fwd_wrapper
    dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
    """: lambda x, y, p: 2 * _scores(x, p),
    # The backward pass computes the scores again, and the gradients of values, weights, queries and keys.
    """
    dot_product_attention_bwd dot_product_attention_bwd_wrapper
    dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper
    """: lambda x, y, p: 5 * _scores(x, p),
    "bcoo_dot_general bcsr_dot_general": _sparse,
    "coo_matvec csr_matvec coo_spmv csr_spmv": lambda x, y, p: prod(x[0]),
    "coo_matmat csr_matmat coo_spmm csr_spmm": lambda x, y, p: prod(x[0]) * y[0][-1],
    "cholesky": _lapack(lambda m, n, p, x: FLOPS["cholesky"](n)),
    "cholesky_update": _lapack(lambda m, n, p, x: FLOPS["cholesky_update"](n)),
    "lu": _lapack(lambda m, n, p, x: FLOPS["lu"](m, n)),
    "qr": _lapack(lambda m, n, p, x: qr_flops(m, n, m if p.get("full_matrices") else min(m, n))),
    "geqrf geqp3": _lapack(lambda m, n, p, x: FLOPS["qr"](m, n)),
    "householder_product": _lapack(lambda m, n, p, x: FLOPS["householder_product"](m, n, x[1][-1])),
    "ormqr": _lapack(_reflections, of=2),
    "eigh": _lapack(lambda m, n, p, x: FLOPS["eigh"](n)),
    "eig": _lapack(_eigen),
    "schur": _lapack(lambda m, n, p, x: FLOPS["eig" if p.get("compute_schur_vectors", True) else "eigvals"](n)),
    "svd": _lapack(lambda m, n, p, x: svd_flops(m, n, p.get("compute_uv", True), p.get("full_matrices", False))),
    "hessenberg": _lapack(lambda m, n, p, x: FLOPS["hessenberg"](n)),
    "tridiagonal": _lapack(lambda m, n, p, x: FLOPS["tridiagonal"](n)),
    "triangular_solve": _lapack(
        lambda m, n, p, x: FLOPS["triangular_solve"](n, x[1][-1 if p["left_side"] else -2])
    ),
    "symmetric_product": _lapack(lambda m, n, p, x: 2 * m * m * n),
    # Elimination and substitution along three diagonals: 3 MACs and one division for each element.
    "tridiagonal_solve": lambda x, y, p: 4 * prod(y[0]),
    "fft": _fft,
})  # fmt: skip
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
        missing = occurrences(self.unknown_ops)
        note = f"  without UNKNOWN primitives: {missing}" if missing else ""
        totals = [("parameters", self.params, ""), ("forward MACs", self.macs, note)]
        totals += [(f"  {name}", macs, "") for name, macs in self.products.items()]
        totals += [] if self.training_macs is None else [("training MACs", self.training_macs, note)]
        totals += [("other FLOPs, forward", self.other_flops, "")] if self.other_flops else []
        lines = [f"UNKNOWN primitives: {missing}"] if missing else []
        lines += [f"{label:<24}{number:>20,}{more}" for label, number, more in totals]
        if self.unbounded:
            lines.append(f"MACs of one round of each while loop, not counted: {', '.join(map(str, self.unbounded))}")
        return "\n".join([*lines, f"not counted (no products): {occurrences(self.uncounted_ops) or 'none'}"])


def _walk(jaxpr: Any) -> JaxCount:
    """Count a jaxpr, with those inside of its equations."""
    total = JaxCount(Counter(), uncounted_ops=Counter(), unknown_ops=Counter())
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if (formula := _FORMULAS.get(name)) is not None:
            work = formula(equation)
            total.products[name] += work.macs
            total.other_flops += work.other_flops
        elif name == "scan":
            _add(total, _walk(parameters["jaxpr"]), parameters["length"])
        elif name == "while":
            inside = [_walk(parameters[key]) for key in ("body_jaxpr", "cond_jaxpr")]
            if any(one.products or one.unbounded for one in inside):
                total.unbounded += (sum(one.macs for one in inside), *inside[0].unbounded, *inside[1].unbounded)
            total.uncounted_ops[name] += 1
        elif name == "cond":
            # Only one branch runs; the one with the most MACs is counted.
            _add(total, max(map(_walk, parameters["branches"]), key=lambda one: one.macs))
        elif name == "custom_linear_solve":
            _add(total, _walk(parameters["jaxprs"].solve))  # the others are its derivatives and checks
        elif inner := list(_inner(parameters)):
            # Of custom derivatives the function alone.
            for one in inner[:1] if "custom_jvp" in name or "custom_vjp" in name else inner:
                _add(total, _walk(one))
        elif classify(name) == UNKNOWN:
            total.unknown_ops[name] += 1
        elif name not in FREE:
            total.uncounted_ops[name] += 1
    return total


def _add(total: JaxCount, more: JaxCount, times: int = 1) -> None:
    for name in ("products", "uncounted_ops", "unknown_ops"):
        own = getattr(total, name)
        for key, number in getattr(more, name).items():
            own[key] += times * number
    total.other_flops += times * more.other_flops
    total.unbounded += more.unbounded


def _inner(parameters: dict[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        items = value if isinstance(value, tuple | list) else (value,)
        yield from (item for item in items if isinstance(item, core.ClosedJaxpr | core.Jaxpr))


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
        params = sum(prod(leaf.shape) for leaf in jax.tree.leaves(state))

        def call(state: Any, rest: Any, *inputs: Any, **keywords: Any) -> Any:
            return nnx.merge(graph, state, rest)(*inputs, **keywords)

        arguments = (state, rest, *inputs)
    else:
        kinds = [[jax.numpy.result_type(leaf) for leaf in jax.tree.leaves(x)] for x in inputs]
        wanted = tuple(n for n, own in enumerate(kinds) if all(jax.numpy.issubdtype(k, jax.numpy.inexact) for k in own))

    def loss(*arguments: Any, **keywords: Any) -> Any:
        return sum(leaf.sum() for leaf in jax.tree.leaves(call(*arguments, **keywords)))

    with as_chains():
        counted = _walk(jax.make_jaxpr(call)(*arguments, **keywords).jaxpr)
        if training:
            both = _walk(jax.make_jaxpr(jax.value_and_grad(loss, argnums=wanted))(*arguments, **keywords).jaxpr)
            counted.training_macs, counted.training_other_flops = both.macs, both.other_flops
            counted.unknown_ops = {**both.unknown_ops, **counted.unknown_ops}
    counted.params = params
    counted.products = {name: macs for name, macs in counted.products.items() if macs or name != "fft"}
    counted.uncounted_ops = dict(sorted(counted.uncounted_ops.items()))
    counted.unknown_ops = dict(counted.unknown_ops)
    if strict and counted.unknown_ops:
        raise UnknownPrimitiveError(
            f"the cost of these primitives is unknown: {occurrences(counted.unknown_ops)}; register them with "
            "register_primitive or register_no_product"
        )
    return counted
