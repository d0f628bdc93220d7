"""Parameter groups for torch optimisers, with the learning rates that the structure asks for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

import structlin
from structlin.scale import OPTIMIZERS
from structlin_nn.torch.linear import StructuredLinear

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class _Rule:
    name: str
    parameter: nn.Parameter
    multiplier: float
    decay: bool


def parameter_groups(
    model: nn.Module,
    base_model: nn.Module | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    structure_aware: bool = True,
    extra_multipliers: Mapping[str, float] | None = None,
    multipliers: Mapping[str, float] | None = None,
    independent_decay: bool = False,
) -> list[dict[str, Any]]:
    """Groups of parameters by learning rate and weight decay, ready for a torch optimiser.

    Every trainable parameter gets ``lr`` times a multiplier: the factors of structured layers that of
    :func:`structlin.lr_multipliers`; the weights of ``nn.Linear`` and of convolutions that of a dense layer of the
    same fan-in; biases, norms, gains, embeddings and all other vectors and scalars 1. Frozen parameters are left out.

    Args:
        model: the model to train.
        base_model: the same model at the width at which ``lr`` was tuned (the meta device will do), with layers of
            the same names; None: every layer is its own base, so that dense layers have multiplier 1.
        lr: base learning rate.
        weight_decay: coefficient for weights and factors; biases, norms, gains, embeddings, vectors and scalars are
            not decayed. AdamW and SGD multiply it by the learning rate of the group.
        optimizer: ``adam``, ``adamw``, ``sign`` (Lion, signSGD) or ``sgd``: whose rule to use.
        structure_aware: False gives every factor of a layer the multiplier of the dense layer (the naive rule).
        extra_multipliers: further factors for the weights (not the biases) of layers, by a pattern of the layer's
            name as in :mod:`fnmatch`, such as ``{"input": 0.1}``.
        multipliers: multipliers of parameters that no rule covers, or in place of their rule, by a pattern of the
            parameter's name, such as ``{"pos_embed": 1.0}``; they are not decayed.
        independent_decay: divide the decay coefficient by the multiplier, so that decay is ``lr * weight_decay`` in
            every group.

    Returns:
        Dictionaries with ``params``, ``lr``, ``weight_decay``, and for the reader ``multiplier`` and ``names``.

    Raises:
        ValueError: a parameter of two or more axes that no rule covers, a layer that the base model lacks, a pattern
            that matches nothing, an unknown optimiser, or a negative rate or decay.

    >>> model = nn.Sequential(StructuredLinear(64, 64, structure="low_rank", rank=4), nn.ReLU(), nn.Linear(64, 10))
    >>> groups = parameter_groups(model, lr=0.1, weight_decay=0.01)
    >>> [(g["names"], g["lr"]) for g in groups]
    [(['0.factors.0'], 0.05), (['0.factors.1'], 0.8), (['0.bias', '2.bias'], 0.1), (['2.weight'], 0.1)]
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; one of {', '.join(OPTIMIZERS)}")
    if lr < 0 or weight_decay < 0:
        raise ValueError(f"lr and weight_decay must not be negative, got {lr} and {weight_decay}")
    fixed, extra = dict(multipliers or {}), dict(extra_multipliers or {})
    unused = {*fixed, *extra}
    base_layers = dict((model if base_model is None else base_model).named_modules(remove_duplicate=False))

    rules: dict[int, _Rule] = {}
    for layer_name, module in model.named_modules():
        if isinstance(module, nn.ParameterList):
            owner = model.get_submodule(layer_name.rpartition(".")[0])
            if isinstance(owner, StructuredLinear):
                continue
        factor = 1.0
        for pattern, value in extra.items():
            if fnmatchcase(layer_name, pattern):
                unused.discard(pattern)
                factor *= value
        for name, parameter, multiplier, decay in _layer_rules(
            layer_name, module, base_layers, optimizer, structure_aware, fixed, unused
        ):
            if not parameter.requires_grad:
                continue
            rule = _Rule(name, parameter, multiplier * (factor if decay else 1.0), decay)
            first = rules.setdefault(id(parameter), rule)
            if (first.multiplier, first.decay) != (rule.multiplier, rule.decay):
                raise ValueError(
                    f"the parameter shared by {first.name} and {name} has two rules, multipliers "
                    f"{first.multiplier:g} and {rule.multiplier:g}; give multipliers for both names"
                )

    if unused:
        raise ValueError(f"no layer or parameter matches {', '.join(map(repr, sorted(unused)))}")
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if missed := [name for key, name in trainable.items() if key not in rules]:
        raise ValueError(f"no learning-rate rule reached the parameters {', '.join(missed)}")
    assert len(trainable) == len(rules), "a parameter outside the model was given a rule"

    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for rule in rules.values():
        decay = (weight_decay / rule.multiplier if independent_decay else weight_decay) if rule.decay else 0.0
        group = groups.setdefault(
            (rule.multiplier, rule.decay),
            {
                "params": [],
                "lr": lr * rule.multiplier,
                "weight_decay": decay,
                "multiplier": rule.multiplier,
                "names": [],
            },
        )
        group["params"].append(rule.parameter)
        group["names"].append(rule.name)
    return list(groups.values())


