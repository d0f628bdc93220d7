"""Choice of the form of each layer, and construction of the projected layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import structlin
from structlin.projection import Problem, Settings, Solution, solve
from structlin.structure import AbstractStructure
from structlin_nn._layer import structure_of
from structlin_nn._replacement import plain
from structlin_nn._text import sizes_text, table
from structlin_nn.torch._modules import as_before, is_conv1d, num_experts, sizes_of
from structlin_nn.torch._project_curve import Forms, allocate, relative, saves
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.replace import num_params, structured_like


@dataclass(frozen=True)
class LayerProjection:
    r"""One layer that was selected for projection.

    Attributes
    ----------
    names
        Names of the layer; several if the module is used at several places.
    shape
        Shape (d_out, d_in) of the weight.
    structure, options
        Structure of the new layer, and the options that were chosen for it, such as ``{"rank": 12}``.
    reason
        Reason why the layer stays dense; its structure is None.
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
        return plain(self)


@dataclass(frozen=True)
class ProjectionReport:
    """Report of :func:`project_linear`; ``print`` shows a table.

    Attributes
    ----------
    layers
        Selected layers, including those that stay dense, in the order in which the model registers them.
    skipped
        Names of the other selected layers, with the reason why they were left out.
    notes
        Other changes of the model.
    max_macs, max_params
        Budget of MACs or of parameters; None if there was none.
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
        return plain(self) | {name: getattr(self, name) for name in totals}

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


StructureOf = Callable[[str, nn.Module], AbstractStructure]


def on_host(x: Tensor) -> np.ndarray:
    """Return a NumPy array in float64 or complex128; index arrays keep their dtype."""
    x = x.detach()
    if x.is_complex() or x.is_floating_point():
        x = x.to("cpu", torch.complex128 if x.is_complex() else torch.float64)
    return x.cpu().resolve_conj().resolve_neg().numpy()


@dataclass
class Task:
    """A layer to project, with the second moments of its inputs if they are known, and what it can become.

    A layer of experts has several matrices, and second moments for each. All get the same structure: ``fixed``, or one
    of ``forms``. A budget determines the ``number`` of the form; the number after the last form stands for dense. The
    ``new`` layer is None until it is made, and if the layer stays dense.
    """

    linear: nn.Module
    names: tuple[str, ...]
    moments: np.ndarray | None = None
    fixed: AbstractStructure | None = None
    forms: Forms | None = None
    number: int | None = None
    new: StructuredLinear | None = None
    _problems: list[Problem] | None = None

    def __post_init__(self) -> None:
        weight = self.linear.get_parameter("weight")
        if weight.is_meta:
            raise ValueError(f"layer {self.names[0]!r} is on the meta device and has no values to project")
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight of layer {self.names[0]!r} is not finite")
        d_in, d_out = sizes_of(self.linear)
        self.shape = d_out, d_in
        self.dense_macs = d_in * d_out  # for one vector
        self.experts = num_experts(self.linear)  # None for a layer with one matrix

    def matrices(self) -> np.ndarray:
        """Return the weights, of shape (matrices, d_out, d_in)."""
        found = on_host(self.linear.get_parameter("weight"))
        found = found.T if is_conv1d(self.linear) else found
        return found.reshape(-1, *self.shape)

    def problems(self, damping: float) -> list[Problem]:
        """Return the projection problems, weighted by the damped second moments if they are known; they are cached."""
        if self._problems is None:
            matrices, size = self.matrices(), self.shape[1]
            if self.moments is None:
                self._problems = [Problem(matrix) for matrix in matrices]
            else:
                moments = self.moments.reshape(-1, size, size)
                means = np.trace(moments, axis1=1, axis2=2).real / size
                unit = means.max()  # errors are relative, so the scale of the inputs is free
                damped = (
                    c / unit + damping * mean / unit * np.eye(size) for c, mean in zip(moments, means, strict=True)
                )
                self._problems = [Problem(matrix, c) for matrix, c in zip(matrices, damped, strict=True)]
        return self._problems

    def named(self, error: Exception) -> Exception:
        """Return an error with the name of the layer."""
        return type(error)(f"layer {self.names[0]!r} ({self.shape[1]} -> {self.shape[0]}): {error}")


class Choice:
    """Choice of the form of each layer: by given options, by an error, or by a budget.

    ``chosen`` has ``target_error``, ``max_macs``, ``mac_fraction``, ``max_params`` and ``param_fraction`` of
    :func:`project_linear`.
    """

    def __init__(
        self, structure: str | AbstractStructure | StructureOf, options: Mapping[str, Any], **chosen: Any
    ) -> None:  # fmt: skip
        self.structure, self.options = structure, options
        given = [k for k in ("rank", "rank_fraction") if options.get(k) is not None]
        given += [k for k, v in chosen.items() if v is not None]
        if len(given) > 1:
            raise ValueError(f"give at most one of rank, {', '.join(chosen)}, got {', '.join(given)}")
        self.by_layer = any(v is not None for v in chosen.values())
        if isinstance(structure, str):
            structlin.structure_class(structure)
        elif self.by_layer:
            raise ValueError(f"{given[0]} chooses ranks, so structure must be a name, got {structure!r}")
        elif not isinstance(structure, AbstractStructure) and not callable(structure):
            raise TypeError(f"structure must be a name, a structure or a function that returns one, got {structure!r}")
        self.target_error = chosen["target_error"]
        if self.target_error is not None and not 0 <= self.target_error < math.inf:
            raise ValueError(f"target_error must be a number of at least 0, got {self.target_error!r}")
        self.unit, self.budget, self.fraction = "MACs", None, None
        for unit, most, part in (("MACs", "max_macs", "mac_fraction"), ("parameters", "max_params", "param_fraction")):
            budget, fraction = chosen[most], chosen[part]
            if fraction is not None and not 0 < fraction <= 1:
                raise ValueError(f"{part} must lie in (0, 1], got {fraction!r}")
            if budget is not None and (isinstance(budget, bool) or not hasattr(budget, "__index__")):
                raise TypeError(f"{most} must be an integer, got {budget!r}")
            if budget is not None or fraction is not None:
                self.unit, self.budget, self.fraction = unit, budget, fraction

    def prepare(self, given: Sequence[Task], skipped: list[tuple[str, str]]) -> list[Task]:
        """Return the layers that have forms; the others are added to ``skipped``. ValueError if none has."""
        tasks: list[Task] = []
        errors: list[Exception] = []
        for task in given:
            try:
                if self.by_layer:
                    task.forms = Forms.of(str(self.structure), task.shape, self.options)
                else:
                    made = self.structure
                    if not isinstance(made, str | AbstractStructure):
                        made = made(task.names[0], task.linear)
                    task.fixed = structure_of(made, task.shape, self.options)
                tasks.append(task)
            except (TypeError, ValueError) as error:
                if isinstance(error, TypeError) or isinstance(self.structure, AbstractStructure):
                    raise task.named(error) from error
                errors.append(task.named(error))
                skipped.append((task.names[0], str(errors[-1])))
        if not tasks:
            raise errors[0]
        if (first := tasks[0].fixed) is not None and not any(saves(t.fixed) for t in tasks if t.fixed is not None):
            raise ValueError(
                f"the structure saves nothing in any layer: {tasks[0].names[0]!r} takes {tasks[0].dense_macs:,} MACs, "
                f"structured {first.macs:,}; choose a smaller rank"
            )
        if self.fraction is not None:
            self.budget = int(self.fraction * sum(self._cost(task, None) for task in tasks))
        if self.budget is not None:
            least = sum(self._cost(task, task.forms.design(0) if task.forms else None) for task in tasks)
            if least > self.budget:
                raise ValueError(f"the cheapest forms of the chosen layers need {least:,} {self.unit}, "
                                 f"more than the budget of {self.budget:,}")  # fmt: skip
        return tasks

    def _cost(self, task: Task, structure: AbstractStructure | None) -> int:
        """Return the cost of a form of a layer (None: dense): MACs for each name of the module, or parameters once."""
        if self.unit == "parameters":
            return (task.experts or 1) * (task.dense_macs if structure is None else structure.num_params)
        return (task.dense_macs if structure is None else structure.macs) * len(task.names)

    def run(
        self, tasks: Sequence[Task], damping: float, settings: Settings, layer_options: Mapping[str, Any]
    ) -> list[LayerProjection]:
        """Make the new layer of each task, and return the lines of the report."""
        if self.budget is not None:
            self._share_out(tasks, damping)
        lines: list[LayerProjection] = []
        for task in tasks:
            try:
                found = self._form(task, damping, settings)
                if isinstance(found, str):
                    lines.append(_line(task, {}, found))
                else:
                    structure, choice, solutions = found
                    kind: dict[str, Any] = {"structure": structure}
                    if isinstance(self.structure, str):
                        fixed = self.options if task.forms is None else task.forms.options
                        kind = {"structure": self.structure, **fixed, **choice}
                    task.new = layer_of(task.linear, structure, solutions, {**kind, **layer_options})
                    lines.append(_line(task, choice))
            except (TypeError, ValueError) as error:
                raise task.named(error) from error
            task._problems = task.moments = None  # arrays that are at least as large as the weight
        return lines

    def _share_out(self, tasks: Sequence[Task], damping: float) -> None:
        """Set the number of the form of each layer within the budget."""
        assert self.budget is not None
        numbers, curves = [], []
        for task in tasks:
            forms = task.forms
            assert forms is not None
            points = forms.curve(task.problems(damping)) if len(forms) else []
            numbers.append([number for number, _ in points] + [len(forms)])
            costs = [(self._cost(task, forms.design(number)), error**2) for number, error in points]
            curves.append([*costs, (self._cost(task, None), 0.0)])
        for task, own, at in zip(tasks, numbers, allocate(curves, self.budget), strict=True):
            task.number = own[at]

    def _form(
        self, task: Task, damping: float, settings: Settings
    ) -> tuple[AbstractStructure, dict[str, Any], list[Solution]] | str:
        """Return the structure of a layer, its chosen options, and its solutions; or the reason why it stays dense."""
        forms = task.forms
        if forms is None:
            assert task.fixed is not None
            if not saves(task.fixed):
                return f"with {task.fixed.macs:,} MACs it would save nothing"
            structure, choice = task.fixed, {}
        elif not len(forms):
            return "no form of the structure is cheaper"
        elif task.number is None:
            found = forms.smallest_for(self.target_error, task.problems(damping), settings)
            if found is None:
                return f"no cheaper form has an error of {self.target_error:g}"
            number, solutions = found
            return forms.design(number), forms.choice(number), solutions
        elif task.number == len(forms):
            return "the allocation of the budget keeps it dense"
        else:
            structure, choice = forms.design(task.number), forms.choice(task.number)
        return structure, choice, [solve(structure, problem, settings) for problem in task.problems(damping)]


def layer_of(
    linear: nn.Module, structure: AbstractStructure, solutions: Sequence[Solution], options: Mapping[str, Any]
) -> StructuredLinear:
    """Return a layer with the factors of a solution for each matrix, and all other properties of ``linear``."""
    weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
    # On the meta device, so that the global generator does not advance.
    new = structured_like(linear, "meta", options).to_empty(device=weight.device)
    assert new.structure == structure
    factors: Iterator[nn.Parameter] = iter(new.factors)
    gains: Iterator[nn.Parameter] = iter(new.gains or ())
    with torch.no_grad():
        for number, spec in enumerate(structure.factors):
            values = torch.from_numpy(np.stack([solution.factors[number] for solution in solutions]))
            target = next(factors) if spec.trainable else new.get_buffer(f"index{number}")
            target.copy_(values.view(target.shape))
            if new.rms_cap and spec.trainable:
                rms = values.abs().square().flatten(1).mean(1).sqrt()
                excess = (rms / new.cap_sigma[number]).clamp(min=1)
                if new.gains is not None:
                    gain = next(gains)
                    gain.copy_(excess.view(gain.shape))
                elif (most := float(excess.max())) > 1:
                    raise ValueError(
                        f"the RMS of factor {number} is {most:.3g} times its cap; use gain=True, which makes up for it"
                    )
        if bias is not None:
            new.get_parameter("bias").copy_(bias)
    for parameter in (*new.factors, *(new.gains or ())):
        if not torch.isfinite(parameter).all():
            raise ValueError(f"a factor of the projection overflows {parameter.dtype}")
    return as_before(linear, new)


def dense_of(layer: StructuredLinear) -> np.ndarray:
    """Return the matrix of a layer, with caps and gains, of shape (d_out, d_in), in float64 or complex128.

    A layer of experts has a matrix for each, along the first axis.
    """
    factors = [on_host(f) for f in layer.effective_factors()]
    dtype = np.result_type(*(f.dtype for f in factors if f.dtype.kind in "fc"), np.float64)
    build = structlin.StructuredOperator._build
    if (experts := num_experts(layer)) is None:
        return build(layer.structure, tuple(factors), dtype).to_dense()
    return np.stack([build(layer.structure, tuple(f[e] for f in factors), dtype).to_dense() for e in range(experts)])


def _line(task: Task, choice: dict[str, Any], reason: str = "") -> LayerProjection:
    """Return the line of the report on a layer, which without a new one stays dense."""
    before, new = num_params(task.linear), task.new
    if new is None:
        output = None if task.moments is None else 0.0
        costs = before, before, task.dense_macs, task.dense_macs
        return LayerProjection(task.names, task.shape, None, choice, 0.0, output, *costs, reason, task.experts)
    matrices = task.matrices()
    differences, output = matrices - dense_of(new), None
    size = task.shape[1]
    whole = Problem(matrices.reshape(-1, size))
    weight = relative(whole.norm(differences.reshape(-1, size)), whole)
    if task.moments is not None:
        c = task.moments.reshape(-1, size, size)
        c, unit = c / np.abs(c).max(), np.abs(matrices).max() or 1.0  # so that no square overflows or underflows
        error, scale = (float(np.vdot(x, x @ c).real) for x in (differences / unit, matrices / unit))
        output = math.sqrt(max(0.0, error) / scale) if scale > 0 else (0.0 if error <= 0 else math.inf)
    return LayerProjection(
        task.names, task.shape, new.structure, choice, weight, output, before,
        num_params(new), task.dense_macs, new.structure.macs, experts=task.experts,
    )  # fmt: skip
