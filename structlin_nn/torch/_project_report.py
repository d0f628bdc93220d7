"""What projection did to a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from structlin.structure import AbstractStructure
from structlin_nn._text import table

__all__ = ["LayerProjection", "ProjectionReport"]


@dataclass(frozen=True)
class LayerProjection:
    """One layer that was chosen for projection.

    Attributes
    ----------
    names
        Where it stands; several names where one module is used at several places.
    shape
        (d_out, d_in).
    structure
        Of the new layer; None where the layer stayed dense, for the ``reason`` given.
    options
        What was chosen for this layer alone, such as ``{"rank": 12}``.
    weight_error
        ``||W - A|| / ||W||`` in the Frobenius norm, A being the new weight as it is stored.
    output_error
        The same for the outputs (without bias) on the calibration data, ``sqrt(E ||(W - A) x||^2 / E ||W x||^2)``; None
        without calibration.
    params_before, params_after
        Trainable or not, with biases and gains.
    macs_before, macs_after
        Multiply-accumulates for one vector at one place.
    """

    names: tuple[str, ...]
    shape: tuple[int, int]
    structure: AbstractStructure | None
    options: dict[str, Any]
    weight_error: float
    output_error: float | None
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        return {
            "names": list(self.names),
            "shape": list(self.shape),
            "structure": None if self.structure is None else repr(self.structure),
            "options": options,
            "weight_error": self.weight_error,
            "output_error": self.output_error,
            "params_before": self.params_before,
            "params_after": self.params_after,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class ProjectionReport:
    """What :func:`project_linear` did; ``print`` it for a table.

    Attributes
    ----------
    layers
        The chosen layers, those that stayed dense among them, in the order in which the model registers them.
    skipped
        Names of layers that were left alone because their weight is tied to another module, and why.
    notes
        What else was changed in the model.
    max_macs
        The budget, None where there was none.
    max_params
        The budget of parameters, likewise.
    """

    layers: tuple[LayerProjection, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    max_macs: int | None = None
    max_params: int | None = None

    @property
    def macs_before(self) -> int:
        """Multiply-accumulates of the chosen layers, for one vector at each place."""
        return sum(layer.macs_before * len(layer.names) for layer in self.layers)

    @property
    def macs_after(self) -> int:
        """The same for what they became."""
        return sum(layer.macs_after * len(layer.names) for layer in self.layers)

    @property
    def params_before(self) -> int:
        """Of the chosen layers."""
        return sum(layer.params_before for layer in self.layers)

    @property
    def params_after(self) -> int:
        """Of what the chosen layers became."""
        return sum(layer.params_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON. MACs of the whole are those of one vector at each place of each chosen layer."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [list(pair) for pair in self.skipped],
            "notes": list(self.notes),
            "max_macs": self.max_macs,
            "max_params": self.max_params,
            "macs_before": self.macs_before,
            "macs_after": self.macs_after,
            "params_before": self.params_before,
            "params_after": self.params_after,
        }

    def __str__(self) -> str:
        calibrated = any(layer.output_error is not None for layer in self.layers)
        head = ("layer", "shape", "form", "weight error", *(("output error",) if calibrated else ()),
                "MACs", "after", "params", "after")  # fmt: skip
        rows = []
        for layer in self.layers:
            chosen = " ".join(f"{k}={v}" for k, v in layer.options.items())
            errors = (layer.weight_error, layer.output_error) if calibrated else (layer.weight_error,)
            counts = (layer.macs_before, layer.macs_after, layer.params_before, layer.params_after)
            rows.append((
                " = ".join(layer.names), f"{layer.shape[0]} x {layer.shape[1]}",
                "dense" if layer.structure is None else chosen or "structured",
                *(f"{e:.4f}" for e in errors if e is not None), *(f"{n:,}" for n in counts),
            ))  # fmt: skip
        totals = (self.macs_before, self.macs_after, self.params_before, self.params_after)
        rows.append(("total", "", "", "", *(("",) if calibrated else ()), *(f"{n:,}" for n in totals)))
        lines = [table(head, rows, left=3, rule=False)]
        lines += [f"stays dense: {layer.names[0]} ({layer.reason})" for layer in self.layers if layer.reason]
        lines += [f"left alone: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join([*lines, *self.notes])
