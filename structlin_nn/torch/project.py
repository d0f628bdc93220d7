"""From a trained dense network to a structured one, and back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from structlin.projection import Settings
from structlin.structure import AbstractStructure
from structlin_nn._patterns import Patterns, as_patterns
from structlin_nn._replacement import names_of, select
from structlin_nn.torch._modules import changed, check_model, linear_sizes, put
from structlin_nn.torch._project_calibration import Forward, gather
from structlin_nn.torch._project_layers import Choice, StructureOf, Task, dense_of
from structlin_nn.torch._project_report import LayerProjection, ProjectionReport
from structlin_nn.torch._step_check import replaced
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.pointwise import StructuredPointwise
from structlin_nn.torch.replace import Selection, _check_is_called, _owners, _switch_off_fast_paths, as_structure
from structlin_nn.torch.unpack import pack_linear, unpacked

__all__ = ["LayerProjection", "ProjectionReport", "project_linear", "to_dense_linear"]


def project_linear(
    model: nn.Module,
    structure: str | AbstractStructure | StructureOf,
    *,
    calibration: Iterable[Any] | None = None,
    forward: Forward | None = None,
    layers: Selection = "all_but_last",
    exclude: Patterns = (),
    tied: bool = False,
    target_error: float | None = None,
    max_macs: int | None = None,
    mac_fraction: float | None = None,
    max_params: int | None = None,
    param_fraction: float | None = None,
    damping: float = 0.01,
    rms_cap: bool = False,
    gain: bool | None = None,
    rule: str = "paper",
    restarts: int | None = None,
    max_sweeps: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
    unpack: bool = False,
    **options: Any,
) -> ProjectionReport:
    """Replace linear layers of a trained ``model``, in place, by the nearest layers of a structure.

    Linear layers are ``nn.Linear`` and the Conv1D of transformers' GPT-2. Each weight W becomes the matrix A of the
    structure that is nearest to it (:func:`structlin.project`); the bias stays as it is, and dtype, device, training
    mode and ``requires_grad`` do too. Half-precision weights are projected in float64 and rounded once. The model is
    changed only when everything has passed.

    With ``calibration`` nearest means the smallest error of the layer's outputs: ``E ||(W - A) x||^2``, where x are
    the inputs that this layer of the dense model meets. Their second moments are gathered in one pass, in evaluation
    mode, without keeping activations: one (d_in, d_in) float64 matrix for each chosen layer.

    A layer whose structured form would not cost less than its dense one stays dense; the report says which do.

    **Choice of the forms.** Without ``target_error`` and budget, ``options`` say it, with the structure's defaults for
    what they leave out. Otherwise each layer gets its own rank (of a structure without ranks, its own number of
    blocks: a power of 2, which for Monarch divides the inner size). A budget is shared out so that the sum over the
    layers of squared relative errors (of the outputs, with calibration) is small: along the convex hulls of the
    layers' curves of error against cost, the steepest descent first, which is optimal up to the last step. A dense
    layer is the last point of its curve. Curves of low rank, and of Tensor-Train and Block Tensor-Train of two cores
    without calibration, come from one decomposition for each layer; others from a few sweeps at ranks that grow by 1.5.

    Parameters
    ----------
    model
        Any module with linear layers inside.
    structure
        Name of a registered structure, with its options as further keywords; or a structure, if all layers have its
        shape; or a function from name and layer to a structure. The latter two leave no choice.
    calibration
        Batches of inputs; a tensor is passed as the only argument, the entries of a tuple or list as positional ones,
        those of a mapping as keywords. Some thousand vectors for each layer are enough.
    forward
        How to run a batch, if in another way: ``forward(model, batch)``. For a loader of (images, labels): ``lambda
        model, batch: model(batch[0])``.
    layers, exclude
        Which layers; presets, patterns and predicates as in :func:`replace_linear`.
    tied
        Replace layers whose weight or bias is a parameter of another module too, and so untie them. By default they are
        left alone: a head tied to its embedding stays.
    target_error
        For each layer the cheapest form whose relative error is at most this (weighted by the damped second moments,
        with calibration).
    max_macs
        Budget: multiply-accumulates of all chosen layers together, for one vector at each place where they stand.
    mac_fraction
        The budget as a fraction, in (0, 1], of what the chosen layers cost now.
    max_params, param_fraction
        The same for the numbers that are stored: parameters of all chosen layers together, without biases and gains.
        Those of a module that stands at several places count once.
    damping
        This part of the mean square of a layer's inputs is added to all directions of its second moments, so that
        directions that the calibration data lack are not given up.
    rms_cap, gain, rule
        As in :class:`StructuredLinear`. Gains are set so that the capped factors have the values found; without gains a
        factor beyond its cap is an error.
    restarts, max_sweeps, tolerance, seed
        Of the iterations where there is no closed form, as in :func:`structlin.project`.
    unpack
        As in :func:`replace_linear`: take experts of transformers and ``nn.MultiheadAttention`` too.
    **options
        Of the named structure.

    Returns
    -------
    ProjectionReport
        A report: for each layer its form, relative errors of the weight and of the outputs, parameters and MACs before
        and after.

    Raises
    ------
    ValueError
        Nothing is chosen, or a pattern matches no layer; two of rank, ``target_error`` and a budget at once; a budget
        below the cheapest forms; options or sizes that the structure does not allow (the message names the layer); no
        layer for which the form given saves anything; weights on the meta device or not finite; calibration data that
        are empty, not finite, or do not reach a layer; no layer that can be replaced (:func:`replace_linear`); of
        several, those that cannot stay dense, and the report says why.
    TypeError
        ``structure`` or a pattern of another type.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> data = [torch.randn(100, 64) @ torch.diag(0.9 ** torch.arange(64)) for _ in range(5)]
    >>> report = project_linear(model, "low_rank", mac_fraction=0.5, calibration=data)
    >>> report.macs_before, report.macs_after
    (16384, 8064)
    >>> [layer.options for layer in report.layers]
    [{'rank': 18}, {'rank': 24}]
    """
    check_model(model, "project_linear")
    structure = as_structure(structure)
    choice = Choice(
        structure, options, target_error,
        max_macs=max_macs, mac_fraction=mac_fraction, max_params=max_params, param_fraction=param_fraction,
    )  # fmt: skip
    settings = Settings(restarts, max_sweeps, tolerance, seed)
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a number of at least 0, got {damping!r}")
    if forward is not None and calibration is None:
        raise ValueError("forward says how to run calibration data, and there are none")
    if isinstance(calibration, torch.Tensor | np.ndarray):
        raise TypeError(
            f"calibration is an iterable of batches, and an array of shape {tuple(calibration.shape)} would be run row "
            "by row: pass [calibration]"
        )
    with unpacked(model, unpack) as restore:
        chosen, skipped = _chosen(model, layers, exclude, tied)
        tasks = choice.prepare([Task(linear, names) for linear, names in chosen.items()], skipped)
        if calibration is not None:
            moments = gather(model, {task.linear: task.names[0] for task in tasks}, calibration, forward)
            for task in tasks:
                task.moments = moments[task.linear].numpy()
        made = choice.run(tasks, damping, settings, {"rms_cap": rms_cap, "gain": gain, "rule": rule})

        notes: dict[str, None] = {}
        gone = [task.linear for task, (new, _) in zip(tasks, made, strict=True) if new is not None]
        replaced(parameter for linear in gone for parameter in linear.parameters())
        for task, (new, _) in zip(tasks, made, strict=True):
            if new is not None:
                put(model, task.names, new)
                for name in task.names:
                    notes |= dict.fromkeys(_switch_off_fast_paths(model, name))
        restore()
        changed(model)
        if isinstance(structure, str) and not choice.by_layer and not options:
            errors = [line.weight_error if line.output_error is None else line.output_error for _, line in made]
            warnings.warn(
                f"{structure} is taken with its default options, by which the layers have relative errors of up to "
                f"{max(errors):.2f}; give an option such as rank, target_error, or a budget such as mac_fraction=0.5",
                stacklevel=2,
            )
        budget = {"max_macs" if choice.unit == "MACs" else "max_params": choice.budget}
        return ProjectionReport(tuple(line for _, line in made), tuple(skipped), tuple(notes), **budget)


def to_dense_linear(model: nn.Module) -> tuple[str, ...]:
    """Replace every :class:`StructuredLinear` inside ``model``, in place, by the ``nn.Linear`` of the same function.

    The weight is multiplied out in float64, with caps and gains, and rounded once to the dtype of the factors. Bias,
    device, training mode and ``requires_grad`` (true where any factor's was) are kept. A module that stands at several
    places becomes one layer at all of them. Experts and attention that were unpacked are packed again. The model is
    changed only when everything has passed.

    Returns
    -------
    tuple[str, ...]
        The names of the layers, in the order in which the model registers them.

    Raises
    ------
    ValueError
        There are none; the model itself is one; a layer has hooks, parametrizations or parameters that another module
        shares, all of which would be lost; its values are on the meta device or not finite.

    Examples
    --------
    >>> model = nn.Sequential(StructuredLinear(12, 6, structure="kronecker"), nn.ReLU())
    >>> x = torch.ones(2, 12)
    >>> before = model(x)
    >>> to_dense_linear(model), type(model[0]).__name__, torch.allclose(model(x), before, atol=1e-5)
    (('0',), 'Linear', True)
    """
    if isinstance(model, StructuredLinear):
        raise ValueError(
            "the model itself is a structured layer and cannot be replaced in place; put it in a container"
        )
    places: dict[StructuredLinear, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredLinear):
            places.setdefault(module, []).append(name)
    if not places:
        raise ValueError("the model has no structured layers")
    owners = _owners(model)
    made = {}
    for layer, names in places.items():
        inside = tuple(f"{name}." for name in names)
        others = [o for p in layer.parameters() for o in owners[p] if not o.startswith(inside)]
        if others:
            raise ValueError(f"layer {names[0]!r} shares {', '.join(others)}, and replacing it would untie them")
        if any(hooks for m in layer.modules() for key, hooks in vars(m).items() if key.endswith("_hooks")):
            raise ValueError(f"layer {names[0]!r} has hooks, which would be lost; remove them first")
        if any(nn.utils.parametrize.is_parametrized(m) for m in layer.modules()):
            raise ValueError(f"layer {names[0]!r} has parametrizations, which would be lost; remove them first")
        made[layer] = _dense_layer(names[0], layer)
    for layer, new in made.items():
        put(model, places[layer], new)
    pack_linear(model)
    return tuple(names[0] for names in places.values())


def _dense_layer(name: str, layer: StructuredLinear) -> nn.Module:
    held = [*layer.parameters(), *layer.buffers()]
    if any(t.is_meta for t in held):
        raise ValueError(f"layer {name!r} is on the meta device and has no values")
    like = held[0]
    dtype = next((p.dtype for p in layer.parameters()), torch.get_default_dtype())
    weight = torch.from_numpy(np.ascontiguousarray(dense_of(layer))).to(like.device, dtype)
    if not torch.isfinite(weight).all():
        raise ValueError(f"the weight of layer {name!r} is not finite in {dtype}")
    if isinstance(layer, StructuredPointwise):
        new: Any = layer.to_convolution(weight)
    else:
        new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype)
        new.weight = nn.Parameter(weight)
    new.weight.requires_grad_(any(f.requires_grad for f in layer.factors))
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    made: nn.Module = new.train(layer.training)
    return made


def _chosen(
    model: nn.Module, layers: Selection, exclude: Patterns, tied: bool
) -> tuple[Mapping[nn.Module, tuple[str, ...]], list[tuple[str, str]]]:
    """Layers to project with their names, and those left alone with the reason."""
    if linear_sizes(model) is not None:
        raise ValueError("the model itself is a linear layer and cannot be replaced in place; put it in a container")
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if linear_sizes(module) is not None:
            places.setdefault(module, []).append(name)
    owners = _owners(model)
    chosen, skipped, errors, kinds = {}, [], [], "nn.Linear, or Conv1D of transformers"
    for linear, names in select(places, layers, as_patterns(exclude), kinds).items():
        others = [o for p in linear.parameters() for o in owners[p] if o.rpartition(".")[0] not in names]
        if others and not tied:
            skipped.append((names[0], f"tied to {', '.join(others)}"))
            continue
        try:
            _check_is_called(model, names, linear)
        except ValueError as error:
            errors.append(error)
            skipped.append((names[0], str(error)))
            continue
        chosen[linear] = names
    if not chosen and errors:
        raise errors[0]
    if not chosen:
        raise ValueError(
            f"every layer that is chosen is tied to another module, and tied=False; "
            f"the linear layers are {names_of(places)}"
        )
    return chosen, skipped
