"""Sweeps: many training runs from one description, on this machine or a cluster.

`Sweep` describes the runs: a base configuration, and overlays that each change it to the configuration of a run.
`structlin_nn.sweeps.local` trains them on this machine, `structlin_nn.sweeps.submit` on a cluster. The sweeps of the
paper are in `structlin_nn.configs`.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import re
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from structlin_nn._text import unknown
from structlin_nn.recipes import recipe

__all__ = ["Overlay", "Sweep", "find", "grid", "merge", "names", "run_name", "zipped"]

Overlay = Mapping[str, Any]
"""Changes to a configuration."""


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return every combination of values; the last key varies fastest.

    Examples
    --------
    >>> grid(width=[64, 128], seed=[0, 1])[:3]
    [{'width': 64, 'seed': 0}, {'width': 64, 'seed': 1}, {'width': 128, 'seed': 0}]
    """
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def zipped(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return the first values of all keys, the second values, and so on; ValueError for unequal numbers of values.

    Examples
    --------
    >>> zipped(width=[64, 128], lr=[3e-3, 1e-3])
    [{'width': 64, 'lr': 0.003}, {'width': 128, 'lr': 0.001}]
    """
    lengths = {key: len(found) for key, found in values.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"zipped keys need equally many values, got {lengths}")
    return [dict(zip(values, chosen, strict=True)) for chosen in zip(*values.values(), strict=True)]


def merge(*lists: Sequence[Overlay]) -> list[dict[str, Any]]:
    """Return every combination of one overlay from each list; ValueError for a key that two of them set.

    Examples
    --------
    >>> merge([{"structure": "dense"}, {"structure": "monarch"}], grid(width=[64, 128]))[1]
    {'structure': 'dense', 'width': 128}
    """
    merged = []
    for chosen in itertools.product(*lists):
        together: dict[str, Any] = {}
        for overlay in chosen:
            if twice := together.keys() & overlay.keys():
                raise ValueError(f"{', '.join(sorted(twice))} is set by two of the merged lists")
            together |= overlay
        merged.append(together)
    return merged


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Many runs from one description.

    Attributes
    ----------
    name, about
        Name and one-line description of the sweep.
    model, base
        Model whose configuration (`structlin_nn.recipes.recipe`) the runs start from, and changes that all runs have.
    overlays
        The changes of each run; from `grid`, `zipped`, `merge`, and sums of their results.
    data
        Name of the data, for messages.

    Examples
    --------
    >>> sweep = Sweep(name="x", about="", model="cifar-mlp", overlays=grid(width=[64, 128]), base={"epochs": 2})
    >>> {name: config.width for name, config in sweep.runs().items()}
    {'w64': 64, 'w128': 128}
    >>> {name: config.epochs for name, config in sweep.runs({"epochs": 1}).items()}
    {'w64': 1, 'w128': 1}
    """

    name: str
    about: str
    model: str
    overlays: Sequence[Overlay]
    base: Mapping[str, Any] = field(default_factory=dict)
    data: str = "CIFAR-10"

    def runs(self, changes: Overlay | None = None) -> dict[str, Any]:
        """Return the configurations by name, with changes to all runs, which take precedence over the overlays.

        ValueError for no overlays, different runs of the same name, or an invalid configuration.
        """
        if not self.overlays:
            raise ValueError(f"sweep {self.name!r} has no overlays; give one for each run")
        changes = changes or {}
        made: dict[str, Any] = {}
        for overlay in self.overlays:
            values = {"model": self.model, **self.base, **overlay, **changes}
            name = run_name({key: value for key, value in overlay.items() if key not in changes})
            config = recipe(values.pop("model"), **values)
            if name in made and made[name] != config:
                differing = ", ".join(made[name].differences(config))
                raise ValueError(f"two runs of sweep {self.name!r} have the name {name!r} and differ in {differing}")
            made[name] = config  # a change to all runs may make several of them equal
        return made


def run_name(overlay: Overlay) -> str:
    """Return a name for a run from its overlay, of letters, digits, and . + - _.

    Examples
    --------
    >>> run_name({"structure": "monarch", "options": {"blocks": 4}, "width": 64, "structure_aware": False, "lr": 3e-3})
    'monarch-blocks4-w64-naive-lr0.003'
    >>> run_name({})
    'run'
    """
    parts = []
    for key, value in overlay.items():
        if key == "options":
            parts += [f"{name}{_shown(found)}" for name, found in value.items() if not isinstance(found, str)]
        elif key == "structure_aware":
            parts.append("aware" if value else "naive")
        elif isinstance(value, bool):
            parts.append(key if value else f"no-{key}")
        else:
            parts.append({"structure": "", "model": "", "width": "w"}.get(key, key) + _shown(value))
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts)) or "run"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def names() -> list[str]:
    """Return the sweeps that are part of structlin_nn: the modules of `structlin_nn.configs`, with dashes.

    Examples
    --------
    >>> "delta-h" in names()
    True
    """
    folder = Path(__file__).parents[1] / "configs"
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules([str(folder)]))


def find(name: str) -> Sweep:
    """Return a sweep by name (one of `names`), or from a Python file of your own, which is run and has a `SWEEP`.

    ValueError for an unknown name, with the nearest, or a file without a `SWEEP`; FileNotFoundError for no file.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise FileNotFoundError(f"{name} does not exist")
        content = runpy.run_path(name)
    else:
        if name not in names():
            raise ValueError(unknown("sweep", name, names()))
        content = vars(importlib.import_module(f"structlin_nn.configs.{name.replace('-', '_')}"))
    found = content.get("SWEEP")
    if not isinstance(found, Sweep):
        raise ValueError(f"{name} must define SWEEP, a structlin_nn.sweeps.Sweep, got {found!r}")
    return found