def _layer_rules(
    layer_name: str,
    module: nn.Module,
    base_layers: Mapping[str, nn.Module],
    optimizer: str,
    structure_aware: bool,
    fixed: Mapping[str, float],
    unused: set[str],
) -> Iterator[tuple[str, nn.Parameter, float, bool]]:
    """(name, parameter, multiplier, is a weight) of the parameters that the module itself owns."""
    prefix = f"{layer_name}." if layer_name else ""
    weights: dict[str, float] = {}
    if isinstance(module, StructuredLinear):
        base_in, base_out = _base_fans(layer_name, module, base_layers)
        if structure_aware:
            values = structlin.lr_multipliers(
                module.structure, optimizer=optimizer, base_d_in=base_in, base_d_out=base_out
            )
        else:
            dense = _dense_multiplier(module.in_features, module.out_features, base_in, base_out, optimizer)
            values = (dense,) * len(module.structure.factors)
        kept = [v for v, f in zip(values, module.structure.factors, strict=True) if f.trainable]
        for number, (parameter, value) in enumerate(zip(module.factors, kept, strict=True)):
            yield f"{prefix}factors.{number}", parameter, value, True
        for number, gain in enumerate(module.gains or ()):
            yield f"{prefix}gains.{number}", gain, 1.0, False
    elif isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
        weights["weight"] = _dense_multiplier(*_fans(module), *_base_fans(layer_name, module, base_layers), optimizer)
    for name, parameter in module.named_parameters(recurse=False):
        matching = [pattern for pattern in fixed if fnmatchcase(prefix + name, pattern)]
        unused.difference_update(matching)
        if matching:
            yield prefix + name, parameter, fixed[matching[-1]], False
        elif name in weights:
            yield prefix + name, parameter, weights[name], True
        elif parameter.ndim < 2 or isinstance(module, nn.Embedding) or not parameter.requires_grad:
            yield prefix + name, parameter, 1.0, False
        else:
            raise ValueError(
                f"no learning-rate rule covers the parameter {prefix + name} of shape {tuple(parameter.shape)} "
                f"({type(module).__name__}); give its multiplier as multipliers={{{prefix + name!r}: ...}}"
            )


def _fans(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, StructuredLinear | nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, _CONVOLUTIONS):
        return module.weight[0].numel(), module.weight.shape[0] * module.weight[0, 0].numel()
    raise ValueError(f"a linear layer or a convolution is needed, got {type(module).__name__}")


def _base_fans(name: str, module: nn.Module, base_layers: Mapping[str, nn.Module]) -> tuple[int, int]:
    if name not in base_layers:
        raise ValueError(f"the base model has no layer {name!r}, which is a {type(module).__name__} in the model")
    try:
        return _fans(base_layers[name])
    except ValueError as error:
        raise ValueError(f"layer {name!r} of the base model: {error}") from None


def _dense_multiplier(d_in: int, d_out: int, base_in: int, base_out: int, optimizer: str) -> float:
    return (d_out / d_in) * (base_in / base_out) if optimizer == "sgd" else base_in / d_in


def format_groups(groups: list[dict[str, Any]]) -> str:
    """A table of parameter groups: multiplier, learning rate, decay, tensors, parameters and a few names.

    >>> print(format_groups(parameter_groups(nn.Linear(3, 2), lr=0.1)))
    multiplier   lr  decay  tensors  parameters  names
             1  0.1      0        1           6  weight
             1  0.1      0        1           2  bias
    """
    head = ("multiplier", "lr", "decay", "tensors", "parameters", "names")
    rows = [head]
    for g in groups:
        names = g["names"]
        shown = ", ".join(names[:3]) + (f", ... ({len(names) - 3} more)" if len(names) > 3 else "")
        count = sum(p.numel() for p in g["params"])
        numbers = (f"{g['multiplier']:.6g}", f"{g['lr']:.6g}", f"{g['weight_decay']:.6g}")
        rows.append((*numbers, str(len(names)), str(count), shown))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    return "\n".join("  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows)
