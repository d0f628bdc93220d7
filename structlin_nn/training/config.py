"""The configuration of a training run: typed, frozen, checked, and the paper's recipes as starting points.

A run is a function of its `TrainConfig` and its data: where the data lie, and where results are written, is no
part of it. Importing this module imports neither torch nor jax.

The recipes are those for CIFAR of Qiu, Potapczynski, Finzi, Goldblum, Wilson, Compute Better Spent (ICML 2024).
"""

from __future__ import annotations

import difflib
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = ["DATA_SETS", "LAYERS", "MODELS", "OPTIMIZERS", "RECIPES", "TrainConfig", "nearest", "recipe"]

MODELS = ("cifar-mlp", "cifar-vit")
DATA_SETS = ("cifar10", "cifar100", "fashion")
OPTIMIZERS = ("adam", "adamw")
LAYERS = ("all", "all_but_last", "intermediate")
RULES = ("paper", "rank_corrected")


def nearest(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" for the known word that is most like `word`, or "" where none is.

    >>> nearest("widht", ["width", "depth"])
    ", did you mean 'width'?"
    >>> nearest("xyz", ["width", "depth"])
    ''
    """
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""


def _option(default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"help": text, "choices": choices}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the result of a training run, apart from the data.

    `TrainConfig()` is no recipe of the paper; see `recipe`. Every field has its explanation in its metadata,
    which is what ``structlin train cifar --help`` prints.

    Raises:
        TypeError: a value of another type than the field's (an int is taken for a float, a bool for neither).
        ValueError: a value outside its range, an unknown name, or an option that the structure does not have.

    Example:
        >>> config = TrainConfig(model="cifar-mlp", width=128, structure="low_rank", options={"rank": 8})
        >>> config.replace(width=256).width
        256
        >>> TrainConfig.from_dict({"widht": 128})
        Traceback (most recent call last):
            ...
        ValueError: unknown key 'widht' in the configuration, did you mean 'width'?
    """

    model: str = _option("cifar-mlp", "which model to train", MODELS)
    data_set: str = _option("fashion", "data set; fashion is the embedded subset of Fashion-MNIST", DATA_SETS)
    width: int = _option(256, "width of the model")
    base_width: int = _option(64, "width at which the learning rate was tuned")
    structure: str = _option("dense", "structure of the linear layers, one of `structlin structures`")
    options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "options of the structure, such as its rank", "choices": None}
    )
    layers: str = _option("all_but_last", "which linear layers are structured, the others stay dense", LAYERS)
    rms_cap: bool = _option(False, "cap the RMS of every factor, with a learned gain")
    rule: str = _option("paper", "initial scale of the factors", RULES)
    epochs: int = _option(10, "passes over the training images")
    batch_size: int = _option(256, "images in a batch; what is left at the end of an epoch is left out of it")
    lr: float = _option(3e-3, "learning rate at base width")
    optimizer: str = _option("adam", "optimiser", OPTIMIZERS)
    weight_decay: float = _option(0.0, "decoupled weight decay of adamw (factors and weights only)")
    betas: tuple[float, float] = _option((0.9, 0.999), "decay rates of Adam's two moments")
    warmup_epochs: float = _option(0.0, "epochs of linear warm-up before the cosine to 0")
    augment: bool = _option(True, "random resized crops and horizontal flips")
    mixup: float = _option(0.8, "alpha of mixup, 0 for none")
    label_smoothing: float = _option(0.3, "label smoothing, 0 for none")
    input_lr_mult: float = _option(0.1, "extra learning-rate multiplier of the first linear layer")
    structure_aware: bool = _option(
        True, "structure-aware learning rates; without, factors get the rate of a dense layer (naive)"
    )
    seed: int = _option(0, "seed of initialisation, order of the data and augmentation")
    device: str = _option("cpu", "cpu, cuda or cuda:N")
    threads: int = _option(0, "threads of torch on the CPU, 0 for torch's own choice")
    eval_every: int = _option(1, "epochs from one evaluation to the next")

    def __post_init__(self) -> None:
        for name, kind in _types().items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        for entry in fields(self):
            if choices := entry.metadata["choices"]:
                _check_choice(entry.name, getattr(self, entry.name), choices)
        for name in ("width", "base_width", "epochs", "batch_size", "eval_every"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("weight_decay", "warmup_epochs", "mixup", "seed", "threads"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "at least 0")
        _check("lr", self.lr, self.lr > 0, "positive")
        _check("input_lr_mult", self.input_lr_mult, self.input_lr_mult > 0, "positive")
        _check("betas", self.betas, all(0 <= b < 1 for b in self.betas), "two numbers from 0 to below 1")
        _check("label_smoothing", self.label_smoothing, 0 <= self.label_smoothing <= 1, "from 0 to 1")
        _check("warmup_epochs", self.warmup_epochs, self.warmup_epochs < self.epochs, "less than epochs")
        device, _, number = self.device.partition(":")
        known = device in ("cpu", "cuda") and (number.isdigit() or ":" not in self.device) and self.device != "cpu:0"
        _check("device", self.device, known, "cpu, cuda or cuda:N")
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(f"weight_decay={self.weight_decay} needs optimizer='adamw'; adam has none")
        self._check_structure()

    def _check_structure(self) -> None:
        import structlin

        _check_choice("structure", self.structure, structlin.names())
        known = structlin.options(self.structure)
        for name in self.options:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(f"structure {self.structure!r} has no option {name!r}{nearest(name, known)} ({has})")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from plain values, as `to_dict` gives them.

        Raises:
            TypeError, ValueError: as the class; an unknown key is named with the nearest known one.
        """
        known = _types()
        for key in values:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in the configuration{nearest(str(key), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold; `from_dict` gives the same configuration back."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}

    def replace(self, **changes: Any) -> TrainConfig:
        """The same configuration with some fields changed, checked as a new one.

        Raises:
            TypeError, ValueError: as `from_dict`.
        """
        return TrainConfig.from_dict({**{f.name: getattr(self, f.name) for f in fields(self)}, **changes})

    def differences(self, other: TrainConfig) -> list[str]:
        """Names of the fields in which two configurations differ."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in mine if mine[name] != theirs[name]]

    def check_continues(self, earlier: TrainConfig, folder: object) -> None:
        """Raise ValueError, naming the fields that differ, unless the run in `folder` had this configuration.

        >>> TrainConfig(width=32).check_continues(TrainConfig(width=16), "runs/one")
        Traceback (most recent call last):
            ...
        ValueError: the run in runs/one has another configuration: width was 16 and is 32
        """
        before, now = earlier.to_dict(), self.to_dict()
        if names := self.differences(earlier):
            listed = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
            raise ValueError(f"the run in {folder} has another configuration: {listed}")


_COMMON = {"base_width": 64, "optimizer": "adam", "augment": True, "mixup": 0.8, "label_smoothing": 0.3}

RECIPES: dict[str, dict[str, Any]] = {
    "cifar-mlp": {
        **_COMMON,
        "epochs": 500,
        "batch_size": 1024,
        "lr": 3e-3,
        "input_lr_mult": 0.1,
        "layers": "all_but_last",
        "eval_every": 5,
    },
    "cifar-vit": {
        **_COMMON,
        "epochs": 200,
        "batch_size": 256,
        "lr": 1e-3,
        "input_lr_mult": 1.0,
        "layers": "all_but_last",
        "eval_every": 5,
    },
}
"""The recipe of the paper for each model: data CIFAR-10 or CIFAR-100, cosine schedule to 0."""

STRUCTURE_RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "cifar-mlp": {
        "low_rank": {},  # rank ceil(sqrt(min(d_in, d_out))), the default
        "kronecker": {"factorization": "greedy"},
        "tensor_train": {"rank": 16, "factorization": "greedy"},
        "block_tensor_train": {"rank": 1, "factorization": "greedy"},
        "monarch": {"blocks": 4},
    },
    "cifar-vit": {
        "low_rank": {"rank_fraction": 0.1},
        "kronecker": {"factorization": "greedy"},
        "tensor_train": {"rank": 8, "factorization": "greedy"},
        "block_tensor_train": {"rank": 1, "factorization": "greedy"},
        "monarch": {"blocks": 4},
    },
}
"""The options that the paper uses for each structure."""

