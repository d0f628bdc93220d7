"""Parameter groups for torch optimisers, with the learning rates of the structures."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from structlin.scale import OPTIMIZERS
from structlin_nn._patterns import Pattern, Patterns, alike, as_patterns, listed, matches, show
from structlin_nn._rates import (
    KINDS,
    Fans,
    ParameterRule,
    Place,
    check_arguments,
    check_number,
    check_same_modules,
    dense_multiplier,
    factor_multipliers,
    settle,
)
from structlin_nn._text import check_known, table
from structlin_nn.torch._modules import check_model
from structlin_nn.torch._muon import Matrices, muon_multiplier
from structlin_nn.torch._roles import fans as fans_of
from structlin_nn.torch._roles import is_convolution, leaves
from structlin_nn.torch._roles import kind as kind_of
from structlin_nn.torch._roles import matrices as matrices_of
from structlin_nn.torch.linear import StructuredLinear

__all__ = ["KINDS", "ParameterGroups", "ParameterRule", "format_groups", "parameter_groups"]


class ParameterGroups(list):
    """Parameter groups for torch optimisers, a list of dictionaries; ``print`` shows a table."""

    def __str__(self) -> str:
        return format_groups(self)


def parameter_groups(
    model: nn.Module,
    base_model: nn.Module | None = None,
    *,
    lr: float,
    weight_decay: float = 0.0,
    optimizer: str = "adamw",
    structure_aware: bool = True,
    extra_multipliers: Mapping[Pattern, float] | None = None,
    rules: Mapping[Pattern, ParameterRule] | None = None,
    decay: Collection[str] = ("factor", "weight"),
    independent_decay: bool = False,
    adam_lr: float | None = None,
    adam_layers: Patterns = (),
) -> ParameterGroups:
    """Group the trainable parameters by learning-rate multiplier and weight decay, for a torch optimiser.

    The learning rate of a parameter is ``lr``, tuned for the dense model at base width, times a multiplier (muP; Qiu et
    al., *Compute Better Spent*, ICML 2024, section 3; for SGD see :mod:`structlin.scale`):

    ==========================================  ===========================================  =========================
    parameter                                   Adam, AdamW, sign                            SGD
    ==========================================  ===========================================  =========================
    factor of a :class:`StructuredLinear`       base d_in / (fan_in * number of factors)     blocks * carried
                                                                                             * (fan_out / fan_in)
                                                                                             / (base d_out / base d_in)
    weight of nn.Linear, nn.MultiheadAttention  base fan_in / fan_in                         (fan_out / fan_in)
    or a convolution                                                                         / (base fan_out / fan_in)
    embeddings, biases, norms, gains, vectors   1                                            1
    ==========================================  ===========================================  =========================

    Under SGD the groups of a grouped convolution count as blocks. Weights of recurrent layers, of experts (parameters
    with three axes, as in transformers) and of routers have the fans of one gate or one expert. A table that is a plain
    parameter of a module (class tokens, positions, biases by relative position) counts as an embedding or a bias,
    according to its name. A weight that an embedding and a linear layer share (a tied head) counts as an embedding. A
    parameter of the shape of a factor, from which pruning or a parametrization computes that factor, has its rule. Any
    other parameter has multiplier 1 if it has the same size at base width, or if there is no base model; otherwise it
    needs an entry of ``rules``. With ``structure_aware=False`` all factors of a layer have the multiplier of the dense
    layer of its size (the naive rule). Under SGD, the multipliers of embeddings, biases and norms in muP increase with
    the width. They are not implemented; use ``extra_multipliers``.

    With ``optimizer="muon"``, Muon updates the blocks of factors and the weights. Their rate is ``lr`` times
    ``sqrt(fan_out / fan_in) / sqrt(base d_out / base d_in)``, divided by the number of factors
    (:func:`structlin_nn.torch._muon.muon_multiplier`). Adam updates all other parameters with its multipliers and the
    rate ``adam_lr``: embeddings, vectors, factors without matrices (Toeplitz, circulant), parameters of pruned and
    parametrized factors, parameters with an entry of ``rules``, and layers in ``adam_layers``, often the head of a
    classifier. Use these groups with :class:`structlin_nn.torch.Muon`.

    All decayed groups have the coefficient ``weight_decay``, as in nanoGPT and in the paper. AdamW and SGD shrink a
    parameter by ``learning rate * weight_decay`` in each step, so groups with larger multipliers decay faster. With
    ``independent_decay=True`` the coefficient is divided by the multiplier, and all decayed parameters shrink by
    ``lr * weight_decay``.

    A pattern is a glob, in which ``*`` also matches dots, or a compiled regular expression for the whole name.

    Parameters
    ----------
    model
        The model to train. Parameters with ``requires_grad=False`` are left out.
    base_model
        The same model at base width. Only sizes are read, so it can be on the meta device. Its layers can be dense or
        structured. Default: each layer has its own size as base. Then dense layers have multiplier 1, and ``lr`` is the
        rate tuned for the dense model of the same width.
    lr
        Learning rate at base width.
    weight_decay
        Coefficient for the kinds of parameters in ``decay``.
    optimizer
        Optimiser whose rule applies: ``adam``, ``adamw``, ``sgd``, ``sign`` (Lion, signSGD), or ``muon``.
    structure_aware
        False selects the naive rule.
    extra_multipliers
        Additional multipliers of the learning rate, by pattern. A pattern that matches the name of a layer applies to
        its factors, weight or embedding; one that matches the full name of a parameter applies to that parameter. All
        matching multipliers are multiplied.
    rules
        Rules by pattern of full parameter names, for parameters of unknown kinds and for weights that are tied across
        kinds. They take precedence over all other rules; the first matching pattern applies.
    decay
        Kinds of parameters (:data:`KINDS`) that are decayed.
    independent_decay
        Make the decay independent of the multipliers, as described above. Not for ``adam``, which adds the decay to the
        gradient.
    adam_lr
        Learning rate of Adam at base width, for ``muon``. Required if Adam updates any parameter.
    adam_layers
        Patterns of layers or parameters that Adam updates, for ``muon``.

    Returns
    -------
    ParameterGroups
        A list of dictionaries with the keys ``params``, ``lr`` and ``weight_decay``, and for information
        ``multiplier``, ``base_lr`` (``lr`` is their product), ``optimizer`` and ``names``; for ``muon`` also
        ``matrices``, which is None for parameters of Adam. ``print`` shows a table (:func:`format_groups`). Rates and
        decays of the groups take precedence over those of the optimiser. A scheduler that sets the same rate for all
        groups (one cycle, cosine with a minimum) removes the multipliers; :func:`structlin_nn.torch.with_multipliers`
        preserves them. An optimiser whose rates have lost the multipliers warns when it steps
        (:class:`structlin_nn.torch.RatesWarning`).

    Raises
    ------
    ValueError
        If a parameter with two or more axes in a module of unknown kind has another size at base width, the rules of
        several modules disagree on a shared parameter, only one of model and base model has a module with parameters, a
        pattern matches nothing, or ``adam_lr`` is missing or not used.

    Examples
    --------
    >>> model = nn.Sequential(StructuredLinear(64, 64, structure="low_rank", rank=4), nn.ReLU(), nn.Linear(64, 10))
    >>> base = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)).to("meta")
    >>> groups = parameter_groups(model, base, lr=1.0, weight_decay=0.1)
    >>> print(groups)
    multiplier    lr  decay  tensors  parameters  names
          0.25  0.25    0.1        1         256  0.factors.0
             4     4    0.1        1         256  0.factors.1
             1     1      0        2          74  *.bias
           0.5   0.5    0.1        1         640  2.weight
    >>> from torch.optim import AdamW
    >>> optimizer = AdamW(groups)
    """
    if not isinstance(optimizer, str):
        raise TypeError(
            f"optimizer must be the name of a rule, one of {', '.join((*OPTIMIZERS, 'muon'))}, got {optimizer!r}"
        )
    check_known("optimizer", optimizer, (*OPTIMIZERS, "muon"))
    check_model(model, "parameter_groups")
    if base_model is not None:
        check_model(base_model, "parameter_groups, as base_model,")
    muon = optimizer == "muon"
    check_arguments(lr, weight_decay, "adamw" if muon else optimizer, decay, independent_decay)
    to_adam, rules = as_patterns(adam_layers), dict(rules or {})
    if not muon and (to_adam or adam_lr is not None):
        raise ValueError(f"adam_lr and adam_layers need optimizer='muon', got {optimizer!r}")
    if adam_lr is not None:
        check_number(adam_lr, "adam_lr")
    if adam_lr is not None and not adam_lr >= 0:
        raise ValueError(f"adam_lr must not be negative, got {adam_lr}")
    if base_model is not None:
        check_same_modules(dict(leaves(model)), dict(leaves(base_model)), _same_kind)
    unused = set(to_adam)
    held: dict[Hashable, list[tuple[str, Matrices | None]]] = {}
    tables: set[Hashable] = set()

    def places() -> Iterator[Place]:
        for layer, module in leaves(model):
            base = module if base_model is None else base_model.get_submodule(layer)
            found = matrices_of(module) if muon else {}
            for place in _places(layer, module, base, "adamw" if muon else optimizer, structure_aware):
                short = place.name.removeprefix(f"{layer}.")
                left = {p for p in to_adam if matches(p, place.name) or matches(p, layer)}
                unused.difference_update(left)
                matrices = None if left or any(matches(p, place.name) for p in rules) else found.get(short)
                if matrices is not None:
                    value = _muon_value(module, short, matrices, fans_of(base), structure_aware)
                    place = replace(place, multiplier=value)
                held.setdefault(place.parameter, []).append((place.name, matrices))
                if place.kind == "embedding":
                    tables.add(place.parameter)
                yield place

    settled = settle(places(), dict(extra_multipliers or {}), rules, decay)
    if unused:
        raise ValueError(f"adam_layers: no layer or parameter matches {listed(map(show, unused))}")
    trainable = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if missed := [name for p, name in trainable.items() if p not in settled]:
        raise ValueError(
            f"no rule covers the parameters {listed(missed)}, which belong to no known module; add an entry to rules"
        )
    matrices = {p: None if p in tables else _one_step(held[p]) for p in settled} if muon else None
    groups = _grouped(settled, lr, weight_decay, independent_decay, matrices, adam_lr)
    for group in groups:
        group["optimizer"] = optimizer
    return groups


def _places(layer: str, module: nn.Module, base: nn.Module, optimizer: str, structure_aware: bool) -> Iterator[Place]:
    """Return the parameters of a module from :func:`leaves`, with their rules."""
    prefix = f"{layer}." if layer else ""
    fans, base_fans = fans_of(module), fans_of(base)

    def place(name: str, parameter: nn.Parameter, kind: str | None, value: float | None) -> Place:
        described = f"{prefix}{name} {tuple(parameter.shape)} of {type(module).__qualname__}"
        return Place(prefix + name, layer, parameter, kind or "unknown", value, parameter.requires_grad, described)

    if isinstance(module, StructuredLinear):
        values = factor_multipliers(module.structure, base_fans["weight"], optimizer, structure_aware)
        specs = [spec for spec in module.structure.factors if spec.trainable]
        for number, (spec, value) in enumerate(zip(specs, values, strict=True)):
            for name, parameter in module.factors.parameters_of(number):
                if name == str(number) or parameter.shape == (*module._lead, *spec.shape):
                    yield place(f"factors.{name}", parameter, "factor", value)
                else:  # of a parametrization, such as the norms of weight normalisation
                    kind = kind_of(module.factors, name, parameter)
                    yield place(f"factors.{name}", parameter, kind, 1.0 if kind else None)
        for name, parameter in () if module.gains is None else module.gains.named_parameters(recurse=False):
            yield place(f"gains.{name}", parameter, "gain", 1.0)
    for name, parameter in module.named_parameters(recurse=False):
        if name in fans:
            yield place(name, parameter, "weight", dense_multiplier(fans[name], base_fans[name], optimizer))
        else:
            kind, other = kind_of(module, name, parameter), base._parameters.get(name)
            if kind is None and other is not None and other.shape == parameter.shape:
                kind = "weight"
            yield place(name, parameter, kind, 1.0 if kind else None)


def _muon_value(
    module: nn.Module, name: str, matrices: Matrices, base: Mapping[str, Fans], structure_aware: bool
) -> float:
    if isinstance(module, StructuredLinear):
        (base_fans,) = base.values()
        if structure_aware:
            return muon_multiplier(matrices, base_fans.fan_in, base_fans.fan_out, len(module.factors))
        fans = Fans(module.in_features, module.out_features)
    else:
        fans, base_fans = fans_of(module)[name], base[name]
    whole = Matrices((), 1, fans.fan_out, fans.fan_in)
    return muon_multiplier(whole, base_fans.fan_in, base_fans.fan_out)


def _one_step(found: list[tuple[str, Matrices | None]]) -> Matrices | None:
    """Return the matrices for Muon of a parameter with one or several names; None if Adam updates it."""
    first, matrices = found[0]
    for name, other in found[1:]:
        if other != matrices:
            raise ValueError(
                f"{first} and {name} share a parameter but do not contain the same matrices for Muon; name it in "
                "adam_layers, or give it an entry of rules"
            )
    return matrices


def _same_kind(module: nn.Module, base: nn.Module) -> bool:
    """Return whether two modules have weights of the same names, and both or neither are convolutions of torch."""
    kinds = {is_convolution(one) for one in (module, base) if not isinstance(one, StructuredLinear)}
    return fans_of(module).keys() == fans_of(base).keys() and len(kinds) < 2


def _grouped(
    settled: Mapping[Any, tuple[str, ParameterRule]],
    lr: float,
    weight_decay: float,
    independent: bool,
    matrices: Mapping[Any, Matrices | None] | None,
    adam_lr: float | None,
) -> ParameterGroups:
    """Return the groups; ``matrices`` are those of the parameters of Muon, None for parameters of Adam."""
    groups: dict[tuple[ParameterRule, bool], dict[str, Any]] = {}
    left = [] if matrices is None else [name for p, (name, _) in settled.items() if matrices[p] is None]
    if left and adam_lr is None:
        raise ValueError(f"adam_lr is required, because Adam updates {listed(left)}")
    if adam_lr is not None and not left:
        raise ValueError(f"adam_lr={adam_lr} has no effect, because Muon updates all parameters; leave it out")
    for parameter, (name, rule) in settled.items():
        by_adam = matrices is not None and matrices[parameter] is None
        rate = adam_lr if by_adam and adam_lr is not None else lr
        coefficient = weight_decay / rule.multiplier if independent and rule.multiplier else weight_decay
        group = groups.setdefault(
            (rule, by_adam),
            {
                "params": [],
                "lr": rate * rule.multiplier,
                "weight_decay": coefficient if rule.decay else 0.0,
                "multiplier": rule.multiplier,
                "base_lr": rate,
                "names": [],
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
        if matrices is not None:
            group.setdefault("matrices", None if by_adam else [])
            if not by_adam:
                group["matrices"].append(matrices[parameter])
    return ParameterGroups(groups.values())


def format_groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """Return groups of :func:`parameter_groups` or of an optimiser as a table, with a row for each group and name.

    ``*`` stands for several numbers.

    Examples
    --------
    >>> print(format_groups(parameter_groups(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), lr=0.1)))
    multiplier   lr  decay  tensors  parameters  names
             1  0.1      0        2          10  *.weight
             1  0.1      0        2           4  *.bias
    """
    rows: list[tuple[str, ...]] = []
    for group in groups:
        sizes: dict[str, dict[str, int]] = {}
        for name, parameter in zip(group["names"], group["params"], strict=True):
            sizes.setdefault(alike(name), {})[name] = parameter.numel()
        shared = tuple(f"{group[key]:.6g}" for key in ("multiplier", "lr", "weight_decay"))
        for pattern, counts in sizes.items():
            name = pattern if len(counts) > 1 else next(iter(counts))
            rows.append((*shared, f"{len(counts):,}", f"{sum(counts.values()):,}", name))
    return table(("multiplier", "lr", "decay", "tensors", "parameters", "names"), rows, left=-1, rule=False)
