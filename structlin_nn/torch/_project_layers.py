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
from structlin_nn.torch._modules import is_conv1d, num_experts, sizes_of, structured_kind
from structlin_nn.torch._project_curve import Forms, allocate, saves
from structlin_nn.torch.linear import StructuredLinear


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
        return plain(self)


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
Made = tuple[StructuredLinear | None, LayerProjection]


def on_host(x: Tensor) -> np.ndarray:
    """Return a NumPy array in float64 or complex128; index arrays keep their dtype."""
    x = x.detach()
    if x.is_complex() or x.is_floating_point():
        x = x.to("cpu", torch.complex128 if x.is_complex() else torch.float64)
    return x.cpu().resolve_conj().resolve_neg().numpy()


@dataclass
class Task:
    """A layer to project, with the second moments of its inputs if they are known.

    A layer of experts has several matrices, and second moments for each. All get the same structure.
    """

    linear: nn.Module
    names: tuple[str, ...]
    moments: np.ndarray | None = None
    _problems: list[Problem] | None = None

    def __post_init__(self) -> None:
        weight = self.linear.get_parameter("weight")
        if weight.is_meta:
            raise ValueError(f"layer {self.names[0]!r} is on the meta device and has no values to project")
        if not torch.isfinite(weight).all():
            raise ValueError(f"the weight of layer {self.names[0]!r} is not finite")

    @property
    def shape(self) -> tuple[int, int]:
        """Shape (d_out, d_in) of the weight."""
        d_in, d_out = sizes_of(self.linear)
        return d_out, d_in

    @property
    def dense_macs(self) -> int:
        """MACs of the dense layer for one vector."""
        return math.prod(self.shape)

    @property
    def experts(self) -> int | None:
        """Number of experts; None for a layer with one matrix."""
        return num_experts(self.linear)

    def matrices(self) -> np.ndarray:
        """Return the weights, of shape (matrices, d_out, d_in)."""
        found = on_host(self.linear.get_parameter("weight"))
        found = found.T if is_conv1d(self.linear) else found
        return found.reshape(-1, *self.shape)

    def problems(self, damping: float) -> list[Problem]:
        """Return the projection problems, weighted by the damped second moments if they are known; they are cached."""
        if self._problems is None:
            matrices, size = self.matrices(), self.shape[1]
            moments = [None] * len(matrices) if self.moments is None else self.moments.reshape(-1, size, size)
            damped = (c if c is None else c + damping * np.trace(c).real / size * np.eye(size) for c in moments)
            self._problems = [Problem(matrix, c) for matrix, c in zip(matrices, damped, strict=True)]
        return self._problems

    def named(self, error: Exception) -> Exception:
        """Return an error with the name of the layer."""
        return type(error)(f"layer {self.names[0]!r} ({self.shape[1]} -> {self.shape[0]}): {error}")


