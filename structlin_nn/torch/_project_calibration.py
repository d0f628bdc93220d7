"""Second moments of the inputs of layers, computed in one pass over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from structlin_nn._patterns import listed
from structlin_nn.torch._modules import num_experts

Forward = Callable[[nn.Module, Any], Any]


def call(model: nn.Module, batch: Any) -> Any:
    """Call ``model`` with a tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


class Moments:
    """``E[x x^H]`` of the input vectors x of a layer, summed in float64 (float32 on devices without float64)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.vectors = 0
        self.total: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add all vectors of ``x``, of shape (..., d_in); ValueError if a value is not finite."""
        x = x.detach().reshape(-1, x.shape[-1])
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        product = x.mT @ x.conj()
        if not torch.isfinite(product).all():
            raise ValueError(f"with the calibration data the inputs of layer {self.name!r} are not finite")
        if product.device.type != "mps":
            product = product.to(torch.complex128 if product.is_complex() else torch.float64)
        self.total = product if self.total is None else self.total.add_(product)
        self.vectors += len(x)

    @property
    def empty(self) -> bool:
        """Whether there are no vectors other than 0."""
        return self.total is None or not self.total.diagonal().real.sum() > 0

    def over(self, vectors: int) -> Tensor:
        """Return the sum divided by a number, (d_in, d_in) in float64 or complex128 on the CPU."""
        assert self.total is not None
        total = self.total.cpu()
        return total.to(torch.complex128 if total.is_complex() else torch.float64) / vectors


class _ReadWeights(TorchFunctionMode):
    """Mode that records inputs of layers whose parents multiply by ``layer.weight`` instead of calling the layer."""

    def __init__(self, found: Mapping[nn.Module, Sequence[Moments]]) -> None:
        super().__init__()
        self.moments = {id(layer._parameters.get("weight")): own for layer, (own, *_) in found.items()}
        self.inside: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self._add(weight, args[0] if args else kwargs["input"])
        elif func in _PRODUCTS and len(args) == 2 and args[1].ndim > 1:
            self._add(args[0], args[1].mT)
        return func(*args, **(kwargs or {}))

    def _add(self, weight: Tensor, x: Tensor) -> None:
        own = self.moments.get(id(weight))
        if own is not None and own.name not in self.inside:
            own.add(x)


_PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


def gather(
    model: nn.Module, layers: Mapping[nn.Module, str], calibration: Iterable[Any], forward: Forward | None,
    notes: dict[str, None] | None = None,
) -> dict[nn.Module, Tensor]:  # fmt: skip
    """Return the second moments (d_in, d_in) of the inputs of ``layers``, a mapping from module to name.

    Those of experts have shape (experts, d_in, d_in), and their sum over the experts is the second moment of all inputs
    of the layer. An expert without inputs gets the sum, as if for one vector, and ``notes`` name it.

    Vectors that a parent multiplies by ``layer.weight`` itself count too, as in Mamba and BEiT. The model runs without
    gradients and in evaluation mode; modes are restored. ValueError if no data reach a layer.
    """
    found = {layer: [Moments(name) for _ in range(num_experts(layer) or 1)] for layer, name in layers.items()}
    read = _ReadWeights(found)

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        read.inside.add(layers[layer])
        experts = num_experts(layer) is not None
        given = dict(zip(("x", "sizes"), args, strict=False)) | kwargs if experts else {}
        x = given["x"] if experts else next(iter((*args, *kwargs.values())))
        for own, rows in zip(found[layer], x.split(list(given["sizes"])) if experts else [x], strict=True):
            if rows.numel():
                own.add(rows)

    def after(layer: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        read.inside.discard(layers[layer])

    batches = 0
    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        for layer in found:
            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(after, always_call=True).remove)
        model.eval()
        with torch.no_grad(), read:
            for batch in calibration:
                (forward or call)(model, batch)
                batches += 1
    if not batches:
        raise ValueError("calibration has no batches; give one batch of inputs or more")
    if missing := [layers[layer] for layer, own in found.items() if not any(one.vectors for one in own)]:
        raise ValueError(f"the calibration data do not reach {listed(missing)}; exclude these layers")
    result = {}
    for layer, own in found.items():
        vectors, others = sum(one.vectors for one in own), [str(e) for e, one in enumerate(own) if one.empty]
        if len(others) == len(own):
            raise ValueError(f"with the calibration data all inputs of layer {layers[layer]!r} are 0; exclude it")
        if num_experts(layer) is None:
            result[layer] = own[0].over(vectors)
            continue
        mean: Any = sum(one.over(vectors) for one in own if not one.empty)
        result[layer] = torch.stack([mean / vectors if one.empty else one.over(vectors) for one in own])
        if others and notes is not None:
            what = f"expert{'s' * (len(others) > 1)} {listed(others)}"
            notes[f"{layers[layer]}: the calibration data have no input other than 0 for {what}; the second moments "
                  "are those of the inputs of the other experts"] = None  # fmt: skip
    return result
