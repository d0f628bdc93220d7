"""What the configurations of all pipelines share: typed frozen fields, strict checks, plain values, overrides.

Importing this module imports neither torch nor jax.
"""

from __future__ import annotations

import difflib
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

__all__ = ["LAYERS", "OPTIMIZERS", "PRECISIONS", "SCHEDULES", "RunConfig", "nearest", "overrides"]

OPTIMIZERS = ("adam", "adamw")
LAYERS = ("all", "all_but_last", "intermediate")
RULES = ("paper", "rank_corrected")
PRECISIONS = ("float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "constant")


def nearest(word: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" for the known word that is most like `word`, or "" where none is.

    >>> nearest("widht", ["width", "depth"])
    ", did you mean 'width'?"
    >>> nearest("xyz", ["width", "depth"])
    ''
    """
    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.5)
    return f", did you mean {found[0]!r}?" if found else ""


def option(default: Any, text: str, choices: tuple[str, ...] | None = None, execution: bool = False) -> Any:
    """A field with its explanation; `execution` marks what may differ between a run and its resumption."""
    return field(default=default, metadata={"help": text, "choices": choices, "execution": execution})


def check_choice(name: str, value: Any, choices: Iterable[str]) -> None:
    """ValueError, with the nearest, unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}{nearest(str(value), choices)} (one of {', '.join(choices)})")


def check(name: str, value: Any, fine: bool, wanted: str) -> None:
    """ValueError unless `fine`."""
    if not fine:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every training run is told, whatever it trains; `TrainConfig` and its like add what is their own.

    Every field has its explanation in its metadata, which is what ``structlin train NAME --help`` prints. Fields
    marked as `execution` there decide how a run is computed and not what: a resumed run may have others.

    Raises:
        TypeError: a value of another type than the field's (an int is taken for a float, a bool for neither).
        ValueError: a value outside its range, an unknown name, or an option that the structure does not have.
    """

    task: ClassVar[str]
    """Name of the pipeline."""

    model: str = option("", "which model to train")
    width: int = option(256, "width of the model")
    base_width: int = option(64, "width at which the learning rate was tuned")
    structure: str = option("dense", "structure of the linear layers, one of `structlin structures`")
    options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of the structure, such as its rank", "choices": None, "execution": False},
    )
    layers: str = option("all_but_last", "which linear layers are structured, the others stay dense", LAYERS)
    rms_cap: bool = option(False, "cap the RMS of every factor, with a learned gain")
    rule: str = option("paper", "initial scale of the factors", RULES)
    structure_aware: bool = option(
        True, "structure-aware learning rates; without, factors get the rate of a dense layer (naive)"
    )
    batch_size: int = option(256, "samples of a step, of all processes and parts together")
    lr: float = option(3e-3, "learning rate at base width")
    schedule: str = option("cosine", "learning rate after the warm-up", SCHEDULES)
    final_lr: float = option(0.0, "where the cosine ends, as a share of the learning rate")
    optimizer: str = option("adam", "optimiser", OPTIMIZERS)
    weight_decay: float = option(0.0, "decoupled weight decay of adamw (factors and weights only)")
    betas: tuple[float, float] = option((0.9, 0.999), "decay rates of Adam's two moments")
    clip: float = option(0.0, "largest norm of all gradients together, 0 for no clipping")
    ema: float = option(0.0, "decay of an average of the weights that is evaluated in their place, 0 for none")
    precision: str = option("float32", "of products; float16 and bfloat16 by autocast", PRECISIONS)
    accumulate: int = option(1, "parts into which each process splits its share of a step", execution=True)
    compile: bool = option(False, "torch.compile the model", execution=True)
    recompute: bool = option(False, "keep only the inputs of blocks, and compute the rest again", execution=True)
    seed: int = option(0, "seed of initialisation, order of the data and augmentation")
    device: str = option("cpu", "cpu, cuda or cuda:N")
    threads: int = option(0, "threads of torch on the CPU, 0 for torch's own choice")

    def __post_init__(self) -> None:
        for name, kind in self._types().items():
            object.__setattr__(self, name, typed(name, getattr(self, name), kind))
        for entry in fields(self):
            if choices := entry.metadata["choices"]:
                check_choice(entry.name, getattr(self, entry.name), choices)
        self._at_least(1, "batch_size", "accumulate")
        self._check_width()
        self._at_least(0, "weight_decay", "seed", "threads", "clip")
        check("lr", self.lr, self.lr > 0, "positive")
        check("betas", self.betas, all(0 <= b < 1 for b in self.betas), "two numbers from 0 to below 1")
        check("ema", self.ema, 0 <= self.ema < 1, "from 0 to below 1")
        check("final_lr", self.final_lr, 0 <= self.final_lr <= 1, "from 0 to 1")
        device, _, number = self.device.partition(":")
        known = device in ("cpu", "cuda") and (number.isdigit() or ":" not in self.device) and self.device != "cpu:0"
        check("device", self.device, known, "cpu, cuda or cuda:N")
        if self.optimizer == "adam" and self.weight_decay:
            raise ValueError(f"weight_decay={self.weight_decay} needs optimizer='adamw'; adam has none")
        if self.schedule == "constant" and self.final_lr:
            raise ValueError(f"final_lr={self.final_lr} is where a cosine ends; schedule='constant' has none")
        self._check_structure()

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            check(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")

    def _check_width(self) -> None:
        self._at_least(1, "width", "base_width")

    def _check_structure(self) -> None:
        import structlin

        check_choice("structure", self.structure, structlin.names())
        known = structlin.options(self.structure)
        for name in self.options:
            if name not in known:
                has = f"it has {', '.join(known)}" if known else "it has none"
                raise ValueError(f"structure {self.structure!r} has no option {name!r}{nearest(name, known)} ({has})")

    @classmethod
    def _types(cls) -> dict[str, Any]:
        hints = typing.get_type_hints(cls)
        return {entry.name: hints[entry.name] for entry in fields(cls)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from plain values, as `to_dict` gives them.

        Raises:
            TypeError, ValueError: as the class; an unknown key is named with the nearest known one.
        """
        known = cls._types()
        for key in values:
            if key not in known:
                raise ValueError(f"unknown key {key!r} in the configuration{nearest(str(key), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold; `from_dict` gives the same configuration back."""
        return {entry.name: _plain(getattr(self, entry.name)) for entry in fields(self)}

    def replace(self, **changes: Any) -> Self:
        """The same configuration with some fields changed, checked as a new one.

        Raises:
            TypeError, ValueError: as `from_dict`.
        """
        return self.from_dict({**{f.name: getattr(self, f.name) for f in fields(self)}, **changes})

    def differences(self, other: RunConfig) -> list[str]:
        """Names of the fields in which two configurations differ."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in mine if mine[name] != theirs.get(name)]

    def check_continues(self, earlier: RunConfig, folder: object) -> None:
        """Raise ValueError, naming the fields that differ, unless the run in `folder` had this configuration.

        Fields of execution may differ.

        >>> from structlin_nn.training.config import TrainConfig
        >>> TrainConfig(width=32).check_continues(TrainConfig(width=16), "runs/one")
        Traceback (most recent call last):
            ...
        ValueError: the run in runs/one has another configuration: width was 16 and is 32
        """
        if type(earlier) is not type(self):
            raise ValueError(f"the run in {folder} trains {earlier.task}, and this is {self.task}")
        before, now = earlier.to_dict(), self.to_dict()
        execution = {entry.name for entry in fields(self) if entry.metadata["execution"]}
        if names := [name for name in self.differences(earlier) if name not in execution]:
            listed = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
            raise ValueError(f"the run in {folder} has another configuration: {listed}")


def overrides(kind: type[RunConfig], assignments: Sequence[str]) -> dict[str, Any]:
    """Changes from strings KEY=VALUE, as ``--set`` takes them; ``options.NAME`` sets one option of the structure.

    Values are JSON; for a field that holds a string, anything else is taken as it stands.

    Raises:
        ValueError: no "=", an unknown key (with the nearest), a key given twice, or a value that is no JSON where
            the field holds no string.

    >>> from structlin_nn.training.config import TrainConfig
    >>> overrides(TrainConfig, ["lr=1e-3", "structure=monarch", "options.blocks=4", "augment=false"])
    {'lr': 0.001, 'structure': 'monarch', 'options': {'blocks': 4}, 'augment': False}
    >>> overrides(TrainConfig, ["widht=3"])
    Traceback (most recent call last):
        ...
    ValueError: unknown key 'widht' in 'widht=3', did you mean 'width'?
    """
    known = kind._types()
    found: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        name, dot, part = key.partition(".")
        if not equals:
            raise ValueError(f"{assignment!r} must be KEY=VALUE")
        if name not in known or (dot and (name != "options" or not part)):
            raise ValueError(f"unknown key {key!r} in {assignment!r}{nearest(key, known)}")
        into, key = (found.setdefault("options", {}), part) if dot else (found, key)
        if key in into:
            raise ValueError(f"{assignment!r} sets {key} a second time")
        into[key] = text if known[name] is str else _json(assignment, text, loose=bool(dot))
    return found


def _json(assignment: str, text: str, loose: bool) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        if loose:  # options of structures: factorization=greedy
            return text
        raise ValueError(f"the value in {assignment!r} must be JSON: a number, true, false, [..] or {{..}}") from None


def typed(name: str, value: Any, kind: Any) -> Any:
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
        return tuple(typed(name, entry, float) for entry in value)
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
        return typed(name, value, float)
    if isinstance(value, list | tuple):
        return tuple(_option_value(name, entry) for entry in value)
    raise TypeError(f"{name} must be a number, a string, or a list of them, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return value