class Choice:
    """Choice of the form of each layer: by given options, by an error, or by a budget."""

    def __init__(
        self, structure: str | AbstractStructure | StructureOf, options: Mapping[str, Any],
        target_error: float | None, *, max_macs: int | None = None, mac_fraction: float | None = None,
        max_params: int | None = None, param_fraction: float | None = None,
    ) -> None:  # fmt: skip
        self.structure, self.options, self.target_error = structure, options, target_error
        self.budget = max_params if max_macs is None else max_macs
        self.fraction = param_fraction if mac_fraction is None else mac_fraction
        self.unit = "MACs" if max_params is None and param_fraction is None else "parameters"
        given = [k for k in ("rank", "rank_fraction") if options.get(k) is not None]
        chosen = {
            "target_error": target_error, "max_macs": max_macs, "mac_fraction": mac_fraction,
            "max_params": max_params, "param_fraction": param_fraction,
        }  # fmt: skip
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
        if target_error is not None and not 0 <= target_error < math.inf:
            raise ValueError(f"target_error must be a number of at least 0, got {target_error!r}")
        for key in ("mac_fraction", "param_fraction"):
            if (part := chosen[key]) is not None and not 0 < part <= 1:
                raise ValueError(f"{key} must lie in (0, 1], got {part!r}")
        for key in ("max_macs", "max_params"):
            if chosen[key] is not None and (isinstance(chosen[key], bool) or not hasattr(chosen[key], "__index__")):
                raise TypeError(f"{key} must be an integer, got {chosen[key]!r}")

    def prepare(self, given: Sequence[Task], skipped: list[tuple[str, str]]) -> list[Task]:
        """Return the layers that have forms; the others are added to ``skipped``. ValueError if none has."""
        self.fixed: list[AbstractStructure] = []
        self.forms: list[Forms] = []
        tasks: list[Task] = []
        errors: list[Exception] = []
        for task in given:
            try:
                if self.by_layer:
                    self.forms.append(Forms.of(str(self.structure), task.shape, self.options))
                else:
                    made = self.structure
                    if not isinstance(made, str | AbstractStructure):
                        made = made(task.names[0], task.linear)
                    self.fixed.append(structure_of(made, task.shape, self.options))
                tasks.append(task)
            except (TypeError, ValueError) as error:
                if isinstance(error, TypeError) or isinstance(self.structure, AbstractStructure):
                    raise task.named(error) from error
                errors.append(task.named(error))
                skipped.append((task.names[0], str(errors[-1])))
        if not tasks:
            raise errors[0]
        if self.fixed and not any(map(saves, self.fixed)):
            first = self.fixed[0]
            raise ValueError(
                f"the structure saves nothing in any layer: {tasks[0].names[0]!r} takes {tasks[0].dense_macs:,} MACs, "
                f"structured {first.macs:,}; choose a smaller rank"
            )
        if self.fraction is not None:
            self.budget = int(self.fraction * sum(self._cost(task, None) for task in tasks))
        if self.budget is not None:
            least = [self._cost(task, forms.design(0) if len(forms) else None)
                     for task, forms in zip(tasks, self.forms, strict=True)]  # fmt: skip
            if sum(least) > self.budget:
                raise ValueError(f"the cheapest forms of the chosen layers need {sum(least):,} {self.unit}, "
                                 f"more than the budget of {self.budget:,}")  # fmt: skip
        return tasks

    def _cost(self, task: Task, structure: AbstractStructure | None) -> int:
        """Return the cost of a form of a layer (None: dense): MACs for each name of the module, or parameters once."""
        if self.unit == "parameters":
            return (task.experts or 1) * (math.prod(task.shape) if structure is None else structure.num_params)
        return (task.dense_macs if structure is None else structure.macs) * len(task.names)

    def run(
        self, tasks: Sequence[Task], damping: float, settings: Settings, layer_options: Mapping[str, Any]
    ) -> list[Made]:
        """Return the new layer of each task (None if it stays dense), and its line of the report."""
        picked = self._shared_out(tasks, damping) if self.budget is not None else [None] * len(tasks)
        made: list[Made] = []
        for place, task in enumerate(tasks):
            try:
                made.append(self._project(place, task, picked[place], damping, settings, layer_options))
            except (TypeError, ValueError) as error:
                raise task.named(error) from error
            task._problems = task.moments = None  # arrays that are at least as large as the weight
        return made

    def _shared_out(self, tasks: Sequence[Task], damping: float) -> list[int]:
        """Return the index of the form of each layer within the budget; the index after the last stands for dense."""
        assert self.budget is not None
        numbers, curves = [], []
        for task, forms in zip(tasks, self.forms, strict=True):
            points = forms.curve(task.problems(damping)) if len(forms) else []
            numbers.append([number for number, _ in points] + [len(forms)])
            costs = [(self._cost(task, forms.design(number)), error**2) for number, error in points]
            curves.append([*costs, (self._cost(task, None), 0.0)])
        found = allocate(curves, self.budget)
        return [own[at] for own, at in zip(numbers, found, strict=True)]

    def _project(
        self, place: int, task: Task, number: int | None, damping: float, settings: Settings,
        layer_options: Mapping[str, Any],
    ) -> Made:  # fmt: skip
        choice: dict[str, Any] = {}
        if not self.by_layer:
            structure = self.fixed[place]
            if not saves(structure):
                return None, _line(task, None, {}, f"with {structure.macs:,} MACs it would save nothing")
            solutions = [solve(structure, problem, settings) for problem in task.problems(damping)]
        else:
            forms = self.forms[place]
            if not len(forms):
                return None, _line(task, None, {}, "no form of the structure is cheaper")
            if number is None:
                assert self.target_error is not None
                found = forms.smallest_for(self.target_error, task.problems(damping), settings)
                if found is None:
                    return None, _line(task, None, {}, f"no cheaper form has an error of {self.target_error:g}")
                number, solutions = found
            elif number == len(forms):
                return None, _line(task, None, {}, "the allocation of the budget keeps it dense")
            else:
                solutions = [solve(forms.design(number), problem, settings) for problem in task.problems(damping)]
            structure, choice = forms.design(number), forms.choice(number)
        kind: dict[str, Any] = {"structure": structure}
        if isinstance(self.structure, str):
            fixed = self.forms[place].options if self.by_layer else self.options
            kind = {"structure": self.structure, **fixed, **choice}
        new = layer_of(task.linear, structure, solutions, {**kind, **layer_options})
        return new, _line(task, new, choice)


