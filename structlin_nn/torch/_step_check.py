"""Check that an optimiser uses the learning rates of the model, when it steps.

Optimisers are created in many places: in scripts, by the Trainer of transformers, by timm. One hook on the steps of all
optimisers covers them. A factor with the rate of a dense weight raises no error, but it trains badly, so the hook
warns. It checks the parameters at the first step of an optimiser and after a replacement. At every other step it
compares one number for each group.
"""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from structlin_nn._patterns import listed
from structlin_nn._rates import Fans, factor_multipliers

SPREAD = 1e-3
"""Relative difference of rate / multiplier that counts as roundoff; a lost multiplier causes a larger one."""


class RatesWarning(UserWarning):
    """Warning that an optimiser does not use the learning rates of the model that it trains.

    If this is intended, ``warnings.simplefilter("ignore", RatesWarning)`` disables the warning.
    """


class _Seen:
    """State of the checks of one optimiser."""

    def __init__(self) -> None:
        self.epoch = -1
        self.steps = 0
        self.lost = False


_layers: weakref.WeakSet[Any] = weakref.WeakSet()
_replaced: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
_optimizers: weakref.WeakKeyDictionary[Optimizer, _Seen] = weakref.WeakKeyDictionary()
_epoch = 0
_hook: Any = None


def watch(layer: nn.Module) -> None:
    """Check the optimisers that update the factors of this structured layer."""
    global _hook
    _layers.add(layer)
    if _hook is None:
        _hook = register_optimizer_step_pre_hook(_before_step)


def replaced(parameters: Iterable[nn.Parameter]) -> None:
    """Record parameters that were removed from a model; an optimiser with such parameters was created too early."""
    global _epoch
    _epoch += 1
    _replaced.update((id(p), p) for p in parameters)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    seen = _optimizers.get(optimizer)
    if seen is None:
        seen = _optimizers.setdefault(optimizer, _Seen())
    if seen.epoch != _epoch:
        first, seen.epoch = seen.epoch < 0, _epoch
        _look(optimizer, first)
    seen.steps += 1
    if seen.steps == 2:  # in the second step, after each of several optimisers has made one
        _look_for_the_untrained(optimizer)
    if not seen.lost and (why := _spread(optimizer.param_groups)):
        seen.lost = True
        _warn(f"the learning rates of {type(optimizer).__name__} have lost the multipliers of their groups ({why}): a "
              "scheduler or the code has set the same rate for several groups. "
              "Create the scheduler with structlin_nn.torch.with_multipliers(scheduler, optimizer, ...)")  # fmt: skip


def _look(optimizer: Optimizer, first: bool) -> None:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    kind = type(optimizer).__name__
    stale = [p for key in groups if (p := _replaced.get(key)) is not None]
    if stale:
        _warn(f"{kind} was created before layers were replaced: {len(stale)} of its parameters, of shapes "
              f"{listed((str(tuple(p.shape)) for p in stale), most=3)}, no longer belong to the model, and the new "
              "layers are not trained. Create the optimiser after the replacement")  # fmt: skip
    without, foreign = 0, 0
    for layer in list(_layers):
        trainable = [p for p in layer.factors.parameters() if p.requires_grad]
        held = [groups[id(p)] for p in trainable if id(p) in groups]
        if any("multiplier" not in group for group in held) and not _is_plain(layer):
            without += 1
        foreign += any(_other_rule(optimizer, group) for group in held)
    if without:
        _warn(f"{kind} trains {_layers_of(without)} at the rate of dense weights. Create its groups with "
              "structlin_nn.torch.parameter_groups, which sets the rate of each factor "
              "(for the Trainer of transformers: trainer_optimizer, for timm: param_group_fn)")  # fmt: skip
    if foreign:
        rule = next(group["optimizer"] for group in groups.values() if _other_rule(optimizer, group))
        _warn(f"{kind} uses groups for the rule of {rule!r}; call parameter_groups with the rule of this optimiser "
              f"(optimizer={_rule_of(optimizer)!r})")  # fmt: skip
    if first:
        _ignored(optimizer)


def _look_for_the_untrained(optimizer: Optimizer) -> None:
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    all_held = {id(p) for one in list(_optimizers) for group in one.param_groups for p in group["params"]}
    missing = 0
    for layer in list(_layers):
        if any(id(p) in own for p in layer.parameters()):
            graded = [p for p in layer.factors.parameters() if p.requires_grad and p.grad is not None]
            missing += any(id(p) not in all_held for p in graded)
    if missing:
        _warn(f"{type(optimizer).__name__} has only some of the parameters of {_layers_of(missing)}, and no optimiser "
              "has the others, which are not trained")  # fmt: skip


def _layers_of(count: int) -> str:
    return f"{count} structured layer{'s' if count > 1 else ''}"


def _is_plain(layer: Any) -> bool:
    """Return whether all factors of a layer have the rate of the dense layer."""
    fans = Fans(layer.in_features, layer.out_features)
    return all(abs(m - 1) < 1e-6 for m in factor_multipliers(layer.structure, fans, "adamw", True))


def _rule_of(optimizer: Optimizer) -> str | None:
    """Return the rule for an optimiser, from the name of its class; None if not known."""
    name = type(optimizer).__name__.lower()
    if "muon" in name:
        return "muon"
    if "lion" in name or "signsgd" in name:
        return "sign"
    if "adam" in name:
        return "adamw"
    return "sgd" if name in ("sgd", "sgdw", "sgdp") else None


def _other_rule(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    made_for, own = group.get("optimizer"), _rule_of(optimizer)
    if made_for is None or own is None:
        return False
    like = {"adam": "adamw", "sign": "adamw"}  # sign and Adam have the same rule
    return like.get(made_for, made_for) != like.get(own, own)


def _ignored(optimizer: Optimizer) -> None:
    """Warn about a rate or decay that has no effect because the groups set it."""
    groups = [group for group in optimizer.param_groups if "multiplier" in group and "base_lr" in group]
    if not groups or len(groups) < len(optimizer.param_groups):
        return
    usual = inspect.signature(type(optimizer).__init__).parameters
    for name, own in (
        ("lr", {float(group["base_lr"]) for group in groups}),
        ("weight_decay", {float(group["weight_decay"]) for group in groups}),
    ):
        given = optimizer.defaults.get(name)
        default: Any = usual[name].default if name in usual else inspect.Parameter.empty
        if given is None or default is inspect.Parameter.empty or isinstance(given, Tensor):
            continue
        if float(given) != float(default) and float(given) not in own:
            _warn(f"{name}={given} of {type(optimizer).__name__} has no effect: the groups of parameter_groups have "
                  f"their own {name}. Pass it to parameter_groups")  # fmt: skip


def _spread(groups: Sequence[Mapping[str, Any]]) -> str:
    """Return a description of the rates that contradict their multipliers; "" if there are none."""
    found: dict[tuple[Any, bool], tuple[float, float]] = {}
    for group in groups:
        multiplier, rate = group.get("multiplier"), group["lr"]
        if not multiplier or isinstance(rate, Tensor):  # reading a tensor can wait for the device
            continue
        own = rate / multiplier
        # Calls of parameter_groups with other rates may share an optimiser; Muon and its Adam have one rate each.
        key = group.get("base_lr"), group.get("matrices", False) is None
        low, high = found.get(key, (math.inf, -math.inf))
        found[key] = min(low, own), max(high, own)
    for low, high in found.values():
        if high - low > SPREAD * abs(high):
            return f"lr / multiplier is between {low:.4g} and {high:.4g}"
    return ""


def _warn(text: str) -> None:
    warnings.warn(text, RatesWarning, stacklevel=2)
