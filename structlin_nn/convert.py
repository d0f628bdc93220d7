"""Checkpoints from torch to flax and back: the same numbers under torch's names and layouts.

A torch state dictionary is the common form; `safetensors.torch` writes and reads files of it. Which variable of a flax
model belongs to which entry follows from the kinds of its modules:

=================================  =======================================================================
flax.nnx                           torch
=================================  =======================================================================
StructuredLinear                   StructuredLinear: the same names and layouts
Linear ``kernel``                  Linear ``weight``, transposed
Conv ``kernel``                    Conv ``weight``, with the axes (out, in, positions)
Embed ``embedding``                Embedding ``weight``
LayerNorm, RMSNorm, GroupNorm      the same, ``scale`` as ``weight``
variables of other modules         parameters and buffers of the same names, as they are
=================================  =======================================================================

Models whose modules have the same names are therefore converted without changes. Integers are int64 in torch and have
jax's own size in flax. Nothing else is cast, and no entry is left out on either side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from structlin_nn._patterns import listed
from structlin_nn.flax._modules import named_modules, own_variables
from structlin_nn.flax.linear import StructuredLinear

if TYPE_CHECKING:
    import torch

__all__ = ["to_flax", "to_torch"]

_RENAMED = (nnx.Embed, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm)
_WITHOUT = (nnx.LinearGeneral, nnx.Einsum, nnx.ConvTranspose, nnx.BatchNorm, nnx.InstanceNorm)
_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def to_torch(model: nnx.Module) -> dict[str, torch.Tensor]:
    """Return the state dictionary of the torch model with the parameters of a flax model of the modules listed above.

    The tensors are new. Shared parameters appear under each of their names, for ``load_state_dict``. ValueError for a
    module that has another layout in torch, or for stacked layers (``nnx.vmap``).

    Examples
    --------
    >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> {name: tuple(tensor.shape) for name, tensor in to_torch(model).items()}
    {'layers.0.weight': (2, 3), 'layers.0.bias': (2,)}
    """
    import torch

    found = {}
    for entry in _entries(model):
        array = np.array(entry.torch(), order="C")
        if array.dtype == jnp.bfloat16:
            found[entry.name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            whole = np.issubdtype(array.dtype, np.integer)
            found[entry.name] = torch.from_numpy(array.astype(np.int64) if whole else array)
    return found


def to_flax(state: Mapping[str, Any], model: nnx.Module) -> None:
    """Fill a flax model with the values of a torch state dictionary (tensors or NumPy arrays), if all of them fit.

    ValueError for missing or additional entries, other shapes or dtypes, different values of a shared parameter, or a
    module that has another layout in torch.

    Examples
    --------
    >>> model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> to_flax({"layers.0.weight": np.ones((2, 3), np.float32), "layers.0.bias": np.zeros(2, np.float32)}, model)
    >>> model(jnp.ones(3)).tolist()
    [3.0, 3.0]
    """
    entries: dict[int, list[_Entry]] = {}
    for entry in _entries(model):
        entries.setdefault(id(entry.variable), []).append(entry)
    names = {entry.name for same in entries.values() for entry in same}
    if surplus := [name for name in state if name not in names]:
        raise ValueError(f"the flax model has no place for {listed(surplus)}")
    if missing := [same[0].name for same in entries.values() if not any(entry.name in state for entry in same)]:
        raise ValueError(f"the state lacks {listed(missing)}")
    filled = []
    for same in entries.values():
        known = [(entry, entry.flax(_array(state[entry.name]))) for entry in same if entry.name in state]
        entry, array = known[0]
        for other, values in known[1:]:
            if not np.array_equal(values, array):
                raise ValueError(f"{entry.name} and {other.name} are one parameter in flax, and differ in the state")
        filled.append((entry.variable, _checked(entry.name, array, entry.variable)))
    for variable, array in filled:
        variable.set_value(jnp.asarray(array))  # an abstract variable cannot be assigned to by index


class _Entry(NamedTuple):
    """A variable under one of its names in torch, and the order of its axes there, if it differs."""

    name: str
    variable: nnx.Variable
    axes: tuple[int, ...] | None = None

    def torch(self) -> np.ndarray:
        if isinstance(self.variable.get_value(), jax.ShapeDtypeStruct):
            raise ValueError(f"{self.name} has no values, because the model is abstract (nnx.eval_shape)")
        array = np.asarray(self.variable[...])
        return array if self.axes is None else array.transpose(self.axes)

    def flax(self, array: np.ndarray) -> np.ndarray:
        moved = self.axes is not None and array.ndim == len(self.axes)
        return array.transpose(np.argsort(self.axes)) if moved else array  # type: ignore[arg-type]


def _entries(model: nnx.Module) -> Iterator[_Entry]:
    for place in named_modules(model):
        module, prefix = place.module, f"{place.name}." if place.name else ""
        for name, variable in own_variables(module).items():
            if isinstance(module, _WITHOUT):
                kind = type(module).__name__
                raise ValueError(f"{prefix}{name} belongs to a {kind}, which has no counterpart in torch")
            if isinstance(module, nnx.Linear | nnx.Conv) and name == "kernel":
                positions = len(module.kernel_size) if isinstance(module, nnx.Conv) else 0
                _check_axes(prefix + name, variable, positions + 2)
                yield _Entry(f"{prefix}weight", variable, (positions + 1, positions, *range(positions)))
            else:
                named = _NAMES.get(name, name) if isinstance(module, _RENAMED) else name
                yield _Entry(prefix + named, variable)
        if isinstance(module, StructuredLinear):
            shapes = (spec.shape for spec in module.structure.factors if spec.trainable)
            for number, (factor, shape) in enumerate(zip(module.factors, shapes, strict=True)):
                _check_axes(f"{prefix}factors.{number}", factor, len(shape))


def _check_axes(name: str, variable: nnx.Variable, axes: int) -> None:
    if variable.ndim != axes:
        raise ValueError(
            f"{name} has shape {tuple(variable.shape)}, and {axes} axes in torch: it was stacked by nnx.vmap; build a "
            "module for each layer instead"
        )


def _array(given: Any) -> np.ndarray:
    """Return a tensor or array as a NumPy array of the same dtype."""
    if type(given).__module__.partition(".")[0] != "torch":
        return np.asarray(given)
    import torch

    given = given.detach().cpu()
    if given.dtype == torch.bfloat16:
        return given.view(torch.int16).numpy().view(jnp.bfloat16)
    return given.numpy()


def _checked(name: str, array: np.ndarray, variable: nnx.Variable) -> np.ndarray:
    if array.shape != tuple(variable.shape):
        raise ValueError(f"{name} has shape {array.shape} in the layout of flax, the model needs {variable.shape}")
    if np.issubdtype(array.dtype, np.integer) and jnp.issubdtype(variable.dtype, jnp.integer):
        cast = array.astype(variable.dtype)
        if not np.array_equal(cast, array):
            raise ValueError(f"{name} holds integers outside of the range of {variable.dtype}")
        return cast
    if array.dtype != variable.dtype:
        raise ValueError(
            f"{name} is {array.dtype} in the state and {variable.dtype} in the flax model: convert the state, "
            "or build the model with another param_dtype"
        )
    return array
