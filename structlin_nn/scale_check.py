"""Coordinate check of features and their updates across widths.

In a correct parametrisation, the outputs of every layer have the same size at initialisation, and the same change in
each step, at every width (Yang and Hu, *Tensor Programs V*, 2022; for structured layers Qiu et al., *Compute Better
Spent*, ICML 2024, figure 2a). :func:`check_scale` trains a model for a few steps at several widths on fixed random
inputs and classes, and fits the slopes of both on logarithmic axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from structlin_nn._text import check_integer, check_known, unknown
from structlin_nn.models import MODELS, StructureConfig, base_model, build_model
from structlin_nn.models.named import FORMS, example_inputs, open_named, own_function, parts_of, set_structure
from structlin_nn.torch import Muon, ParameterRule, StructuredExperts, StructuredLinear, parameter_groups
from structlin_nn.torch.unpack import ExpertLayers

__all__ = ["CHECK_SIZES", "RATES", "THRESHOLD", "LayerScale", "ScaleCheck", "builder_of", "check_scale"]

THRESHOLD = 0.33
"""Largest absolute slope of a flat layer: a factor of 2.5 over a factor of 16 in width. Wrong rules have slopes of a
half or more in theory. Slopes are less clear for small widths, few seeds, and ranks that are roots of the width."""
RATES = {"adam": 1e-3, "adamw": 1e-3, "sgd": 0.05, "muon": 0.02}
"""Learning rates at base width, so small that changes are linear in them. Muon's other parameters have Adam's rate."""
_OPTIMIZERS: dict[str, Any] = {
    "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "muon": Muon,
}  # fmt: skip
_LAYERS = (StructuredLinear, ExpertLayers, nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)

Made = nn.Module | tuple[nn.Module, Any]
Builder = Callable[[int], Made]


@dataclass(frozen=True)
class LayerScale:
    """The outputs of one layer, by width.

    Attributes
    ----------
    initial, change
        RMS at initialisation for each width, 0 for a layer that starts at zero; and RMS of the difference from
        initialisation, for each step and each width.
    initial_slope, change_slope
        Slopes over the width, on logarithmic axes, of the initial values and of the change after the last step; None if
        a value is 0.
    verdict
        ``flat``, ``grows`` or ``vanishes``, of the change; ``starts growing`` if the change is flat and the initial
        outputs grow; ``fixed`` if nothing changes at any width.
    """

    name: str
    initial: tuple[float, ...]
    change: tuple[tuple[float, ...], ...]
    initial_slope: float | None
    change_slope: float | None
    verdict: str


@dataclass(frozen=True)
class ScaleCheck:
    """The result of :func:`check_scale`: the layers and the settings."""

    model: str
    widths: tuple[int, ...]
    base_width: int
    optimizer: str
    lr: float
    steps: int
    seeds: int
    structure_aware: bool
    threshold: float
    layers: tuple[LayerScale, ...] = field(default=())

    @property
    def passed(self) -> bool:
        """Whether every layer that changes is flat."""
        return all(layer.verdict in ("flat", "fixed") for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as values that ``json.dumps`` takes."""
        return asdict(self) | {"passed": self.passed}


def check_scale(
    build: Builder, *, widths: Sequence[int], base: nn.Module, base_width: int, model: str = "",
    optimizer: str = "adam", lr: float | None = None, steps: int = 4, seeds: int = 3, batch_size: int = 32,
    structure_aware: bool = True, extra_multipliers: Mapping[Any, float] | None = None,
    rules: Mapping[Any, ParameterRule] | None = None, threshold: float = THRESHOLD,
) -> ScaleCheck:  # fmt: skip
    """Train at several widths for a few steps and measure every linear layer, convolution and embedding.

    The outputs of each layer are measured, and as ``NAME (input)`` the input of the last layer, which are the last
    hidden features. All widths must be above the number of input features: a layer from more features to fewer has
    initial outputs that grow with its width, also in a correct parametrisation. Inputs and classes are random, and the
    same at all widths. Values are geometric means over seeds of RMS over the batch and features. The loss is the
    cross-entropy of the last axis of the output.

    Parameters
    ----------
    build
        Function from a width to the model, drawn from torch's global generator, or to (model, inputs). Inputs may be
        left out if the model has ``example_input(batch)``, as :mod:`structlin_nn.models` do.
    widths
        Two or more widths, ascending.
    base, base_width, model
        The model at base width, which learning rates are relative to (:func:`structlin_nn.torch.parameter_groups`);
        that width, and the name of the model, for the report.
    optimizer
        ``adam``, ``adamw``, ``sgd`` or ``muon`` (:class:`structlin_nn.torch.Muon`).
    lr
        Learning rate at base width. None takes that of :data:`RATES`.
    steps, seeds, batch_size
        Numbers of steps, of seeds, and of samples.
    structure_aware, extra_multipliers, rules
        Arguments of ``parameter_groups``.
    threshold
        Largest absolute slope of a flat layer, see :data:`THRESHOLD`.

    Examples
    --------
    >>> build = lambda width: (nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3)), torch.ones(2, 8))
    >>> found = check_scale(build, widths=(16, 64), base=build(16)[0], base_width=16, seeds=1)
    >>> [layer.name for layer in found.layers], found.steps
    (['0', '2 (input)', '2'], 4)
    """
    _check(widths, optimizer, lr, threshold, steps=steps, seeds=seeds, batch_size=batch_size)
    rate = RATES[optimizer] if lr is None else lr
    rule: dict[str, Any] = {"structure_aware": structure_aware, "extra_multipliers": extra_multipliers, "rules": rules}
    runs: list[dict[str, list[float]]] = []  # by width and seed
    for width in widths:
        for seed in range(seeds):
            found = _run(build, width, base, seed, optimizer, rate, steps, batch_size, rule)
            if runs and found.keys() != runs[0].keys():
                raise ValueError(
                    f"the layers at width {width} are {', '.join(found)}, and at {widths[0]} {', '.join(runs[0])}"
                )
            runs.append(found)
    layers = []
    for name in runs[0]:
        rms = np.array([run[name] for run in runs]).T.copy().reshape(1 + steps, len(widths), seeds)
        with np.errstate(divide="ignore"):
            initial, *change = np.exp(np.log(rms).mean(-1)).tolist()  # geometric means over seeds
        slopes = _slope(widths, initial), _slope(widths, change[-1])
        verdict = _verdict(*slopes, change[-1], threshold)
        layers.append(LayerScale(name, tuple(initial), tuple(map(tuple, change)), *slopes, verdict))
    return ScaleCheck(
        model, tuple(widths), base_width, optimizer, rate, steps, seeds, structure_aware, threshold, tuple(layers)
    )


