"""A linear layer of flax.nnx whose weight is a structured matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax import Array
from jax.sharding import PartitionSpec

from structlin._arrays import ops
from structlin.structure import AbstractStructure, Structure
from structlin_nn._layer import PlannedLayer, plan_layer, tuples

__all__ = ["Index", "StructuredLinear"]

_JAX = ops("jax")
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Index(nnx.Variable):
    """Variable for an integer array that is not trained, such as the index of a permutation."""


class StructuredLinear(PlannedLayer, nnx.Module):
    """Linear layer ``y = A x + b`` with a structured matrix A: (..., in_features) -> (..., out_features).

    It replaces ``nnx.Linear``. It is the counterpart of :class:`structlin_nn.torch.StructuredLinear`, with the same
    initialisation and the same parameters in the same layout: ``factors`` (a list of ``nnx.Param``; index arrays are
    :class:`Index` variables ``index0``, ...), ``gains`` and ``bias``. Each factor is drawn with one key of
    ``rngs.params()``.

    Parameters
    ----------
    in_features, out_features, use_bias, dtype, param_dtype, rngs
        As for ``nnx.Linear``.
    structure, rms_cap, gain, rule, zero_init, **options
        As for :class:`structlin_nn.torch.StructuredLinear`.
    partition
        Mesh axis, or logical axis with rules, for axes of the chain, such as ``{"f": "model"}``. It is the
        ``out_sharding`` of every factor with that axis, and of the bias if it is the first axis of the output. The
        letters are those of ``print(structure)``. As for all annotated nnx variables, create the layer under
        ``jax.set_mesh``.
    bias_metadata
        Metadata of the bias, as for ``nnx.Linear``.

    Raises
    ------
    TypeError, ValueError
        As for :class:`structlin_nn.torch.StructuredLinear`; ValueError also if ``partition`` does not match the chain,
        or a dtype is an integer dtype.

    Examples
    --------
    >>> layer = StructuredLinear(768, 1024, structure="block_tensor_train", rank=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((4, 7, 768))).shape, layer.structure.macs
    ((4, 7, 1024), 114688)
    >>> bool(jnp.allclose(layer.operator.to_dense() @ jnp.ones(768), layer(jnp.ones(768)), atol=1e-4))
    True
    """

    def __init__(
        self, in_features: int, out_features: int, *, use_bias: bool = True, dtype: Any = None,
        param_dtype: Any = jnp.float32, structure: str | AbstractStructure = "block_tensor_train",
        rms_cap: bool = False, gain: bool | None = None, rule: str = "paper", zero_init: bool = False,
        partition: Mapping[str, str | None] = _NOTHING,
        bias_metadata: Mapping[str, Any] = _NOTHING, rngs: nnx.Rngs, **options: Any,
    ) -> None:  # fmt: skip
        for name, given in (("dtype", dtype), ("param_dtype", param_dtype)):
            if given is not None and not jnp.issubdtype(given, jnp.inexact):
                raise ValueError(f"{name} must be floating or complex, got {jnp.dtype(given).name}")
        plan = plan_layer(
            in_features, out_features, structure, options, rms_cap=rms_cap, gain=gain, rule=rule, zero_init=zero_init
        )
        self._plan = plan
        self._options = tuple((name, tuples(value)) for name, value in options.items())  # part of the cache key of jit
        self.in_features, self.out_features = plan.structure.d_in, plan.structure.d_out
        self.use_bias, self.dtype, self.param_dtype = use_bias, dtype, param_dtype
        self.rule, self.zero_init, self.rms_cap = rule, zero_init, rms_cap

        shardings, bias_sharding = _shardings(plan.structure, partition)
        factors: list[nnx.Param] = []
        for number, (spec, std) in enumerate(zip(plan.structure.factors, plan.init_std, strict=True)):
            key = rngs.params()
            if not spec.trainable:
                order = jax.random.permutation(key, spec.numel).reshape(spec.shape)
                setattr(self, f"index{number}", Index(order))
                continue
            value = jax.random.normal(key, spec.shape, param_dtype) * jnp.asarray(std, param_dtype)
            factors.append(nnx.Param(value, **shardings[number]))
        self.factors = nnx.List(factors)
        self.gains = nnx.List(nnx.Param(jnp.ones((1,), param_dtype)) for _ in factors) if plan.gains else nnx.data(None)
        self.bias: Any = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(jnp.zeros(self.out_features, param_dtype), **{**bias_sharding, **bias_metadata})

    @property
    def structure(self) -> AbstractStructure:
        """Structure of A."""
        return self._plan.structure

    @property
    def options(self) -> dict[str, Any]:
        """Options of the named structure, as given."""
        return dict(self._options)

    @property
    def init_std(self) -> tuple[float, ...]:
        """Initial deviation of each factor."""
        return self._plan.init_std

    @property
    def cap_sigma(self) -> tuple[float, ...]:
        """Largest RMS of each factor with ``rms_cap``."""
        return self._plan.cap_sigma

    def _values(self, parameters: Any) -> list[Array]:
        return [parameter[...] for parameter in parameters]

    def _index(self, number: int) -> Array:
        return super()._index(number)[...]

    def _dtype_without_factors(self) -> Any:
        return self.param_dtype

    def __call__(self, x: Array) -> Array:
        """Apply the layer: (..., in_features) -> (..., out_features)."""
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(
                f"the last axis of the input must have size in_features = {self.in_features}, "
                f"got shape {tuple(x.shape)}"
            )
        factors = list(self.effective_factors())
        for factor, spec in zip(factors, self.structure.factors, strict=True):
            if factor.shape != spec.shape:
                raise ValueError(
                    f"a factor has shape {tuple(factor.shape)}, expected {spec.shape}: call layers that nnx.vmap "
                    "stacked within nnx.vmap or nnx.scan"
                )
        bias = None if self.bias is None else self.bias[...]
        indices = {number: factors[number] for number in self._plan.index_at}
        weights = [factor for number, factor in enumerate(factors) if number not in indices]
        promoted: Any = promote_dtype((x, bias, *weights), dtype=self.dtype)
        x, bias, *weights = promoted
        for number, index in indices.items():
            weights.insert(number, index)
        product = self._product
        if axes := jax.sharding.get_abstract_mesh().explicit_axes:  # XLA partitions the steps, as under an Auto mesh
            product = jax.sharding.auto_axes(product, axes=axes, out_sharding=_out_sharding(self.structure, x, weights))
        return product(x, bias, weights)

    def _product(self, x: Array, bias: Array | None, weights: list[Array]) -> Array:
        if self._plan.is_dense:
            y = jax.lax.dot_general(x, weights[0], (((x.ndim - 1,), (1,)), ((), ())))
        else:
            rows = x.reshape(-1, self.in_features)
            if isinstance(self.structure, Structure):
                y, bias = self.structure._rows(weights, rows, _JAX, bias), None
            else:
                y = self.structure._rows(weights, rows, _JAX)
            y = y.reshape(*x.shape[:-1], self.out_features)
        return y if bias is None else y + bias

    def __nnx_repr__(self) -> Any:
        yield nnx.reprlib.Object("StructuredLinear")
        yield nnx.reprlib.Attr("layer", self._described())
        for name in ("factors", "gains", "bias"):
            if getattr(self, name) is not None:
                yield nnx.reprlib.Attr(name, getattr(self, name))


def _out_sharding(structure: AbstractStructure, x: Array, weights: list[Array]) -> PartitionSpec:
    """Return the sharding of the product under an Explicit mesh.

    It is that of x, and for the features that of the first axis of the output in the last factor. They are not sharded
    if they do not divide evenly or if x has the same mesh axis.
    """
    lead, last = (*jax.typeof(x).sharding.spec, *(None,) * x.ndim)[: x.ndim - 1], None
    if isinstance(structure, Structure):
        step, sharding = structure.steps[-1], jax.typeof(weights[-1]).sharding
        if step.output[0] in step.factor and not structure.padding[1]:
            last = sharding.spec[step.factor.index(step.output[0])]
    return PartitionSpec(*lead, None if _mesh_axes(lead) & _mesh_axes([last]) else last)


def _mesh_axes(entries: Iterable[Any]) -> set[str]:
    return {name for entry in entries if entry for name in (entry if isinstance(entry, tuple) else (entry,))}


def _shardings(
    structure: AbstractStructure, partition: Mapping[str, str | None]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return metadata with the ``out_sharding`` of each factor and of the bias; empty without a partition."""
    if not partition:
        return [{} for _ in structure.factors], {}
    if not isinstance(structure, Structure):
        raise ValueError(f"partition={dict(partition)} needs the axes of a chain, but {structure!r} is not a chain")
    letters = dict(structure.sizes)
    if unknown := [axis for axis in partition if axis not in letters]:
        chain = "; ".join(map(str, structure.steps))
        raise ValueError(
            f"partition: {chain!r} has no axis {', '.join(map(repr, unknown))}; its axes are {''.join(letters)}"
        )
    made = []
    for step in structure.steps:
        names = tuple(partition.get(axis) for axis in step.factor)
        given = [name for name in names if name is not None]
        if len(given) != len(set(given)):
            raise ValueError(f"partition={dict(partition)} assigns one mesh axis to two axes of factor {step.factor!r}")
        made.append({"out_sharding": names} if given else {})
    first = partition.get(structure.steps[-1].output[0])
    return made, {"out_sharding": (first,)} if first is not None else {}
