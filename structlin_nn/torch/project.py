"""Projection of trained dense networks to structured ones, and conversion to dense layers."""

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
from structlin_nn._patterns import Patterns
from structlin_nn._replacement import names_of
from structlin_nn.torch._modules import changed, check_model, dense_kind, places_of, put
from structlin_nn.torch._project_calibration import Forward, gather
from structlin_nn.torch._project_layers import Choice, LayerProjection, ProjectionReport, StructureOf, Task, dense_of
from structlin_nn.torch.linear import StructuredLinear
from structlin_nn.torch.replace import Selection, _check_is_called, _owners, as_structure, install, others_of, selected
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
    r"""Replace linear layers of a trained ``model``, in place, by the nearest layers of a structure.

    Linear layers are ``nn.Linear`` and the Conv1D of transformers. Each weight W is replaced by the nearest matrix A of
    the structure (:func:`structlin.project`). Bias, dtype, device, training mode and ``requires_grad`` do not change.
    Weights in half precision are projected in float64 and rounded once. All layers are projected before the first one
    is replaced.

    With ``calibration``, the nearest matrix minimises the error of the outputs of the layer,
    :math:`\mathrm{E} \|(W - A) x\|^2`, where x are the inputs of the layer in the dense model. Their second moments are
    computed in one pass in evaluation mode, as one (d_in, d_in) float64 matrix for each selected layer. Activations are
    not stored.

    A layer stays dense if its structured form would cost at least as much. The report lists these layers.

    **Choice of the forms.** Without ``target_error`` and budget, ``options`` determine the form, with the defaults of
    the structure. Otherwise each layer gets its own rank. For a structure without ranks it gets its own number of
    blocks, a power of 2, which for Monarch divides the inner size. A budget is allocated so that the sum of the squared
    relative errors over the layers is small (errors of the outputs, with calibration); the allocation is optimal except
    for its last step. One decomposition for each layer gives the errors of low rank, and without calibration those of
    Tensor-Train and Block Tensor-Train with two cores. For other structures a few sweeps compute each error, at ranks
    that grow by factors of 1.5.

    Parameters
    ----------
    model
        Any module that contains linear layers.
    structure
        Name of a registered structure, a structure, if all layers have its shape, or a function that takes name and
        layer and returns a structure. ``target_error`` and budgets need a name.
    calibration
        Batches of inputs. A tensor is the only argument of the model, a tuple or list contains the positional
        arguments, a mapping the keyword arguments. A few thousand vectors for each layer suffice.
    forward
        Function ``forward(model, batch)`` that runs a batch. For a loader of (images, labels): ``lambda model, batch:
        model(batch[0])``.
    layers, exclude
        Selection of layers: presets, patterns and predicates as in :func:`replace_linear`.
    tied
        Replace layers that share their weight or bias with another module, which unties them. By default they are not
        replaced, so a head that is tied to its embedding stays.
    target_error
        Give each layer the cheapest form whose relative error is at most this value (with calibration, weighted by the
        damped second moments).
    max_macs, mac_fraction
        Budget of MACs of all selected layers, for one vector at each place of a layer; or the budget as a fraction, in
        (0, 1], of the MACs before projection.
    max_params, param_fraction
        Budget of the parameters of all selected layers, without biases and gains. Those of a module that is used at
        several places count once.
    damping
        Fraction of the mean square of the inputs of a layer that is added to its second moments in all directions. It
        limits the error in directions that do not occur in the calibration data.
    rms_cap, gain, rule
        As in :class:`StructuredLinear`. Gains are set so that the capped factors have the values of the projection.
        Without gains, a factor beyond its cap is an error.
    restarts, max_sweeps, tolerance, seed
        Options of the iteration for structures without a closed form, as in :func:`structlin.project`.
    unpack
        Also replace layers in experts of transformers and in ``nn.MultiheadAttention``, as in :func:`replace_linear`.
        All experts of a layer get the same form. ``target_error`` holds for each expert, budgets of parameters count
        all experts, and budgets of MACs one. An expert that the calibration data do not reach gets the second moments
        of the others, and the report names it.
    **options
        Options of the named structure.

    Returns
    -------
    ProjectionReport
        For each layer its form, the relative errors of weight and outputs, and parameters and MACs before and after.

    Raises
    ------
    ValueError
        If no layer is selected or can be replaced (:func:`replace_linear`), a pattern matches no layer, more than one
        of rank, ``target_error`` and a budget are given, the budget is too small for the cheapest forms, the structure
        does not accept the options or sizes (the message names the layer), the given form saves nothing in any layer, a
        weight is on the meta device or not finite, or the calibration data are empty, not finite, or do not reach a
        layer. If some of several layers cannot be replaced, they stay dense, and the report states the reason.
    TypeError
        If ``structure`` or a pattern has a wrong type.

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
        structure, options, target_error=target_error, max_macs=max_macs, mac_fraction=mac_fraction,
        max_params=max_params, param_fraction=param_fraction,
    )  # fmt: skip
    settings = Settings(restarts, max_sweeps, tolerance, seed)
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping must be a number of at least 0, got {damping!r}")
    if forward is not None and calibration is None:
        raise ValueError("forward runs batches of calibration, which is missing; give both or neither")
    if isinstance(calibration, torch.Tensor | np.ndarray):
        raise TypeError(
            f"calibration must be an iterable of batches, got an array of shape {tuple(calibration.shape)}, whose rows "
            "would be batches; pass [calibration]"
        )
    with unpacked(model, unpack) as restore:
        chosen, skipped = _chosen(model, layers, exclude, tied)
        tasks = choice.prepare([Task(linear, names) for linear, names in chosen.items()], skipped)
        notes: dict[str, None] = {}
        if calibration is not None:
            moments = gather(model, {task.linear: task.names[0] for task in tasks}, calibration, forward, notes)
            for task in tasks:
                task.moments = moments[task.linear].numpy()
        lines = choice.run(tasks, damping, settings, {"rms_cap": rms_cap, "gain": gain, "rule": rule})
        notes |= install(model, {task.linear: task.new for task in tasks if task.new is not None}, chosen)
        restore()
        changed(model)
        if isinstance(structure, str) and not choice.by_layer and not options:
            errors = [line.weight_error if line.output_error is None else line.output_error for line in lines]
            warnings.warn(
                f"with the default options of {structure} the layers have relative errors of up to "
                f"{max(errors):.2f}; give an option such as rank, target_error, or a budget such as mac_fraction=0.5",
                stacklevel=2,
            )
        budget = {"max_macs" if choice.unit == "MACs" else "max_params": choice.budget}
        return ProjectionReport(tuple(lines), tuple(skipped), tuple(notes), **budget)


def to_dense_linear(model: nn.Module) -> tuple[str, ...]:
    """Replace every :class:`StructuredLinear` in ``model``, in place, by an ``nn.Linear`` that computes the same.

    A layer that replaced a Conv1D of transformers or a convolution becomes one again, so that files fit the model.
    The weight is computed in float64, with caps and gains, and rounded once to the dtype of the factors. Bias, device
    and training mode do not change. The weight requires a gradient if any factor does. A module that is used at several
    places is replaced by one layer. Experts and attention that were unpacked are packed again. All checks precede the
    first replacement.

    Parameters
    ----------
    model
        Any module that contains structured layers.

    Returns
    -------
    tuple of str
        Names of the replaced layers, in the order in which the model registers them.

    Raises
    ------
    ValueError
        If there are no structured layers, the model itself is one, a layer has hooks, parametrizations or shared
        parameters, which would be lost, or its values are on the meta device or not finite.

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
    places = places_of(model, lambda module: isinstance(module, StructuredLinear))
    if not places:
        raise ValueError("the model has no structured layers")
    owners = _owners(model)
    made = {}
    for layer, names in places.items():
        inside = tuple(f"{name}." for name in names)
        others = [o for p in layer.parameters() for o in owners[p] if not o.startswith(inside)]
        if others:
            raise ValueError(f"layer {names[0]!r} shares {', '.join(others)}; its replacement would untie them")
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
    new: Any = dense_kind(layer, weight)
    new.weight.requires_grad_(any(f.requires_grad for f in layer.factors))
    if layer.bias is not None:
        new.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=layer.bias.requires_grad)
    return new.train(layer.training)


def _chosen(
    model: nn.Module, layers: Selection, exclude: Patterns, tied: bool
) -> tuple[Mapping[nn.Module, tuple[str, ...]], list[tuple[str, str]]]:
    """Return the layers to project with their names, and the other selected layers with the reason."""
    places, selection = selected(model, layers, exclude)
    owners = _owners(model)
    chosen, skipped, errors = {}, [], []
    for linear, names in selection.items():
        try:
            _check_is_called(model, names, linear)
        except ValueError as error:
            errors.append(error)
            skipped.append((names[0], str(error)))
            continue
        if (others := others_of(linear, names, owners)) and not tied:
            skipped.append((names[0], f"tied to {', '.join(others)}"))
            continue
        chosen[linear] = names
    if not chosen and errors:
        raise errors[0]
    if not chosen:
        raise ValueError(
            f"all selected layers are tied to other modules; pass tied=True to untie them, or select "
            f"others; the linear layers are {names_of(places)}"
        )
    return chosen, skipped