def _check(widths: Sequence[int], optimizer: str, lr: float | None, threshold: float, **counts: int) -> None:
    if len(widths) < 2 or list(widths) != sorted(set(widths)) or widths[0] < 1:
        raise ValueError(f"widths must be two or more positive numbers in ascending order, got {tuple(widths)}")
    check_known("optimizer", optimizer, RATES)
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold must be positive and finite, got {threshold}")
    for name, value in counts.items():
        check_integer(name, value)


def _run(
    build: Builder, width: int, base: nn.Module, seed: int, optimizer: str, lr: float, steps: int, batch_size: int,
    rule: Mapping[str, Any],
) -> dict[str, list[float]]:  # fmt: skip
    """Return, for each layer, the RMS of its outputs at initialisation, and of their change after each step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs = with_inputs(build(width), batch_size, width)
    model.train(False)  # without dropout, the same inputs give the same outputs
    trained = [(m, p) for m in model.modules() for p in m.parameters(recurse=False) if p.requires_grad]
    mixed = optimizer == "muon" and any(p.ndim < 2 or isinstance(m, nn.Embedding) for m, p in trained)
    more: dict[str, Any] = {"adam_lr": RATES["adam"]} if mixed else {}
    groups = parameter_groups(model, base, lr=lr, optimizer=optimizer, **rule, **more)
    updates = _OPTIMIZERS[optimizer](groups, lr=lr)
    with _outputs(model) as noted:
        logits = logits_of(model, inputs)
        generator = torch.Generator().manual_seed(seed)
        targets = torch.randint(logits.shape[-1], logits.shape[:-1], generator=generator)
        before = dict(noted)
        found = {name: [rms_of(x)] for name, x in before.items()}
        for _ in range(steps):
            updates.zero_grad()
            F.cross_entropy(logits.flatten(0, -2), targets.flatten()).backward()
            updates.step()
            logits = logits_of(model, inputs)
            for name, x in before.items():
                found[name].append(rms_of(noted[name] - x))
    for name, values in found.items():
        if not all(map(math.isfinite, values)):
            raise ValueError(f"the outputs of {name} are not finite at width {width} and rate {lr:g}; try a lower lr")
    return found


def with_inputs(built: Made, batch_size: int, width: int) -> tuple[nn.Module, Any]:
    """Return a model and its inputs: those that it was built with, or random ones of the shape that it takes."""
    model, inputs = parts_of(built, "the builder")
    if inputs is not None:
        return model, inputs
    try:
        inputs = example_inputs(model, batch_size)
    except ValueError as error:
        raise ValueError(f"the model at width {width} states no inputs ({error}); return (model, inputs)") from error
    # A generator of their own makes inputs independent of the model's draws.
    generator = torch.Generator().manual_seed(1)
    if inputs.is_floating_point():
        return model, torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype)
    vocabulary = next(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    return model, torch.randint(vocabulary, inputs.shape, generator=generator)


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Return the logits of a model for inputs: a tensor, a tuple of arguments, or a dictionary of keywords."""
    named, given = (inputs, ()) if isinstance(inputs, dict) else ({}, inputs)
    output = model(*(given if isinstance(given, tuple) else (given,)), **named)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        kind = type(output).__name__
        raise TypeError(f"the model must return logits (batch, ..., classes), or an object with logits, got {kind}")
    return logits


