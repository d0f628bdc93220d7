"""Learning-rate multipliers and weight decay of parameters by their kinds, the same for every framework."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlin
from structlin.scale import OPTIMIZERS
from structlin.structure import AbstractStructure
from structlin_nn._patterns import Pattern, listed, matches, show
from structlin_nn._text import check_known, read_value

KINDS = ("factor", "weight", "embedding", "bias", "norm", "gain", "vector")
"""Kinds of parameters: factors of structured layers; weights of dense layers and convolutions; embeddings; biases;
weights of normalisation layers; gains of capped factors; all others that have at most one axis."""


@dataclass(frozen=True)
class ParameterRule:
    """An explicit rule: learning-rate multiplier, and whether weight decay applies."""

    multiplier: float
    decay: bool = False

    def __post_init__(self) -> None:
        check_multiplier(self.multiplier, "a ParameterRule")
        if not isinstance(self.decay, bool):
            raise TypeError(f"decay must be True or False, got {self.decay!r}")


@dataclass(frozen=True)
class Fans:
    """Fans of a dense weight, and the number of independent blocks (groups of a convolution)."""

    fan_in: int
    fan_out: int
    blocks: int = 1


@dataclass(frozen=True)
class Place:
    """A parameter at one of its places; `parameter` is the same at all of them.

    `multiplier` is None if no rule covers the parameter, which `described` then describes.
    """

    name: str
    layer: str
    parameter: Hashable
    kind: str
    multiplier: float | None
    trainable: bool
    described: str


@dataclass
class _Found:
    """The rules of a parameter, by each of its names, and the extra multipliers that apply."""

    by_hand: dict[str, ParameterRule] = field(default_factory=dict)
    derived: dict[str, ParameterRule] = field(default_factory=dict)
    table: str | None = None  # the first name under which it is an embedding
    extra: dict[Pattern, None] = field(default_factory=dict)


def settle(
    places: Iterable[Place],
    extra: Mapping[Pattern, float],
    rules: Mapping[Pattern, ParameterRule],
    decay: Collection[str],
) -> dict[Hashable, tuple[str, ParameterRule]]:
    """Return a name and a rule for each trainable parameter; ValueError for none or several rules."""
    for pattern, value in extra.items():
        check_multiplier(value, f"extra_multipliers[{show(pattern)}]")
    for pattern, given in rules.items():
        if not isinstance(given, ParameterRule):
            raise TypeError(f"rules[{show(pattern)}] must be a ParameterRule, got {given!r}")
    found: dict[Hashable, _Found] = {}
    unused = {*extra, *rules}
    uncovered: dict[Hashable, str] = {}
    for place in places:
        by_hand = [pattern for pattern in rules if matches(pattern, place.name)]
        is_matrix = place.kind in ("factor", "weight", "embedding")
        factors = [p for p in extra if matches(p, place.name) or (is_matrix and matches(p, place.layer))]
        unused.difference_update(by_hand, factors)
        if not place.trainable:
            continue
        entry = found.setdefault(place.parameter, _Found())
        entry.extra |= dict.fromkeys(factors)
        if by_hand:
            entry.by_hand[place.name] = rules[by_hand[0]]
        elif place.multiplier is not None:
            entry.derived[place.name] = ParameterRule(place.multiplier, place.kind in decay)
            if place.kind == "embedding" and entry.table is None:
                entry.table = place.name
        else:
            uncovered[place.parameter] = place.described
    if missing := [what for parameter, what in uncovered.items() if not found[parameter].by_hand]:
        raise ValueError(
            f"no rule covers the parameters {listed(missing)}; pass rules={{pattern: ParameterRule(multiplier, "
            "decay)}, with multiplier 1 for embeddings and other parameters whose fan-in does not grow with the width"
        )
    if unused:
        raise ValueError(f"nothing matches {listed(map(show, unused))}")
    return {parameter: _one_rule(entry, extra) for parameter, entry in found.items()}


def _one_rule(entry: _Found, extra: Mapping[Pattern, float]) -> tuple[str, ParameterRule]:
    rules = entry.by_hand or entry.derived
    if rules is entry.derived and entry.table is not None:  # a head that is tied to it is an embedding too
        rules = {entry.table: rules[entry.table]}
    name, rule = next(iter(rules.items()))
    if any(other != rule for other in rules.values()):
        told = "; ".join(f"{n}: multiplier {r.multiplier:g}, decay {r.decay}" for n, r in rules.items())
        raise ValueError(
            f"a shared parameter has several rules ({told}); give one with rules={{{name!r}: ParameterRule(...)}}"
        )
    multiplier = math.prod((extra[pattern] for pattern in entry.extra), start=rule.multiplier)
    return name, ParameterRule(multiplier, rule.decay)


def dense_multiplier(fans: Fans, base: Fans, optimizer: str) -> float:
    """Return the multiplier of a dense weight, relative to the one at base width."""
    dense = structlin.design("dense", (fans.fan_out, fans.fan_in))
    (value,) = structlin.lr_multipliers(dense, optimizer=optimizer, base_d_in=base.fan_in, base_d_out=base.fan_out)
    return value * (fans.blocks / base.blocks) if optimizer == "sgd" else value


def factor_multipliers(
    structure: AbstractStructure, base: Fans, optimizer: str, structure_aware: bool
) -> tuple[float, ...]:
    """Return multipliers of the trainable factors; without ``structure_aware`` those of a dense layer."""
    trainable = [factor.trainable for factor in structure.factors]
    if not structure_aware:
        return (dense_multiplier(Fans(structure.d_in, structure.d_out), base, optimizer),) * sum(trainable)
    values = structlin.lr_multipliers(structure, optimizer=optimizer, base_d_in=base.fan_in, base_d_out=base.fan_out)
    return tuple(value for value, own in zip(values, trainable, strict=True) if own)


def check_arguments(
    lr: float, weight_decay: float, optimizer: str, decay: Collection[str], independent_decay: bool
) -> None:
    """Raise ValueError for unknown rates, optimisers and kinds, TypeError for rates that are not numbers."""
    check_known("optimizer", optimizer, OPTIMIZERS)
    check_number(lr, "lr")
    check_number(weight_decay, "weight_decay")
    if not (lr >= 0 and weight_decay >= 0):
        raise ValueError(f"lr and weight_decay must not be negative, got {lr} and {weight_decay}")
    if isinstance(decay, str) or (unknown := [kind for kind in decay if kind not in KINDS]):
        wrong = repr(decay) if isinstance(decay, str) else listed(map(repr, unknown))
        raise ValueError(f"decay must be a collection of {', '.join(KINDS)}, got {wrong}")
    if independent_decay and optimizer == "adam":
        raise ValueError(
            "independent_decay needs an optimizer that subtracts the decay from the parameter (adamw, sgd, sign); "
            "adam adds it to the gradient and then divides by the gradient's size"
        )


def check_same_modules(ours: Mapping[str, Any], theirs: Mapping[str, Any], same: Callable[[Any, Any], bool]) -> None:
    """Raise ValueError unless a model and its base model have modules of the same names and kinds."""
    if missing := [name for name in ours if name not in theirs]:
        raise ValueError(f"the base model lacks modules with parameters that the model has: {listed(missing)}")
    if surplus := [name for name in theirs if name not in ours]:
        raise ValueError(f"the base model has modules with parameters that the model lacks: {listed(surplus)}")
    for name, module in ours.items():
        if not same(module, theirs[name]):
            kinds = type(module).__qualname__, type(theirs[name]).__qualname__
            raise ValueError(f"module {name!r} is a {kinds[0]} in the model and a {kinds[1]} in the base model")


def check_number(value: Any, name: str) -> None:
    """Raise TypeError unless ``value`` is a real number."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        number = read_value(value) if isinstance(value, str) else None
        hint = f"; {float(number)!r} would be one" if isinstance(number, int | float) else ""
        raise TypeError(f"{name} must be a number, got {value!r}{hint}")


def check_multiplier(value: float, what: str) -> None:
    """Raise ValueError unless ``value`` is finite and at least 0; at 0 a parameter keeps its values."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"a multiplier must be finite and at least 0, got {value!r} in {what}")
