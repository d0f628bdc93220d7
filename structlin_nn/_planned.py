"""The candidates of a plan with their costs, and the search for the widest model or the largest rank in a budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import structlin
from structlin.counting import work_of
from structlin.execution.devices import Device
from structlin.planning import largest_within
from structlin.registry import design
from structlin_nn.counting import ModelCount, count, roofline, training_bytes
from structlin_nn.counting import device as find_device
from structlin_nn.counting._costs import itemsize, states_of
from structlin_nn.counting._named import loss_of
from structlin_nn.models import MODELS, StructureConfig, build_model
from structlin_nn.models.named import own_function, parts_of, set_structure
from structlin_nn.torch import StructuredLinear

RESOURCES = ("forward_macs", "params", "bytes", "training_flops", "step_seconds", "run_seconds")
_FEW_BLOCKS = 4  # from which on a model of so many blocks is costed by those of one and of two


@dataclass(frozen=True)
class Choice:
    """One candidate: the width, the depth (None: the model's own), and the options of the structure."""

    width: int
    depth: int | None = None
    options: tuple[tuple[str, Any], ...] = ()


@dataclass
class Costs:
    """Costs of the choices of one model and structure, each counted once.

    ``name`` is a named model or ``package.module:function``; the function takes a width, and a ``depth`` where that is
    asked for, and returns a model with ``example_input``, or (model, inputs).
    """

    name: str
    structure: str
    options: Mapping[str, Any]
    sizes: Mapping[str, Any]
    layers: str | None = None
    rms_cap: bool = False
    batch_size: int | None = None
    samples: int | None = None
    optimizer: str = "adam"
    dtype: str = "float32"
    activation_dtype: str | None = None
    device: Device | None = None
    full: bool = True  # whether the search needs more than forward MACs and parameters
    _known: dict[tuple[Choice, bool], dict[str, Any]] = field(default_factory=dict, repr=False)
    _layers: dict[Choice, dict[str, tuple[int, int, float]]] = field(default_factory=dict, repr=False)
    _designed: dict[tuple[Any, ...], tuple[int, int] | None] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._function = own_function(self.name) if ":" in self.name else None
        if self._function is not None and self.sizes:
            raise ValueError(f"{next(iter(self.sizes))!r} is a size of named models; {self.name} has its own")
        if self._function is None and self.name not in MODELS:
            raise ValueError(
                f"unknown model {self.name!r}; one of {', '.join(MODELS)}, or package.module:function of your own"
            )

    def depth_of(self, choice: Choice) -> int | None:
        """Return the number of blocks of a named model; None for a model of your own without a choice of depth."""
        if choice.depth is not None or self._function is not None:
            return choice.depth
        return self._size("depth")

    def _size(self, name: str) -> int:
        """Return a size of a named model, 1 if it has no such size."""
        spec = MODELS[self.name]
        return self.sizes.get(name, getattr(spec.config(width=256, **spec.sizes), name, 1))

    def quick(self, choice: Choice) -> dict[str, Any] | None:
        """Return `measured`, for deep named models from those of one and two blocks; None where none can be built."""
        try:
            return self._by_depth(choice, lambda few: self.measured(few, self.full))
        except ValueError:
            return None

    def _by_depth(self, choice: Choice, costs: Callable[[Choice], dict[str, Any] | None]) -> dict[str, Any] | None:
        depth = self.depth_of(choice)
        if self._function is not None or depth is None or depth < _FEW_BLOCKS:
            return costs(choice)
        one, two = (costs(replace(choice, depth=few)) for few in (1, 2))
        if one is None or two is None:
            return None
        # All blocks cost the same; what is chosen in the end is counted in full.
        return {k: v if v is None else v + (depth - 1) * max(two[k] - v, 0) for k, v in one.items()}

    def least(self, choice: Choice) -> dict[str, float] | None:
        """Return lower bounds of all resources by the structured layers; None if one cannot be designed.

        Their sizes are those of a line through the widths that were counted (of a line in heads * (width // heads), for
        what heads split), of those layers whose sizes lie on one; the others count 0. It costs a design for each layer,
        and no model.
        """
        if (found := self._by_depth(choice, self._least_of)) is None:
            return None
        flops, params = found["flops"], found["params"]
        # The backward pass of a named model costs what its forward pass does at least. Weights, gradients and states
        # are held; in a model of your own some may be frozen.
        own = self._function is not None
        held = params * itemsize(self.dtype) * (1 if own else 2 + states_of(self.optimizer))
        flops_trained = flops if own else 2 * flops
        samples = self.samples or 0
        batch = self.batch_size or 1
        peak = self.device.rate(self.activation_dtype or self.dtype) if self.device is not None else math.inf
        return {
            "forward_macs": flops / 2, "params": 0 if own else params, "bytes": held,
            "training_flops": flops_trained * samples, "step_seconds": flops_trained * batch / peak,
            "run_seconds": flops_trained * samples / peak,
        }  # fmt: skip

    def _least_of(self, choice: Choice) -> dict[str, float] | None:
        alike = (choice.depth, choice.options)
        seen = {c.width: layers for c, layers in self._layers.items() if (c.depth, c.options) == alike}
        total = {"flops": 0.0, "params": 0.0}
        if len(seen) < 4:
            return total
        for name, (*_, rows) in next(iter(seen.values())).items():
            if not all(name in layers for layers in seen.values()):
                continue
            shape = [self._on_a_line({w: layers[name][k] for w, layers in seen.items()}, choice.width) for k in (0, 1)]
            if None in shape:
                continue
            if (found := self._layer(choice.options, tuple(shape))) is None:
                return None
            total["flops"] += rows * found[0]
            total["params"] += found[1]
        return total

    def _on_a_line(self, sizes: Mapping[int, float], width: int) -> int | None:
        heads = 1 if self._function is not None else self._size("heads")
        for step in dict.fromkeys((1, heads)):
            points = {step * (w // step): size for w, size in sizes.items()}
            (x0, y0), (x1, y1) = min(points.items()), max(points.items())
            slope = (y1 - y0) / (x1 - x0) if x1 > x0 else 0.0
            if all(abs(y0 + slope * (step * (w // step) - x0) - size) < 1e-6 for w, size in sizes.items()):
                return round(y0 + slope * (step * (width // step) - x0))
        return None

    def _layer(self, options: tuple[tuple[str, Any], ...], shape: tuple[Any, ...]) -> tuple[int, int] | None:
        """Return FLOPs for one vector and parameters of a layer; None where it cannot be designed."""
        key = options, shape
        if key not in self._designed:
            try:
                found = design(self.structure, shape, **{**self.options, **dict(options)})
                self._designed[key] = work_of(found).flops, found.num_params
            except ValueError:
                self._designed[key] = None
        return self._designed[key]

    def measured(self, choice: Choice, full: bool = True) -> dict[str, Any]:
        """Count all resources and ``training_macs``, or unless ``full`` only forward MACs and parameters.

        Raises ValueError where the model cannot be built.
        """
        key = choice, full
        if key not in self._known:
            try:
                self._known[key] = self._measured(choice, full)
            except ValueError as error:
                self._known[key] = {"error": str(error)}
        found = self._known[key]
        if "error" in found:
            raise ValueError(found["error"])
        return found

    def _measured(self, choice: Choice, full: bool) -> dict[str, Any]:
        model, inputs, batch, loss = self._built(choice)
        counted = count(model, *inputs, backward=full)
        rows = {call.name: call.rows / batch for call in counted.calls}
        self._layers[choice] = {
            name: (layer.out_features, layer.in_features, rows[name])
            for name, layer in model.named_modules()
            # Not those that are left dense.
            if isinstance(layer, StructuredLinear)
            and name in rows
            and (work_of(layer.structure).flops, layer.structure.num_params)
            == self._layer(choice.options, (layer.out_features, layer.in_features))
        }
        # Work that is no product counts with half its FLOPs, so that no transform is free.
        found: dict[str, Any] = {
            "forward_macs": _whole(counted.flops / 2 / batch), "params": counted.trainable_params
        }  # fmt: skip
        if not full:
            return found
        step, step_batch = counted, batch
        if self.batch_size is not None and self.batch_size != batch:
            model, inputs, step_batch, loss = self._built(choice, self.batch_size)
            step = count(model, *inputs)
        held = training_bytes(
            step, loss=loss, optimizer=self.optimizer, dtype=self.dtype, activation_dtype=self.activation_dtype
        )
        products = self.activation_dtype or self.dtype
        seconds = None
        if self.device is not None:
            seconds = roofline(step, self.device, products, optimizer=self.optimizer, weight_dtype=self.dtype).step
        return found | {
            "training_macs": _whole(counted.training_macs / batch), "bytes": held["total"],
            "training_flops": _whole(counted.training_flops / batch * self.samples) if self.samples else None,
            "step_seconds": seconds,
            "run_seconds": seconds * self.samples / step_batch if seconds is not None and self.samples else None,
        }  # fmt: skip

    def _built(self, choice: Choice, batch_size: int = 1) -> tuple[nn.Module, Any, int, ModelCount | None]:
        """Return the model and inputs on the meta device, the batch, and what the loss keeps."""
        options = {**self.options, **dict(choice.options)}
        config = StructureConfig(self.structure, options, layers=self.layers, rms_cap=self.rms_cap)
        if self._function is None:
            sizes = dict(self.sizes) if choice.depth is None else {**self.sizes, "depth": choice.depth}
            named = build_model(self.name, width=choice.width, structure=config, device="meta", **sizes)
            inputs = (named.example_input(batch_size, device="meta"),)
            return named, inputs, batch_size, loss_of(named, batch_size)
        model, inputs = parts_of(self._call(choice), self.name)
        model = model.to("meta")
        if self.structure != "dense" or options or self.rms_cap:
            set_structure(model, config, dearer="allow")  # most widths are only searched
        if inputs is None:
            if not hasattr(model, "example_input"):
                raise TypeError(f"{self.name} must return (module, inputs), or a module that has example_input(batch)")
            inputs = model.example_input(batch_size)  # type: ignore[operator]
        elif batch_size != 1:
            raise ValueError(f"{self.name} returns its inputs, and with them the size of a batch: leave batch_size out")
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        inputs = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, inputs)
        first = next((x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim), None)
        return model, inputs, 1 if first is None else len(first), None

    def _call(self, choice: Choice) -> Any:
        assert self._function is not None
        sizes = {} if choice.depth is None else {"depth": choice.depth}
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    return self._function(choice.width, **sizes)
            except (AssertionError, NotImplementedError, RuntimeError):
                pass  # what reads values, or draws from a generator, cannot run on the meta device
            try:
                return self._function(choice.width, **sizes)
            except (AssertionError, RuntimeError) as error:
                raise ValueError(f"{self.name} of width {choice.width}: {error}") from error


def device_of(device: str | Device | None, dtype: str) -> Device | None:
    """Return a device that is given by its name, or as it is."""
    return find_device(device, dtype) if isinstance(device, str) else device


def _whole(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


WIDEST = 2**20
_SMALL = 64  # all widths up to this one are tried
_BEYOND = 16  # number of widths above the largest that fits that are tried too, because the cost may rise unevenly

Share = Callable[[Choice], float | None]
"""The used share of the budget; None for a choice that cannot be built."""
Found = tuple[Choice | None, int | None]
"""The largest choice that fits, and the next number that can be built."""


class TooLargeError(Exception):
    """Even the widest model fits."""


def largest_rank(share: Share, at: Choice) -> Found:
    def of_rank(rank: int) -> Choice:
        return replace(at, options=tuple({**dict(at.options), "rank": rank}.items()))

    rank = largest_within(lambda rank: share(of_rank(rank)), 1.0)
    if rank is None:
        return None, None
    return of_rank(rank), rank + 1 if share(of_rank(rank + 1)) is not None else None


def widest_of(share: Share, at: Choice, widths: Sequence[int]) -> Found:
    after = None
    for width in reversed(widths):
        found = share(replace(at, width=width))
        if _fits(found):
            return replace(at, width=width), after
        after = width if found is not None else after
    return None, None


def widest(
    share: Share, may_fit: Callable[[Choice], bool], at: Choice, multiple_of: int, parts: int
) -> Found:  # fmt: skip
    def cost(width: int) -> float | None:
        if width > WIDEST:
            raise TooLargeError
        return share(replace(at, width=width))

    def nth(n: int) -> int:
        return nth_width(n, multiple_of, parts)

    last = _last_that_fits(lambda n: cost(nth(n)))
    # Candidates are n times multiple_of. With factors: all below the third power from there and up to twice the width
    # (a layer of fixed inputs may cost less at a larger width while that is small); else a few beyond.
    low = 0 if last is None else nth(last) // multiple_of
    high = low + _BEYOND + 1
    if parts > 1:
        high = max(nth((last or 0) + 3) // multiple_of, 2 * low, _SMALL // multiple_of, low + 2)
    widths = range(max(low, 1) * multiple_of, high * multiple_of, multiple_of)
    # Some widths of all residues, which show how the sizes of the layers depend on the width.
    list(itertools.islice((width for width in widths if cost(width) is not None), 4))
    best = _first(reversed(widths), lambda width: may_fit(replace(at, width=width)) and _fits(cost(width)))
    if best is None:
        return None, None
    beyond = range(best + multiple_of, (high + 64) * multiple_of, multiple_of)
    return replace(at, width=best), _first(beyond, lambda width: cost(width) is not None)


def nth_width(n: int, multiple_of: int, parts: int) -> int:
    """Return the n-th multiple, or for several factors the n-th power that is a multiple."""
    if parts == 1:
        return n * multiple_of
    root = next(k for k in range(1, multiple_of + 1) if k**parts % multiple_of == 0)
    return (root * (n + (root == 1))) ** parts  # 1 cannot be split


def number_of_factors(structure: str, options: Mapping[str, Any]) -> int:
    """Return the number of factors that a structure splits sizes into."""
    known = structlin.structure_options(structure)
    return options.get("cores", known.get("cores", 2 if structure == "einsum" else 1))


def _fits(share: float | None) -> bool:
    return share is not None and share <= 1


def _first(numbers: Iterable[int], fine: Callable[[int], bool]) -> int | None:
    return next((n for n in numbers if fine(n)), None)


def _last_that_fits(cost: Callable[[int], float | None]) -> int | None:
    """Return the last n whose cost is at most 1. The cost rises with n. It is None for some n, most of them small."""
    start = _first(range(1, 64), lambda n: cost(n) is not None)
    if start is None or not _fits(cost(start)):
        return None
    low, high = start, 2 * start
    while (found := cost(high)) is None or found <= 1:
        low, high = (low, high + 1) if found is None else (high, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        # The nearest n to the middle that can be built, first downwards, then upwards.
        near = _first(itertools.chain(range(middle, low, -1), range(middle + 1, high)), lambda n: cost(n) is not None)
        if near is None:
            break
        low, high = (near, high) if _fits(cost(near)) else (low, near)
    return low
