"""The base of the configurations of all recipes: a frozen dataclass that tyro reads and that checks its values.

A run that starts from trained weights takes some fields from them (`fields_of`).

Importing this module imports neither torch nor jax.
"""

from __future__ import annotations

import json
import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from dataclasses import replace as dataclass_replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import tyro
from beartype.door import is_bearable

import structlin
from structlin_nn._text import suggestion, unknown

_EXCLUSIVE = {"rank": "rank_fraction", "rank_fraction": "rank"}  # two ways to state one size


def assigned(words: Sequence[str]) -> dict[str, Any]:
    """Return the values of words NAME=VALUE, with VALUE in JSON or else a string.

    Examples
    --------
    >>> assigned(["rank=2", "factorization=greedy"])
    {'rank': 2, 'factorization': 'greedy'}
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        require(bool(equals and name), f"{word!r} must be NAME=VALUE, such as rank=2")
        require(name not in found, f"{name} is given twice")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


StructureOptions = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[NAME=VALUE ...]",
        instance_from_str=assigned,
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in value.items()],
    ),
]
"""Options of a structure; on the command line ``--options rank=2 factorization=greedy``."""


def require(fine: bool, message: str) -> None:
    """Raise ValueError with the message unless `fine`."""
    if not fine:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The fields that determine the result of a run; the ``Config`` of each recipe adds its own.

    The fields in `execution` change how a run is computed and not its result: a resumed run may change them.

    Raises
    ------
    TypeError
        A value of another type than the field's (an int is accepted as a float, a list as a tuple).
    ValueError
        A value outside of its range, an unknown name, or an option that the structure does not have.
    """

    task: ClassVar[str]
    """Name of the pipeline in records."""
    unit: ClassVar[str] = "img"
    """Unit of a sample in progress bars."""
    execution: ClassVar[frozenset[str]] = frozenset({"accumulate", "compile", "recompute"})
    paper_options: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    """Options of the paper, by model and structure."""
    named: ClassVar[tuple[str, ...]] = ()
    """Models of the recipe; others are ``timm:NAME``, ``hf:CONFIG`` or ``package.module:function``."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """Fields that only the named models have."""
    compiles: ClassVar[bool] = True
    """Whether models are compiled on CUDA unless `compile` says otherwise."""
    capped: ClassVar[bool] = False
    """Whether Block Tensor-Trains get an RMS cap unless `rms_cap` says otherwise; the paper caps them where they
    diverge without."""

    model: str = ""
    model_options: StructureOptions = None  # type: ignore[assignment]
    """Arguments of a model that is not named: of the configuration of ``hf:CONFIG``, or of the function."""
    width: int = 256  # width of the model
    base_width: int = 64  # width at which the learning rate was tuned
    structure: str = "dense"  # structure of the linear layers, one of `structlin structures`
    options: StructureOptions = None  # type: ignore[assignment]
    """Options of the structure; the paper's where not given."""
    layers: Literal["all", "all_but_last", "intermediate"] = "all_but_last"  # which linear layers are structured
    rms_cap: bool | None = None  # cap the RMS of every factor, with a learned gain; None: the paper's choice
    rule: Literal["paper", "rank_corrected"] = "paper"  # initial scale of the factors
    structure_aware: bool = True  # learning rates by structure; False: those of dense layers (naive)
    batch_size: int = 256  # samples of a step, of all processes and parts together
    lr: float = 3e-3  # learning rate of the dense model at base width
    schedule: Literal["cosine", "constant"] = "cosine"  # learning rate after the warm-up
    final_lr: float = 0.0  # final share of the learning rate of the cosine
    optimizer: Literal["adam", "adamw", "muon"] = "adam"  # muon: Muon for matrices, AdamW at adam_lr for the rest
    adam_lr: float = 0.0  # with muon: learning rate of AdamW
    weight_decay: float = 0.0  # decoupled decay of factors and weights, for adamw and muon
    independent_decay: bool = False  # decay by lr * weight_decay whatever the multiplier of a factor's rate
    betas: tuple[float, float] = (0.9, 0.999)  # decay rates of Adam's two moments
    clip: float = 0.0  # largest norm of all gradients together, 0 for no clipping
    ema: float = 0.0  # decay of an average of weights and buffers for evaluations, 0 for none
    precision: Literal["float32", "bfloat16", "float16"] = "float32"  # of products; 16 bits by autocast
    accumulate: int = 1  # parts of a step in each process
    tf32: bool = True  # products of float32 on CUDA in TensorFloat-32
    compile: bool | None = None  # torch.compile the model; None: on CUDA alone
    recompute: bool = False  # activation checkpointing: keep the inputs of blocks alone
    seed: int = 0  # seed of initialisation, order of the data and augmentation
    device: str = "cpu"  # cpu, cuda or cuda:N
    threads: int = 0  # threads of torch on the CPU, 0: torch's default

    def __post_init__(self) -> None:
        known = structlin.structure_names()
        if self.structure not in known:
            raise ValueError(f"unknown structure {self.structure!r}{suggestion(str(self.structure), known)}")
        given = {} if self.options is None else self.options
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise TypeError(f"options must be a dictionary of options by name, got {given!r}")
        usual = self.paper_options.get(self.model, {}).get(self.structure, {})
        kept = {k: v for k, v in usual.items() if k not in {_EXCLUSIVE.get(name) for name in given}}
        object.__setattr__(self, "options", {k: _tuples(v) for k, v in {**kept, **given}.items()})
        object.__setattr__(self, "model_options", {k: _tuples(v) for k, v in (self.model_options or {}).items()})
        if self.has_own_width:
            for name in ("width", "base_width"):
                value, omitted = getattr(self, name), (0, getattr(type(self), name))
                require(value in omitted, f"{self.model} has its own width: {name} must be omitted, got {value}")
                object.__setattr__(self, name, 0)
        if self.compile is None:
            object.__setattr__(self, "compile", self.compiles and str(self.device).startswith("cuda"))
        if self.rms_cap is None:
            object.__setattr__(self, "rms_cap", self.capped and self.structure == "block_tensor_train")
        for name, hint in _hints(type(self)).items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), hint))
        self._check()

    @property
    def is_named(self) -> bool:
        """Whether the model is one of the recipe."""
        return ":" not in str(self.model)

    @property
    def has_own_width(self) -> bool:
        """Whether the model comes from a library, which gives it its width."""
        return str(self.model).startswith(("timm:", "hf:"))

    def _check(self) -> None:
        """Check ranges; recipes add their own."""
        if self.is_named:
            others = ("timm:NAME", "hf:CONFIG", "or package.module:function")
            require(self.model in self.named, unknown("model", self.model, self.named, *others))
            require(not self.model_options, f"model_options are for other models than {self.model}")
        else:
            for name in self.sizes:
                omitted = getattr(self, name) == getattr(type(self), name)
                require(omitted, f"{name} is a size of {', '.join(self.named)}")
        allowed = structlin.structure_options(self.structure)
        for name in self.options:
            has = f"it has {', '.join(allowed)}" if allowed else "it has none"
            near = suggestion(name, allowed)
            require(name in allowed, f"structure {self.structure!r} has no option {name!r}{near} ({has})")
        self._at_least(1, "batch_size", "accumulate")
        if not self.has_own_width:
            self._at_least(1, "width", "base_width")
        self._at_least(0, "weight_decay", "seed", "threads", "clip", "adam_lr")
        require(self.lr > 0, f"lr must be positive, got {self.lr}")
        require(all(0 <= b < 1 for b in self.betas), f"betas must be two numbers from 0 to below 1, got {self.betas}")
        require(0 <= self.ema < 1, f"ema must be from 0 to below 1, got {self.ema}")
        require(0 <= self.final_lr <= 1, f"final_lr must be from 0 to 1, got {self.final_lr}")
        known = re.fullmatch(r"cpu(:0)?|cuda(:\d+)?", self.device) is not None
        require(known, f"device must be cpu, cuda or cuda:N, got {self.device!r}")
        decays = self.optimizer != "adam"
        require(decays or not self.weight_decay, f"weight_decay={self.weight_decay} needs optimizer='adamw' or 'muon'")
        require(decays or not self.independent_decay, "independent_decay needs optimizer='adamw' or 'muon'")
        require((self.optimizer == "muon") == (self.adam_lr > 0), "adam_lr and optimizer='muon' must be given together")
        ends = self.schedule == "cosine" or not self.final_lr
        require(ends, f"final_lr={self.final_lr} is the end of a cosine; leave it out for schedule='constant'")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            require(value >= least, f"{name} must be at least {least}, got {value}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Return a configuration from plain values, as `to_dict` gives them; ValueError for an unknown key."""
        cls._check_keys(values)
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values for JSON; `from_dict` is the inverse."""
        return json.loads(json.dumps(asdict(self)))

    def replace(self, **changes: Any) -> Self:
        """Return the same configuration with some fields changed, checked as a new one."""
        self._check_keys(changes)
        return dataclass_replace(self, **changes)

    @classmethod
    def _check_keys(cls, keys: Iterable[str]) -> None:
        known = _hints(cls)
        for key in keys:
            require(key in known, f"unknown key {key!r} in the configuration{suggestion(str(key), known)}")

    def differences(self, other: RunConfig) -> list[str]:
        """Return the names of the fields in which two configurations differ."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [name for name in mine if mine[name] != theirs.get(name)]

    def check_continues(self, earlier: RunConfig, folder: object) -> None:
        """Raise ValueError with the fields that differ, other than those of `execution`, from a run in `folder`."""
        require(
            type(earlier) is type(self),
            f"the run in {folder} is one of {type(earlier).__module__}, and this is one of {type(self).__module__}",
        )
        before, now = earlier.to_dict(), self.to_dict()
        if names := [name for name in self.differences(earlier) if name not in self.execution]:
            listed = ", ".join(f"{name} was {before[name]!r} and is {now[name]!r}" for name in names)
            raise ValueError(f"the run in {folder} has another configuration: {listed}")


def overrides(kind: type[RunConfig], assignments: Sequence[str]) -> dict[str, Any]:
    """Return changes of a configuration from words NAME=VALUE; ``options.NAME=VALUE`` is an option of the structure.

    Examples
    --------
    >>> from structlin_nn.recipes.cifar import Config
    >>> overrides(Config, ["lr=1e-3", "structure=monarch", "options.blocks=4"])
    {'lr': 0.001, 'structure': 'monarch', 'options': {'blocks': 4}}
    """
    known, found = _hints(kind), dict[str, Any]()
    for key, value in assigned(assignments).items():
        name, dot, part = key.partition(".")
        fine = name in known and (not dot or (name == "options" and bool(part)))
        require(fine, f"unknown key {key!r}{suggestion(key, known)}")
        into = found.setdefault("options", {}) if dot else found
        into[part or name] = value
    return found


def _hints(kind: type[RunConfig]) -> dict[str, Any]:
    found = typing.get_type_hints(kind)
    return {entry.name: found[entry.name] for entry in fields(kind)}


def _typed(name: str, value: Any, hint: Any) -> Any:
    """Return a value as the type of its field; TypeError for another type, ValueError for an unknown name."""
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        value = tuple(value)
    if typing.get_origin(hint) is tuple and isinstance(value, tuple):
        value = tuple(float(v) if type(v) is int else v for v in value)
    if type(value) is int and (hint is float or float in typing.get_args(hint)):
        value = float(value)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        require(value in choices, unknown(name, value, map(str, choices)))
    elif not is_bearable(value, hint) or (hint is int and isinstance(value, bool)):
        shown = getattr(hint, "__name__", None) if typing.get_origin(hint) is None else None
        raise TypeError(f"{name} must be {shown or str(hint).replace('typing.', '')}, got {value!r}")
    for number in value if isinstance(value, tuple) else (value,):
        finite = not isinstance(number, float) or math.isfinite(number)
        require(finite, f"{name} must be finite, got {value!r}")
    return value


def _tuples(value: Any) -> Any:
    """Return lists as tuples, so that both notations of an option are equal."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(entry) for entry in value)
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise TypeError(f"options are finite numbers, strings, or lists of them, got {value!r}")


STRUCTURE = ("structure", "options", "rms_cap", "rule")
MODEL = (
    "model", "width", "base_width", "depth", "heads", "head_dim", "patch", "image_size", "context", "vocabulary",
    "expansion", "qk_norm", "attention_scale", "bias", "tied", "gelu", *STRUCTURE,
)  # fmt: skip


def fields_of(source: str, kind: type[RunConfig]) -> dict[str, Any]:
    """Return the fields of a configuration that trained weights determine; none for a file of tensors alone.

    `source` is what `structlin_nn.trained.starting_weights` takes. ValueError for damaged files, a model of another
    recipe, or structured layers of several structures or of one without a name, which a configuration cannot state.
    """
    from structlin_nn.torch._layout import layout_of
    from structlin_nn.trained import _holds_tensors_alone, open_trained

    if _holds_tensors_alone(Path(source).expanduser()):
        return {}
    trained = open_trained(source)
    build, known = trained.build, {entry.name for entry in fields(kind)}
    require(trained.task == kind.task, f"{source} holds a model of {trained.task}, and this trains {kind.task}")
    sizes = build.get("config", {})
    found = {name: 0 if sizes[name] is None else sizes[name] for name in MODEL if name in known and name in sizes}
    if build["kind"] == "timm":
        found["model"] = f"timm:{build['name']}"
    elif kind.task == "cifar":
        found["model"] = "cifar-mlp" if build["kind"] == "MLP" else "cifar-vit"
        found = found if build["kind"] == "MLP" else {k: v for k, v in found.items() if k != "bias"}
    if "image_size" in known:
        found["image_size"] = trained.image_size
    if build["kind"] != "timm":
        found["base_width"] = sizes["width"] if trained.config is None else trained.config["base_width"]
    return found | _structure_fields(source, layout_of(trained.model))


def _structure_fields(source: str, layout: Mapping[str, Any]) -> dict[str, Any]:
    forms = [form for form in layout["layers"] if form["structure"] != "dense" or form["rms_cap"]]
    if not forms:
        return {"structure": "dense", "options": {}, "rms_cap": False, "rule": "paper"}
    kinds = sorted({form["structure"] or "a chain without a name" for form in forms})
    one = len(kinds) == 1 and forms[0]["structure"] is not None
    require(one, f"a run has one structure with a name, and the layers of {source} have {', '.join(kinds)}")
    first, rules = forms[0]["options"], {form["rule"] for form in forms}
    return {
        "structure": kinds[0],
        "options": {k: v for k, v in first.items() if all(form["options"].get(k) == v for form in forms)},
        "rms_cap": any(form["rms_cap"] for form in forms),
        "rule": rules.pop() if len(rules) == 1 else "paper",
    }


def resumed_fields(folder: Path) -> dict[str, Any]:
    """Return these fields of a run that started from trained weights, by its checkpoint; none for any other run."""
    from structlin_nn.checkpoints import CHECKPOINTS, checkpoints, read_state

    if not (names := checkpoints(folder)):
        return {}
    state = read_state(folder / CHECKPOINTS / names[-1])
    if state["init_from"] is None or state["init_from"]["structured_layers"] is None:
        return {}
    return {name: value for name, value in state["config"].items() if name in MODEL}


def decided(config: Any, default: RunConfig, found: Mapping[str, Any], source: str) -> Any:
    """Return a configuration with the fields that trained weights determine; ValueError for a contradiction."""
    own, asked, usual = {k: v for k, v in found.items() if k != "base_width"}, config.to_dict(), default.to_dict()
    plain = config.replace(**own).to_dict()
    if wrong := [k for k in own if k != "options" and asked[k] != usual[k] and asked[k] != plain[k]]:
        told = "; ".join(f"{name} is {plain[name]!r} there and {asked[name]!r} here" for name in wrong)
        raise ValueError(f"{source} holds another model: {told}")
    if "base_width" in found and config.base_width == default.base_width:
        own["base_width"] = found["base_width"]
    return config.replace(**own)
