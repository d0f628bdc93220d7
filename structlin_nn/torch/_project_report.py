"""Report of a projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from structlin.structure import AbstractStructure
from structlin_nn._text import sizes_text, table

__all__ = ["LayerProjection", "ProjectionReport"]


@dataclass(frozen=True)
class LayerProjection:
    r"""One layer that was selected for projection.

    Attributes
    ----------
    names
        Names of the layer; several if the module is used at several places.
    shape
        Shape (d_out, d_in) of the weight.
    structure
        Structure of the new layer; None if the layer stays dense.
    options
        Options that were chosen for this layer, such as ``{"rank": 12}``.
    reason
        Reason why the layer stays dense.
    weight_error
        Relative error :math:`\|W - A\|_F / \|W\|_F` of the new weight A as it is stored.
    output_error
        Relative error of the outputs on the calibration data, without bias,
        :math:`\sqrt{\mathrm{E} \|(W - A) x\|^2 / \mathrm{E} \|W x\|^2}`; None without calibration.
    params_before, params_after
        Numbers of parameters, with biases and gains, trainable or not.
    macs_before, macs_after
        MACs for one vector at one place.
    experts
        Number of experts, if the layer has a matrix for each. Then the errors are those of all matrices together, and
        ``params_before`` and ``params_after`` those of all experts.
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
    experts: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as plain values, for JSON."""
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in self.options.items()}
        structure = None if self.structure is None else repr(self.structure)
        ends = {"names": list(self.names), "shape": list(self.shape)}
        return {**vars(self), **ends, "structure": structure, "options": options}


@dataclass(frozen=True)
class ProjectionReport:
    """Report of :func:`project_linear`; ``print`` shows a table.

    Attributes
    ----------
    layers
        Selected layers, including those that stay dense, in the order in which the model registers them.
    skipped
        Layers that were left out because their weight is tied to another module: reason by name.
    notes
        Other changes of the model.
    max_macs
        Budget of MACs; None if there was none.
    max_params
        Budget of parameters; None if there was none.
    """

    layers: tuple[LayerProjection, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    max_macs: int | None = None
    max_params: int | None = None

    @property
    def macs_before(self) -> int:
        """MACs of the selected layers, for one vector at each place."""
        return sum(layer.macs_before * len(layer.names) for layer in self.layers)

    @property
    def macs_after(self) -> int:
        """MACs of the layers after projection, for one vector at each place."""
        return sum(layer.macs_after * len(layer.names) for layer in self.layers)

    @property
    def params_before(self) -> int:
        """Number of parameters of the selected layers."""
        return sum(layer.params_before for layer in self.layers)

    @property
    def params_after(self) -> int:
        """Number of parameters of the layers after projection."""
        return sum(layer.params_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, for JSON; total MACs are those of one vector at each place."""
        totals = ("macs_before", "macs_after", "params_before", "params_after")
        lists = {
            "layers": [layer.to_dict() for layer in self.layers],
            "skipped": [list(pair) for pair in self.skipped],
            "notes": list(self.notes),
        }
        return {**vars(self), **lists, **{name: getattr(self, name) for name in totals}}

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
                " = ".join(layer.names), sizes_text(layer.experts, layer.shape),
                "dense" if layer.structure is None else chosen or "structured",
                *(f"{e:.4f}" for e in errors if e is not None), *(f"{n:,}" for n in counts),
            ))  # fmt: skip
        totals = (self.macs_before, self.macs_after, self.params_before, self.params_after)
        rows.append(("total", "", "", "", *(("",) if calibrated else ()), *(f"{n:,}" for n in totals)))
        lines = [table(head, rows, left=3, rule=False)]
        lines += [f"stays dense: {layer.names[0]} ({layer.reason})" for layer in self.layers if layer.reason]
        lines += [f"left alone: {name} ({reason})" for name, reason in self.skipped]
        return "\n".join([*lines, *self.notes])
