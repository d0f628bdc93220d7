"""Optimisers and schedules that preserve the learning rates of the structures of a model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from structlin_nn.torch._step_check import RatesWarning
from structlin_nn.torch.groups import parameter_groups

__all__ = ["MuAdamW", "MultiplierScheduler", "RatesWarning", "trainer_optimizer", "with_multipliers"]

_RULE = ("structure_aware", "extra_multipliers", "rules", "decay", "independent_decay")
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # entries of a group that schedulers write, and read to continue
_MOMENTA = ("betas", "momentum", "base_momentum", "max_momentum")  # cyclic schedules change them too


class MuAdamW(torch.optim.AdamW):
    """AdamW with the learning rates of :func:`parameter_groups`.

    Parameters
    ----------
    model, base_model, lr, weight_decay
        As for :func:`parameter_groups`. The layers of the model have been replaced.
    **options
        Options of :func:`parameter_groups` (``structure_aware``, ``extra_multipliers``, ``rules``, ``decay``,
        ``independent_decay``) and of ``torch.optim.AdamW`` (``betas``, ``eps``, ``fused``, ...).

    Examples
    --------
    >>> from structlin_nn.torch import replace_linear
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> _ = replace_linear(model, "low_rank", rank=4)
    >>> optimizer = MuAdamW(model, lr=1e-3, betas=(0.9, 0.95))
    >>> [group["multiplier"] for group in optimizer.param_groups]
    [0.5, 8.0, 1.0, 1.0]
    """

    def __init__(
        self, model: nn.Module, base_model: nn.Module | None = None, *, lr: float = 1e-3, weight_decay: float = 0.01,
        **options: Any,
    ) -> None:  # fmt: skip
        rule = {name: options.pop(name) for name in _RULE if name in options}
        groups = parameter_groups(model, base_model, lr=lr, weight_decay=weight_decay, **rule)
        super().__init__(groups, lr=lr, weight_decay=weight_decay, **options)


class MultiplierScheduler(LRScheduler):
    """Scheduler of the rate at base width; each group has that rate times its multiplier.

    :func:`with_multipliers` creates it. It has the methods of the wrapped scheduler. ``get_last_lr`` returns the rates
    of all groups.
    """

    def __init__(self, make: Callable[..., Any], optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        groups = optimizer.param_groups
        if lacking := [n for n, group in enumerate(groups) if "multiplier" not in group]:
            raise ValueError(
                f"group {lacking[0]} of the optimiser has no multiplier; create its groups with parameter_groups"
            )
        self.optimizer = optimizer
        bases = dict.fromkeys(map(self._base, groups))
        self._keys = [list(bases).index(self._base(group)) for group in groups]
        shown = [copy.copy(groups[self._keys.index(number)]) for number in range(len(bases))]
        resumed = _resumes(make, args, kwargs)
        for number, (group, (rate, _)) in enumerate(zip(shown, bases, strict=True)):
            for name in ("names", *_RATES):
                group.pop(name, None)
            group.update(params=[nn.Parameter(torch.zeros(()))], lr=rate)
            if resumed:  # from the rates of the optimiser
                for own, key in zip(groups, self._keys, strict=True):
                    if key == number and own["multiplier"]:
                        group |= {name: own[name] / own["multiplier"] for name in _RATES if name in own}
                        break
        self.base = _Shown(shown, dict(optimizer.defaults))
        self.scheduler = make(self.base, *args, **kwargs)
        self._pass_on()

    @staticmethod
    def _base(group: dict[str, Any]) -> tuple[float, bool]:
        """Return a key of the rate at base width; Muon and its Adam have separate rates, even if these are equal."""
        base = group["base_lr"] if "base_lr" in group else group["lr"] / group["multiplier"]
        return float(base), group.get("matrices", False) is None

    def _pass_on(self) -> None:
        for group, number in zip(self.optimizer.param_groups, self._keys, strict=True):
            base = self.base.param_groups[number]
            rates = {"initial_lr": base["lr"]} | {name: base[name] for name in _RATES if name in base}
            group |= {name: rate * group["multiplier"] for name, rate in rates.items()}
            group |= {name: base[name] for name in _MOMENTA if name in base}

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Call ``step`` of the wrapped scheduler, and set the rates of all groups."""
        setattr(self.base, "_opt_called", getattr(self.optimizer, "_opt_called", True))  # noqa: B010
        self.scheduler.step(*args, **kwargs)
        self._pass_on()

    def step_update(self, *args: Any, **kwargs: Any) -> None:
        """Call ``step_update`` of a scheduler of timm, which has one step for epochs and one for updates."""
        self.scheduler.step_update(*args, **kwargs)
        self._pass_on()

    def get_last_lr(self) -> list[Any]:
        """Return the rate of each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped scheduler and the rates of its groups."""
        state: dict[str, Any] = self.scheduler.state_dict()
        return state | {"base_groups": [{**group, "params": []} for group in self.base.param_groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a result of :meth:`state_dict`, and set the rates."""
        state = dict(state_dict)
        groups = state.pop("base_groups")
        if len(groups) != len(self.base.param_groups):
            own = len(self.base.param_groups)
            raise ValueError(f"the state must have the rates of {own} groups, as the optimiser, got {len(groups)}")
        self.scheduler.load_state_dict(state)
        for group, saved in zip(self.base.param_groups, groups, strict=True):
            group.update({name: value for name, value in saved.items() if name != "params"})
        self._pass_on()

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # before it is set
            raise AttributeError(name)
        return getattr(self.scheduler, name)


def _resumes(make: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> bool:
    """Return whether the arguments of a scheduler have a ``last_epoch``, from which it continues."""
    try:
        given = inspect.signature(make).bind(None, *args, **kwargs).arguments
    except (TypeError, ValueError):  # the scheduler raises the error
        return False
    return given.get("last_epoch", -1) != -1


class _Shown(Optimizer):
    """Optimiser that the wrapped scheduler changes: one group for each rate at base width."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Do nothing: this optimiser trains no parameters."""


def with_multipliers(make: Callable[..., Any], optimizer: Optimizer, *args: Any, **kwargs: Any) -> MultiplierScheduler:
    """Return a scheduler that preserves the multipliers of the groups of an optimiser.

    Schedulers that only multiply rates (linear, cosine to 0, steps) preserve multipliers without this function.
    ``OneCycleLR`` and ``CyclicLR`` with one rate, a cosine with ``eta_min``, and the schedulers of timm with ``lr_min``
    or a warm-up rate set the same rate for all groups, or add a constant. This function applies them to the rate at
    base width; each group has that rate times its multiplier.

    A scheduler starts from the rates at base width. With ``last_epoch`` it continues from the rates of the optimiser,
    whose groups must have an ``initial_lr``, as in torch.

    Parameters
    ----------
    make
        Class of a scheduler of torch or timm, or a function that takes an optimiser and returns a scheduler.
    optimizer
        Optimiser with groups of :func:`parameter_groups`.
    *args, **kwargs
        Arguments of the scheduler. Rates are those at base width.

    Raises
    ------
    ValueError
        If a group has no multiplier. Errors of the scheduler pass through.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, extra_multipliers={"0": 4.0}))
    >>> scheduler = with_multipliers(torch.optim.lr_scheduler.OneCycleLR, optimizer, max_lr=1e-3, total_steps=10)
    >>> for _ in range(3):
    ...     optimizer.step()
    ...     scheduler.step()
    >>> {group["multiplier"]: round(group["lr"], 6) for group in optimizer.param_groups}
    {4.0: 0.003802, 1.0: 0.00095}
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"the second argument of with_multipliers must be an optimiser, got a {type(optimizer).__name__}"
        )
    return MultiplierScheduler(make, optimizer, args, kwargs)


def trainer_optimizer(
    model: nn.Module, args: Any, base_model: nn.Module | None = None, **options: Any
) -> tuple[type[Optimizer], dict[str, Any]]:
    """Return AdamW with the learning rates of :func:`parameter_groups`, for the Trainer of transformers.

    The result is the argument ``optimizer_cls_and_kwargs`` of the Trainer. Rate, decay, betas and eps are those of
    ``args``, the ``transformers.TrainingArguments``; options are those of :func:`parameter_groups`. The schedules of
    the Trainer only multiply rates, so they preserve the multipliers.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> args = SimpleNamespace(learning_rate=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8)
    >>> kind, keywords = trainer_optimizer(nn.Sequential(nn.Linear(4, 4)), args)
    >>> kind.__name__, keywords["betas"], len(keywords["params"])
    ('AdamW', (0.9, 0.95), 2)
    """
    groups = parameter_groups(model, base_model, lr=args.learning_rate, weight_decay=args.weight_decay, **options)
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW, {"params": groups, "betas": betas, "eps": args.adam_epsilon}