@contextmanager
def _outputs(model: nn.Module) -> Any:
    """Collect the last output of every called layer, by name."""
    noted: dict[str, Tensor] = {}
    # The rows of a layer of experts are sorted by expert, which can change in a step. Those of all layers are not.
    layers = [
        (name, module) for name, module in model.named_modules()
        if isinstance(module, _LAYERS) and not isinstance(module, StructuredExperts)
    ]  # fmt: skip
    if not layers:
        raise ValueError("the model has no linear layer, convolution or embedding to measure")

    def note(name: str, _: nn.Module, inputs: Any, output: Tensor) -> None:
        if name == layers[-1][0]:
            noted[f"{name} (input)"] = inputs[0].detach()
        noted[name] = output.detach()

    with ExitStack() as stack:
        for name, module in layers:
            stack.callback(module.register_forward_hook(partial(note, name)).remove)
        yield noted


def rms_of(x: Tensor) -> float:
    """Return the root of the mean square of all entries, in float64."""
    return float(x.double().square().mean().sqrt())


def _slope(widths: Sequence[int], values: Sequence[float]) -> float | None:
    if not all(values):
        return None
    return float(np.polynomial.polynomial.polyfit(np.log(widths), np.log(values), 1)[1])


def _verdict(initial: float | None, change: float | None, last: Sequence[float], threshold: float) -> str:
    if not any(last):
        return "fixed"
    if change is None:
        return "vanishes"
    if abs(change) > threshold:
        return "grows" if change > 0 else "vanishes"
    return "starts growing" if initial is not None and initial > threshold else "flat"


_IMAGES = {"input_shape": (3, 4, 4)}
_PATCHES = {"input_shape": (3, 8, 8), "patch": 4, "depth": 2, "heads": 2}
CHECK_SIZES: dict[str, dict[str, Any]] = {
    "cifar-mlp": {**_IMAGES, "depth": 2}, "cifar-vit": _PATCHES, "imagenet-vit": {**_PATCHES, "num_classes": 10},
    "gpt2": {"vocabulary": 48, "context": 8, "depth": 2, "heads": 2},
}  # fmt: skip
"""Sizes of the named models in a check. They have fewer input features than any sensible width."""


def builder_of(
    name: str, *, base_width: int | None = None, structure: StructureConfig | None = None,
    width_option: str | None = None, model_options: Mapping[str, Any] | None = None, **sizes: Any,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments of :func:`check_scale` for a model by its name.

    Parameters
    ----------
    name
        One of :data:`structlin_nn.models.MODELS`; ``package.module:function``, whose function takes a width and returns
        a model, or (model, inputs); ``timm:NAME`` or ``hf:CONFIG`` (:mod:`structlin_nn.models.named`).
    base_width
        Width at which learning rates are tuned. The base is the model at that width, without the structure. None: the
        paper's, for a named model.
    structure
        Structure of the linear layers. None leaves the model as it is.
    width_option
        For ``timm:NAME`` and ``hf:CONFIG``, the argument that sets the width, such as ``embed_dim`` or ``n_embd``.
    model_options
        Further arguments of the model, of its configuration, or of the function.
    **sizes
        Sizes of a named model (:func:`structlin_nn.models.build_model`), by default :data:`CHECK_SIZES`.

    Examples
    --------
    >>> sorted(builder_of("cifar-mlp"))
    ['base', 'base_width', 'build', 'extra_multipliers', 'model']
    """
    if ":" not in name:
        if name not in MODELS:
            raise ValueError(unknown("model", name, MODELS, f"or {FORMS}"))
        if width_option or model_options:
            raise ValueError(f"width_option and model_options are for models by {FORMS}; {name} is a named model")
        sizes = {**CHECK_SIZES[name], **sizes}
        small = base_model(name, base_width, **sizes)
        return {
            "build": lambda width: build_model(name, width=width, structure=structure, **sizes), "base": small,
            "base_width": small.config.width, "extra_multipliers": MODELS[name].extra_multipliers, "model": name,
        }  # fmt: skip
    if sizes:
        raise ValueError(f"{next(iter(sizes))} is a size of the named models ({', '.join(MODELS)}), not of {name}")
    if base_width is None:
        raise ValueError(f"{name} needs base_width, the width at which its learning rate was tuned")
    if name.startswith(("timm:", "hf:")) != (width_option is not None):
        raise ValueError(
            f"{name} needs width_option, the argument that sets its width" if width_option is None
            else f"width_option is for timm:NAME and hf:CONFIG; {name} is called with the width"
        )  # fmt: skip
    further = dict(model_options or {})

    def dense(width: int) -> Made:
        if width_option is not None:
            return open_named(name, device=None, **{width_option: width}, **further)
        return own_function(name)(width, **further)

    def build(width: int) -> Made:
        made = dense(width)
        if structure is not None:
            set_structure(parts_of(made, name)[0], structure)
        return made

    with torch.random.fork_rng(devices=[]):
        base, _ = parts_of(dense(base_width), name)
    return {"build": build, "base": base, "base_width": base_width, "extra_multipliers": None, "model": name}