# Two ways to state one size: giving one of them takes the place of the other.
_EXCLUSIVE = {"rank": "rank_fraction", "rank_fraction": "rank"}


def recipe(model: str = "cifar-mlp", **changes: Any) -> TrainConfig:
    """The paper's recipe for a model, with changes.

    Options of the structure that are not given are the paper's for that model; all are in the result.

    Args:
        model: one of `MODELS`.
        **changes: fields of `TrainConfig`.

    Raises:
        TypeError, ValueError: as `TrainConfig.from_dict`.

    Example:
        >>> recipe("cifar-vit", structure="low_rank", width=128).options
        {'rank_fraction': 0.1}
        >>> recipe("cifar-vit", structure="low_rank", options={"rank": 8}).options
        {'rank': 8}
    """
    _check_choice("model", model, MODELS)
    values = {**RECIPES[model], **changes, "model": model}
    given = values.get("options", {})
    if isinstance(given, Mapping) and isinstance(values.get("structure"), str):
        replaced = {_EXCLUSIVE.get(name) for name in given}
        usual = STRUCTURE_RECIPES[model].get(values["structure"], {})
        values["options"] = {**{k: v for k, v in usual.items() if k not in replaced}, **given}
    return TrainConfig.from_dict(values)


def _types() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as the type of a field, or a TypeError that says what would be right."""
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value!r}")
        return float(value)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple) and len(value) == 2:
        return tuple(_typed(name, entry, float) for entry in value)
    if typing.get_origin(kind) is dict and isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {key: _option_value(f"{name}[{key!r}]", entry) for key, entry in value.items()}
    wanted = {bool: "True or False", str: "a string", int: "an integer", float: "a number"}
    text = wanted.get(kind) or ("two numbers" if typing.get_origin(kind) is tuple else "a dictionary of options")
    raise TypeError(f"{name} must be {text}, got {value!r}")


def _option_value(name: str, value: Any) -> Any:
    """Values of options: what JSON can hold, with tuples for lists, so that both ways to write one are equal."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return _typed(name, value, float)
    if isinstance(value, list | tuple):
        return tuple(_option_value(name, entry) for entry in value)
    raise TypeError(f"{name} must be a number, a string, or a list of them, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def _check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}{nearest(str(value), choices)} (one of {', '.join(choices)})")


def _check(name: str, value: Any, fine: bool, wanted: str) -> None:
    if not fine:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
