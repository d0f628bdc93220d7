"""optax transformations with the learning rates of the structures."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx

from structlin_nn._patterns import Pattern, alike, listed
from structlin_nn._rates import (
    Fans,
    ParameterRule,
    Place,
    check_arguments,
    check_same_modules,
    dense_multiplier,
    factor_multipliers,
    settle,
)  # fmt: skip
from structlin_nn._text import table
from structlin_nn.flax._modules import named_modules, own_variables, variables
from structlin_nn.flax.linear import StructuredLinear

__all__ = ["ParameterRates", "ParameterRule", "optimizer_for", "parameter_rates", "scale_by_rates"]

_NORMS = (nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.BatchNorm, nnx.InstanceNorm)
_CONVOLUTIONS = (nnx.Conv, nnx.ConvTranspose)
_WITH_BIAS = (StructuredLinear, nnx.Linear, nnx.LinearGeneral, *_CONVOLUTIONS, *_NORMS)


@dataclass(frozen=True)
class ParameterRates:
    """Learning-rate multiplier and weight decay of every parameter of a model; ``print`` shows a table.

    Attributes
    ----------
    rules
        Rule of each parameter by full name; a shared parameter has several names.
    sizes
        Number of elements by name, with one name for each parameter.
    """

    rules: Mapping[str, ParameterRule]
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        rows: dict[tuple[float, bool, str], list[int]] = {}
        for name, size in self.sizes.items():
            rule = self.rules[name]
            rows.setdefault((rule.multiplier, rule.decay, alike(name)), []).append(size)
        cells = []
        for (multiplier, decay, pattern), sizes in rows.items():
            decayed = "yes" if decay else "no"
            cells.append((f"{multiplier:.6g}", decayed, f"{len(sizes):,}", f"{sum(sizes):,}", pattern))
        return table(("multiplier", "decay", "tensors", "parameters", "names"), cells, left=-1, rule=False)

    def of(self, tree: Any) -> Any:
        """Return the rules as a tree with the structure of a state."""
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        names = [_name(path) for path, _ in paths]
        if missing := [name for name in names if name not in self.rules]:
            raise ValueError(
                f"no rule covers the parameters {listed(missing)}; create the rules from the model that has them"
            )
        return jax.tree_util.tree_unflatten(structure, [self.rules[name] for name in names])


def parameter_rates(
    model: nnx.Module, base_model: nnx.Module | None = None, *, optimizer: str = "adamw", structure_aware: bool = True,
    extra_multipliers: Mapping[Pattern, float] | None = None, rules: Mapping[Pattern, ParameterRule] | None = None,
    decay: Collection[str] = ("factor", "weight"),
) -> ParameterRates:  # fmt: skip
    """Return the multiplier and the weight decay of every ``nnx.Param`` of a model.

    The rules and the kinds of parameters are those of :func:`structlin_nn.torch.parameter_groups`. The weights of dense
    layers are the kernels of ``nnx.Linear``, ``nnx.LinearGeneral`` (whose fan-in is the product of its input axes),
    ``nnx.Conv`` and ``nnx.ConvTranspose``.

    Parameters
    ----------
    model
        The model to train.
    base_model
        The same model at base width. Only sizes are read, so ``nnx.eval_shape`` of its constructor is sufficient.
    optimizer
        ``adam``, ``adamw``, ``sgd`` or ``sign``.
    structure_aware, extra_multipliers, rules, decay
        As for :func:`structlin_nn.torch.parameter_groups`.

    Examples
    --------
    >>> def make(width, structure, **options):
    ...     rngs = nnx.Rngs(0)
    ...     first = StructuredLinear(width, width, structure=structure, rngs=rngs, **options)
    ...     return nnx.Sequential(first, nnx.relu, nnx.Linear(width, 10, rngs=rngs))
    >>> model = make(64, "low_rank", rank=4)
    >>> base = nnx.eval_shape(lambda: make(32, "dense"))
    >>> print(parameter_rates(model, base))
    multiplier  decay  tensors  parameters  names
             1     no        2          74  layers.*.bias
          0.25    yes        1         256  layers.*.factors.*
             4    yes        1         256  layers.*.factors.*
           0.5    yes        1         640  layers.*.kernel
    """
    check_arguments(0.0, 0.0, optimizer, decay, False)
    bases = None if base_model is None else _leaves(base_model)
    leaves = _leaves(model)
    if bases is not None:
        check_same_modules(leaves, bases, _same_kind)

    places = (
        place
        for layer, module in leaves.items()
        for place in _places(layer, module, module if bases is None else bases[layer], optimizer, structure_aware)
    )
    settled = settle(places, dict(extra_multipliers or {}), dict(rules or {}), decay)
    held = {name: variable for name, variable in variables(model).items() if isinstance(variable, nnx.Param)}
    first = {id(variable): name for name, variable in reversed(held.items())}
    sizes = {name: math.prod(variable.shape) for name, variable in held.items() if first[id(variable)] == name}
    return ParameterRates({name: settled[id(variable)][1] for name, variable in held.items()}, sizes)


def scale_by_rates(rates: ParameterRates) -> optax.GradientTransformation:
    """Return an optax transformation that multiplies the update of each parameter by its learning-rate multiplier.

    Place it after the transformation that normalises the update (``optax.scale_by_adam``) and before
    ``optax.scale_by_learning_rate``.

    Examples
    --------
    >>> model = nnx.Sequential(StructuredLinear(8, 8, structure="low_rank", rank=2, rngs=nnx.Rngs(0)))
    >>> rates = parameter_rates(model)
    >>> tx = optax.chain(optax.scale_by_adam(), scale_by_rates(rates), optax.scale_by_learning_rate(1e-3))
    >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    """

    def init(params: Any) -> optax.EmptyState:
        rates.of(params)
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        return jax.tree.map(lambda rule, u: rule.multiplier * u, rates.of(updates), updates), state

    return optax.GradientTransformation(init, update)


def optimizer_for(
    model: nnx.Module, base_model: nnx.Module | None = None, *, lr: float | Callable[[Any], Any],
    weight_decay: float = 0.0, optimizer: str = "adamw", structure_aware: bool = True,
    extra_multipliers: Mapping[Pattern, float] | None = None, rules: Mapping[Pattern, ParameterRule] | None = None,
    decay: Collection[str] = ("factor", "weight"), independent_decay: bool = False,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, momentum: float = 0.0, nesterov: bool = False,
) -> optax.GradientTransformation:  # fmt: skip
    """Return an optax optimiser for a model, with the learning rates of the structures.

    Its steps equal those of the optimisers of torch with :func:`structlin_nn.torch.parameter_groups`. For ``adamw`` and
    ``sign``, each step shrinks a parameter by ``lr * multiplier * weight_decay``. For ``adam`` and ``sgd``, the decay
    is added to the gradient.

    Parameters
    ----------
    model, base_model, structure_aware, extra_multipliers, rules, decay
        As for :func:`parameter_rates`.
    lr
        Learning rate at base width, or an optax schedule.
    weight_decay, independent_decay
        As for :func:`structlin_nn.torch.parameter_groups`.
    optimizer
        ``adam``, ``adamw``, ``sgd``, or ``sign`` (Lion).
    betas, eps
        Options of Adam, the former also of Lion.
    momentum, nesterov
        Options of SGD.

    Examples
    --------
    >>> model = nnx.Sequential(StructuredLinear(8, 8, structure="low_rank", rank=2, rngs=nnx.Rngs(0)))
    >>> schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, warmup_steps=10, decay_steps=100)
    >>> optimizer = nnx.Optimizer(model, optimizer_for(model, lr=schedule, weight_decay=0.1), wrt=nnx.Param)
    """
    check_arguments(_known(lr), _known(weight_decay), optimizer, decay, independent_decay)
    if optimizer != "sgd" and (momentum or nesterov):
        raise ValueError(f"momentum={momentum} and nesterov={nesterov} need optimizer='sgd', got {optimizer!r}")
    if not 0 <= momentum < 1 or (nesterov and not momentum):
        raise ValueError(f"momentum must lie in [0, 1), and above 0 with nesterov, got {momentum}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    rates = parameter_rates(
        model, base_model, optimizer=optimizer, structure_aware=structure_aware, extra_multipliers=extra_multipliers,
        rules=rules, decay=decay,
    )  # fmt: skip
    decayed = [_add_decay(rates, weight_decay, independent_decay)] if _is_traced(weight_decay) or weight_decay else []
    first, second = betas
    steps = {
        "adam": [*decayed, optax.scale_by_adam(first, second, eps)],
        "adamw": [optax.scale_by_adam(first, second, eps), *decayed],
        "sign": [optax.scale_by_lion(first, second), *decayed],
        "sgd": [*decayed, *([optax.trace(momentum, nesterov)] if momentum else [])],
    }[optimizer]
    return optax.chain(*steps, scale_by_rates(rates), optax.scale_by_learning_rate(lr))


def _is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def _known(value: Any) -> Any:
    """Return a rate or a decay as a number; 0 for a schedule, and for a traced one (``optax.inject_hyperparams``)."""
    if callable(value) or _is_traced(value):
        return 0.0
    return value.item() if isinstance(value, jax.Array) and value.ndim == 0 else value


def _add_decay(rates: ParameterRates, weight_decay: float, independent: bool) -> optax.GradientTransformation:
    def coefficient(rule: ParameterRule) -> float:
        if not rule.decay:
            return 0.0
        return weight_decay / rule.multiplier if independent and rule.multiplier else weight_decay

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, optax.EmptyState]:
        if params is None:
            raise ValueError("weight decay needs the parameters; call update(gradients, state, params)")
        return jax.tree.map(lambda rule, u, p: u + coefficient(rule) * p, rates.of(updates), updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _name(path: tuple[Any, ...]) -> str:
    """Return the full name of a parameter from its path in a state of variables or of arrays."""
    keys = [getattr(part, "key", getattr(part, "idx", None)) for part in path]
    return ".".join(str(key) for key in keys if key is not None)


def _leaves(model: nnx.Module) -> dict[str, nnx.Module]:
    """Yield the modules that own parameters, by every name; a structured layer counts as one, without its lists."""
    found: dict[str, nnx.Module] = {}
    inside: set[int] = set()
    for place in named_modules(model):
        if isinstance(place.module, StructuredLinear):
            inside |= {id(place.module.factors), id(place.module.gains)}
            found[place.name] = place.module
        elif id(place.module) not in inside and any(map(_is_param, own_variables(place.module).values())):
            found[place.name] = place.module
    return found


def _is_param(variable: nnx.Variable) -> bool:
    return isinstance(variable, nnx.Param)


def _places(layer: str, module: nnx.Module, base: nnx.Module, optimizer: str, structure_aware: bool) -> Iterator[Place]:
    """Yield the parameters of a module from :func:`_leaves`, with their rules."""
    prefix = f"{layer}." if layer else ""
    fans, base_fans = _fans(module), _fans(base)

    def place(name: str, variable: nnx.Variable, kind: str | None, value: float | None) -> Place:
        described = f"{prefix}{name} {tuple(variable.shape)} of {type(module).__qualname__}"
        return Place(prefix + name, layer, id(variable), kind or "unknown", value, True, described)

    if isinstance(module, StructuredLinear):
        assert base_fans is not None
        values = factor_multipliers(module.structure, base_fans, optimizer, structure_aware)
        for number, (factor, value) in enumerate(zip(module.factors, values, strict=True)):
            yield place(f"factors.{number}", factor, "factor", value)
        for number, gain in enumerate(module.gains or ()):
            yield place(f"gains.{number}", gain, "gain", 1.0)
    for name, variable in own_variables(module).items():
        if not _is_param(variable):
            continue
        if name == "kernel" and fans is not None and base_fans is not None:
            yield place(name, variable, "weight", dense_multiplier(fans, base_fans, optimizer))
        else:
            kind = _kind(module, name, variable)
            yield place(name, variable, kind, 1.0 if kind else None)


def _fans(module: nnx.Module) -> Fans | None:
    """Return the fans of the kernel of a module, None without one; a structured layer has those of a dense layer."""
    if isinstance(module, StructuredLinear | nnx.Linear):
        return Fans(module.in_features, module.out_features)
    if isinstance(module, nnx.LinearGeneral):
        blocks = math.prod(module.batch_axis.values())
        return Fans(math.prod(module.in_features), math.prod(module.out_features), blocks)
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        groups = getattr(module, "feature_group_count", 1)
        positions = math.prod(module.kernel_size)
        return Fans(module.in_features // groups * positions, module.out_features // groups * positions, groups)
    return None


def _kind(module: nnx.Module, name: str, variable: nnx.Variable) -> str | None:
    """Return the kind of a parameter other than a weight; None if it may be a weight."""
    if isinstance(module, nnx.Embed):
        return "embedding"
    # Stacked layers have one more axis, so names, not shapes, determine the kind in known modules.
    if name == "bias" and (isinstance(module, _WITH_BIAS) or variable.ndim < 2):
        return "bias"
    if isinstance(module, _NORMS):
        return "norm"
    return "vector" if variable.ndim < 2 else None


def _same_kind(module: nnx.Module, base: nnx.Module) -> bool:
    same = isinstance(module, _CONVOLUTIONS) == isinstance(base, _CONVOLUTIONS)
    return same and (_fans(module) is None) == (_fans(base) is None)
