"""How large the last hidden features are, how much a step changes them, and what each structured layer multiplies by.

Under the structure-aware rule these stay the same when the width grows (Qiu et al., *Compute Better Spent*, ICML 2024,
section 3 and figure 2a); under the naive rule the change per step shrinks or explodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from structlin_nn.torch import StructuredLinear

__all__ = ["Probe", "rms"]


def rms(x: Tensor) -> Tensor:
    """Root of the mean square of all entries, in float64.

    >>> rms(torch.tensor([3.0, -4.0, 0.0, 0.0])).item()
    2.5
    """
    return x.double().square().mean().sqrt()


class Probe:
    """Measures a model on a fixed batch.

    Args:
        model: has ``return_features``: (inputs) to (logits, features); a model of timm has ``get_classifier`` instead,
            whose input is the features.
        call: runs it, in the precision and the way that evaluation does.
        inputs: the batch.

    >>> from structlin_nn.models import build_model
    >>> model = build_model("cifar-mlp", width=16, structure=None)
    >>> probe = Probe(model, model, torch.randn(4, 3, 32, 32))
    >>> probe.before_step()
    >>> _ = model.output.bias.data.add_(1)  # changes no features
    >>> probe.after_step()
    >>> probe.statistics()["feature_change"]
    0.0
    """

    def __init__(self, model: nn.Module, call: Callable[..., Any], inputs: Tensor) -> None:
        self.model, self.call, self.inputs = model, call, inputs
        self.total, self.count = 0.0, 0
        self._features: Tensor | None = None

    def before_step(self) -> None:
        """To be called before a step whose change is to be measured."""
        if self._features is None:
            self._features = self._run()

    def after_step(self, again: bool = False) -> None:
        """To be called after it; `again`: the next step is to be measured too."""
        assert self._features is not None, "before_step comes first"
        after = self._run()
        self.total += float(rms(after - self._features))
        self.count += 1
        self._features = after if again else None

    def statistics(self) -> dict[str, Any]:
        """What a record has of them, and start anew.

        ``feature_rms``: RMS of the last hidden features (what the output layer reads). ``feature_change``: RMS of
        their change in a step, mean of the ``measured_steps`` since the last call (None if there are none).
        ``gains``: for each structured layer RMS(A x) / RMS(x) over the batch, bias left out; None where x is 0.
        ``learned_gains``: for each layer with capped factors the product of their learned gains.
        """
        gains: dict[str, float | None] = {}
        layers = {n: m for n, m in self.model.named_modules() if isinstance(m, StructuredLinear)}

        def note(name: str) -> Callable[..., None]:
            def hook(layer: StructuredLinear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                size = float(rms(inputs[0]))
                plain = output if layer.bias is None else output - layer.bias
                gains[name] = float(rms(plain)) / size if size else None

            return hook

        handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
        try:
            features = self._run()
        finally:
            for handle in handles:
                handle.remove()
        found = {
            "feature_rms": float(rms(features)),
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

    def state(self) -> list[float]:
        """What a checkpoint holds: sum of the changes, and their number."""
        return [self.total, self.count]

    def restore(self, state: list[float]) -> None:
        """Go on from what `state` returned."""
        self.total, self.count = float(state[0]), int(state[1])
        self._features = None

    @torch.no_grad()
    def _run(self) -> Tensor:
        was_training = self.model.training
        self.model.eval()
        if (classifier := getattr(self.model, "get_classifier", None)) is None:
            _, features = self.call(self.inputs, return_features=True)
        else:
            found = classifier()
            features = self._classified(found[0] if isinstance(found, tuple) else found)  # a distilled model has two
        self.model.train(was_training)
        return features

    def _classified(self, classifier: nn.Module) -> Tensor:
        seen: list[Tensor] = []
        handle = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.call(self.inputs)
        finally:
            handle.remove()
        return seen[0]