def layer_of(
    linear: nn.Module, structure: AbstractStructure, solutions: Sequence[Solution], options: Mapping[str, Any]
) -> StructuredLinear:
    """Return a layer with the factors of a solution for each matrix, and all other properties of ``linear``."""
    weight, bias = linear.get_parameter("weight"), linear._parameters.get("bias")
    # On the meta device, so that the global generator does not advance.
    new = structured_kind(linear)(
        *sizes_of(linear), bias=bias is not None, device="meta", dtype=weight.dtype, **options
    )
    new = new.to_empty(device=weight.device)
    assert new.structure == structure
    with torch.no_grad():
        factors: Iterator[nn.Parameter] = iter(new.factors)
        gains: Iterator[nn.Parameter] = iter(new.gains or ())
        for number, (spec, *arrays) in enumerate(
            zip(structure.factors, *(solution.factors for solution in solutions), strict=True)
        ):
            values = torch.from_numpy(np.stack(arrays))  # (matrices, *shape)
            if not spec.trainable:
                index = new.get_buffer(f"index{number}")
                index.copy_(values.view(index.shape))
                continue
            factor = next(factors)
            factor.copy_(values.view(factor.shape))
            if new.rms_cap:
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
            assert new.bias is not None
            new.bias.copy_(bias).requires_grad_(bias.requires_grad)
    for parameter in (*new.factors, *(new.gains or ())):
        if not torch.isfinite(parameter).all():
            raise ValueError(f"a factor of the projection overflows {parameter.dtype}")
        parameter.requires_grad_(weight.requires_grad)
    return new.train(linear.training)


def dense_of(layer: StructuredLinear) -> np.ndarray:
    """Return the matrix of a layer, with caps and gains, of shape (d_out, d_in), in float64 or complex128.

    A layer of experts has a matrix for each, along the first axis.
    """
    factors = [on_host(f) for f in layer.effective_factors()]
    dtype = np.result_type(*(f.dtype for f in factors if f.dtype.kind in "fc"), np.float64)
    build = structlin.StructuredOperator._build
    if num_experts(layer) is None:
        return build(layer.structure, tuple(factors), dtype).to_dense()
    parts = (tuple(f[e] for f in factors) for e in range(num_experts(layer) or 0))
    return np.stack([build(layer.structure, part, dtype).to_dense() for part in parts])


def _line(task: Task, new: StructuredLinear | None, choice: dict[str, Any], reason: str = "") -> LayerProjection:
    """Return the line of the report on a layer, which without a new one stays dense."""
    before = sum(p.numel() for p in task.linear.parameters())
    if new is None:
        output = None if task.moments is None else 0.0
        costs = before, before, task.dense_macs, task.dense_macs
        return LayerProjection(task.names, task.shape, None, choice, 0.0, output, *costs, reason, task.experts)
    matrices = task.matrices()
    differences = matrices - dense_of(new)

    def ratio(error: float, scale: float) -> float:
        return math.sqrt(max(0.0, error) / scale) if scale > 0 else (0.0 if error <= 0 else math.inf)

    output = None
    if (c := task.moments) is not None:
        c = c.reshape(-1, *c.shape[-2:])
        output = ratio(*(float(np.vdot(x, x @ c).real) for x in (differences, matrices)))
    weight = ratio(*(float(np.linalg.norm(x)) ** 2 for x in (differences, matrices)))
    return LayerProjection(
        task.names, task.shape, new.structure, choice, weight, output, before,
        sum(p.numel() for p in new.parameters()), task.dense_macs, new.structure.macs, experts=task.experts,
    )  # fmt: skip
