"""Measurement of features and gains during training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn.scale_check import rms_of
from structlin_nn.torch import StructuredExperts, StructuredLinear


class Probe:
    """Measure the last features on a fixed batch, their change in a step, and the gain of each layer.

    Under the structure-aware rule these stay the same when the width grows (Qiu et al., *Compute Better Spent*, ICML
    2024, section 3 and figure 2a); under the naive rule the change per step shrinks or explodes. `call` runs the model
    as evaluation does. Features are those of a model with ``return_features``: (inputs) to (logits, features), or, as
    in timm, the input of ``get_classifier``. For other models only gains are measured.
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any], inputs: Tensor) -> None:
        self.model, self.call, self.inputs = model, call, inputs
        self.total, self.count = 0.0, 0
        self._features: Tensor | None = None

    def before_step(self) -> None:
        self._features = self._run()

    def after_step(self) -> None:
        before, self._features = self._features, None
        if before is not None and (after := self._run()) is not None:
            self.total += rms_of(after - before)
            self.count += 1

    def statistics(self) -> dict[str, Any]:
        """Return the measurements for a record, and reset the sums.

        ``feature_rms``: RMS of the last hidden features (what the output layer reads). ``feature_change``: RMS of
        their change in a step, mean of the ``measured_steps`` since the last call (None for no steps).
        ``gains``: for each structured layer RMS(A x) / RMS(x) over the batch, bias left out; None where x is 0.
        ``learned_gains``: for each layer with capped factors the product of their learned gains. Both leave out layers
        of experts.
        """
        gains: dict[str, float | None] = {}
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, StructuredLinear)}
        layers = {n: m for n, m in layers.items() if not isinstance(m, StructuredExperts)}

        def note(name: str, layer: StructuredLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            size = rms_of(inputs[0])
            gains[name] = rms_of(output if layer.bias is None else output - layer.bias) / size if size else None

        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.callback(layer.register_forward_hook(partial(note, name)).remove)
            features = self._run()
        found = {
            "feature_rms": None if features is None else rms_of(features),
            "feature_change": self.total / self.count if self.count else None,
            "measured_steps": self.count,
            "gains": gains,
            "learned_gains": {
                name: float(torch.stack([gain.detach() for gain in layer.gains]).prod())
                for name, layer in layers.items()
                if layer.gains is not None
            },
        }
        self.total, self.count = 0.0, 0
        return found

    @torch.no_grad()
    def _run(self) -> Tensor | None:
        was_training = self.model.training
        self.model.eval()
        seen: list[Tensor] = []
        try:
            if (classifier := getattr(self.model, "get_classifier", None)) is not None:
                found = classifier()
                last = found[0] if isinstance(found, tuple) else found  # a distilled model has two
                handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
                self.call(self.inputs)
                handle.remove()
            elif "return_features" in self.model.forward.__code__.co_varnames:
                seen.append(self.call(self.inputs, return_features=True)[1])
            else:
                self.call(self.inputs)
        finally:
            self.model.train(was_training)
        return seen[0] if seen else None
