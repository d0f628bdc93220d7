"""Replacement of the linear layers of an nnx model by structured ones, and conversion to dense layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from structlin.structure import AbstractStructure
from structlin_nn._patterns import Pattern, Patterns, as_patterns, matches
from structlin_nn._replacement import (
    PRESETS,
    Replacement,
    ReplacementReport,
    check_choices,
    matching,
    names_of,
    select,
    untied,
)
from structlin_nn.flax._modules import Place, named_modules, own_variables, variables
from structlin_nn.flax.linear import StructuredLinear

__all__ = ["Replacement", "ReplacementReport", "replace_linear", "to_dense_linear"]

Selection = Patterns | Callable[[str, nnx.Module], bool]
_LIKE_LINEAR = (nnx.LinearGeneral, nnx.Einsum)


def replace_linear(
    model: nnx.Module, structure: str | AbstractStructure | Callable[[str, nnx.Module], AbstractStructure], *,
    layers: Selection = "all_but_last", exclude: Patterns = (), zero_init: Patterns = (), shared_weights: str = "error",
    rms_cap: bool = False, gain: bool | None = None, rule: str = "paper", rngs: nnx.Rngs, **options: Any,
) -> ReplacementReport:  # fmt: skip
    """Replace linear layers of ``model``, in place, by newly initialised :class:`StructuredLinear` layers.

    Linear layers are ``nnx.Linear``. ``nnx.LinearGeneral`` (the projections of ``nnx.MultiHeadAttention``) and
    ``nnx.Einsum`` are not replaced; the report lists those that the selection contains. A new layer has the dtypes of
    the old one, and a bias with the same metadata if the old one has a bias. The metadata of the kernel is dropped,
    because factors have other axes. Factors are drawn with ``rngs``, biases are 0. All checks precede the first
    replacement.

    Parameters
    ----------
    model
        Any nnx module that contains linear layers.
    layers
        As for :func:`structlin_nn.torch.replace_linear`. The first and the last layer are those in the order in which
        attributes were set, which the report shows. ``nnx.merge`` and ``nnx.clone`` sort attributes by name; use
        patterns for such models.
    rngs
        Source of the keys.
    structure, exclude, zero_init, shared_weights, rms_cap, gain, rule, **options
        As for :func:`structlin_nn.torch.replace_linear`.

    Raises
    ------
    TypeError, ValueError
        As for :func:`structlin_nn.torch.replace_linear` with ``impossible="error"``; ValueError also if a layer was
        stacked by ``nnx.vmap``, is an entry of a tuple, or has another ``dot_general`` or ``promote_dtype``.

    Examples
    --------
    >>> rngs = nnx.Rngs(0)
    >>> sizes = [(64, 128), (128, 64), (64, 9)]
    >>> model = nnx.Sequential(*(nnx.Linear(*pair, rngs=rngs) for pair in sizes))
    >>> print(replace_linear(model, "block_tensor_train", rank=2, rngs=rngs))
    layer     shape     params  structured    MACs  structured
    layers.0  128 x 64   8,320       3,200   8,192       3,072
    layers.1  64 x 128   8,256       4,160   8,192       4,096
    total               16,576       7,360  16,384       7,168
    """
    check_choices(shared_weights=(shared_weights, ("error", "skip")))
    places, names = _linear_places(model, nnx.Linear)
    chosen = select(names, layers, as_patterns(exclude), "nnx.Linear")
    zeroed = matching(chosen, as_patterns(zero_init), "zero_init")

    owners: dict[int, list[str]] = {}
    for name, variable in variables(model).items():
        owners.setdefault(id(variable), []).append(name)
    skipped, made = _left_alone(model, layers, as_patterns(exclude)), {}
    for linear, known in chosen.items():
        _check_is_plain(known[0], linear)
        own = [owner for v in own_variables(linear).values() for owner in owners[id(v)]]
        others = [o for o in own if o.rpartition(".")[0] not in known]
        if not others:
            new_structure = structure(known[0], linear) if callable(structure) else structure
            common = {"rms_cap": rms_cap, "gain": gain, "rule": rule, "zero_init": linear in zeroed, **options}
            made[linear] = _structured(known[0], linear, new_structure, rngs, common)
        elif shared_weights == "skip":
            skipped.append((known[0], f"shares {', '.join(others)}"))
        else:
            raise untied(known[0], others)
    if not made:
        raise ValueError(
            f"all selected layers share their weights with other modules; the linear layers are {names_of(names)}"
        )
    return _replaced(places, chosen, made, tuple(skipped))


def to_dense_linear(model: nnx.Module) -> ReplacementReport:
    """Replace structured layers of ``model``, in place, by ``nnx.Linear`` layers with the same matrices and biases.

    The weights include caps and gains; dtypes do not change. Create the optimiser afterwards, because the parameters
    are new. Values "before" in the report are those of the structured layers.

    Examples
    --------
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(StructuredLinear(6, 8, structure="monarch", blocks=2, rngs=rngs))
    >>> x = jnp.ones(6)
    >>> before = model(x)
    >>> print(to_dense_linear(model))
    layer     shape  params  structured  MACs  structured
    layers.0  8 x 6      50          56    42          48
    total                50          56    42          48
    >>> bool(jnp.allclose(model(x), before, atol=1e-6))
    True
    """
    places, names = _linear_places(model, StructuredLinear)
    if not names:
        raise ValueError("the model has no linear layers (StructuredLinear)")
    return _replaced(places, names, {layer: _dense(known[0], layer) for layer, known in names.items()})


def _linear_places(model: nnx.Module, kind: type[Any]) -> tuple[dict[Any, list[Place]], dict[Any, tuple[str, ...]]]:
    """Return the places of the layers of a kind, and their names."""
    if isinstance(model, kind):
        raise ValueError("the model itself is a linear layer and cannot be replaced in place; put it in a container")
    places: dict[Any, list[Place]] = {}
    for place in named_modules(model):
        if isinstance(place.module, kind):
            places.setdefault(place.module, []).append(place)
    return places, {layer: tuple(place.name for place in held) for layer, held in places.items()}


def _left_alone(model: nnx.Module, layers: Selection, exclude: Sequence[Pattern]) -> list[tuple[str, str]]:
    """Return the layers of other linear types that the selection contains."""
    if callable(layers):
        return []
    preset = isinstance(layers, str) and layers in PRESETS
    found: dict[nnx.Module, tuple[str, str]] = {}
    for place in named_modules(model):
        wanted = preset or any(matches(pattern, place.name) for pattern in as_patterns(layers))
        if isinstance(place.module, _LIKE_LINEAR) and wanted and not any(matches(p, place.name) for p in exclude):
            found.setdefault(place.module, (place.name, f"a {type(place.module).__name__}, not an nnx.Linear"))
    return list(found.values())


def _check_is_plain(name: str, linear: nnx.Linear) -> None:
    if type(linear).__call__ is not nnx.Linear.__call__:
        kind = type(linear).__qualname__
        raise ValueError(f"layer {name!r} is a {kind}, whose forward pass differs from that of nnx.Linear; exclude it")
    own = {
        "dot_general": linear.dot_general is not jax.lax.dot_general,
        "promote_dtype": linear.promote_dtype is not promote_dtype,
        "precision": linear.precision is not None,
        "preferred_element_type": linear.preferred_element_type is not None,
    }
    if lost := [attribute for attribute, given in own.items() if given]:
        raise ValueError(f"layer {name!r} has its own {', '.join(lost)}, which would be lost; exclude it")
    if linear.kernel.ndim != 2:
        raise ValueError(
            f"layer {name!r} has a kernel of shape {linear.kernel.shape}, stacked by nnx.vmap; replace the "
            "layers in the function that nnx.vmap maps"
        )


def _structured(
    name: str, linear: nnx.Linear, structure: Any, rngs: nnx.Rngs, options: Mapping[str, Any]
) -> StructuredLinear:
    sizes = linear.in_features, linear.out_features
    try:
        return StructuredLinear(
            *sizes, use_bias=linear.bias is not None, dtype=linear.dtype, param_dtype=linear.kernel.dtype,
            structure=structure, bias_metadata=_kept_metadata(linear.bias), rngs=rngs, **options,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {name!r} ({sizes[0]} -> {sizes[1]}): {error}") from error


def _dense(name: str, layer: StructuredLinear) -> nnx.Linear:
    shapes = [spec.shape for spec in layer.structure.factors if spec.trainable]
    if stacked := [factor.shape for factor, shape in zip(layer.factors, shapes, strict=True) if factor.shape != shape]:
        raise ValueError(f"layer {name!r} has a factor of shape {stacked[0]}, stacked by nnx.vmap; call "
                         "to_dense_linear in the function that nnx.vmap maps")  # fmt: skip
    kind = next((factor.dtype for factor in layer.factors), layer.param_dtype)  # it may have been cast
    made = nnx.Linear(
        layer.in_features, layer.out_features, use_bias=layer.bias is not None, dtype=layer.dtype,
        param_dtype=kind, bias_metadata=_kept_metadata(layer.bias), rngs=nnx.Rngs(0),
        kernel_init=lambda *_: jnp.asarray(layer.operator.to_dense().T, kind),
    )  # fmt: skip
    if layer.bias is not None and made.bias is not None:
        made.bias.set_value(layer.bias[...])
    return made


def _kept_metadata(variable: nnx.Variable | None) -> dict[str, Any]:
    """Return the metadata of a variable, if there is one, for its replacement, without entries on its storage."""
    known = {} if variable is None else variable.get_metadata()
    return {k: v for k, v in known.items() if k not in ("hijax", "ref", "eager_sharding")}


def _replaced(
    places: Mapping[Any, Sequence[Place]], names: Mapping[Any, tuple[str, ...]], made: Mapping[Any, Any],
    skipped: tuple[tuple[str, str], ...] = (),
) -> ReplacementReport:  # fmt: skip
    """Put the new layers in the places of the old ones, and return the report."""
    for old in made:
        for place in places[old]:
            place.put(old)  # raises errors before the first change
    for old, new in made.items():
        for place in places[old]:
            place.put(new)

    def costs(layer: Any) -> tuple[int, int]:
        macs = layer.structure.macs if isinstance(layer, StructuredLinear) else layer.in_features * layer.out_features
        return sum({id(v): v.size for v in variables(layer).values() if isinstance(v, nnx.Param)}.values()), macs

    rows = []
    for old, new in made.items():
        structure = (new if isinstance(new, StructuredLinear) else old).structure
        (params, macs), (params_after, macs_after) = costs(old), costs(new)
        rows.append(Replacement(names[old], structure, params, params_after, macs, macs_after))
    return ReplacementReport(tuple(rows), skipped)
