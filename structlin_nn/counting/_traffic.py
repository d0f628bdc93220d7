"""Predicted cost of the structured layers of a model on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from structlin.execution.choice import Problem
from structlin.execution.devices import Device
from structlin.structure import Structure
from structlin_nn._text import table

__all__ = ["format_traffic", "layer_traffic"]

# Name, structure and number of vectors of each layer.
Layers = Iterable[tuple[str, Any, int]]


def layer_traffic(layers: Layers, on: Device, dtype: str) -> dict[str, Any]:
    """Return the predicted traffic of chains in a training step on a GPU, by layer, and the sum of the seconds."""
    from structlin.execution.traffic import fastest

    known: dict[Problem, dict[str, Any]] = {}
    rows = []
    for name, structure, tokens in layers:
        if not isinstance(structure, Structure) or not tokens:
            continue
        problem = Problem(structure, True, "torch", "cuda", dtype, tokens, 1, True)
        if problem not in known:
            way, found = fastest(problem, on)
            known[problem] = {
                "way": way.name, "kernels": len(found.kernels), "memory_bytes": found.memory_bytes,
                "l2_bytes": found.l2_bytes, "seconds": found.seconds,
            }  # fmt: skip
        rows.append({"name": name, "rows": tokens} | known[problem])
    return {"device": on.name, "dtype": dtype, "seconds": sum(row["seconds"] for row in rows), "layers": rows}


def format_traffic(found: dict[str, Any]) -> list[str]:
    """Return the lines of a table, with one row for all layers of equal cost."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for row in found["layers"]:
        key = tuple(row[name] for name in ("rows", "way", "kernels", "memory_bytes", "l2_bytes", "seconds"))
        alike.setdefault(key, []).append(row["name"])
    cells = []
    for (rows, way, kernels, memory, l2, seconds), names in alike.items():
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        sizes = f"{memory / 1e6:,.1f} MB", f"{l2 / 1e6:,.1f} MB", f"{1e3 * seconds:.4g} ms"
        cells.append((label, way, f"{rows:,}", f"{kernels:,}", *sizes))
    head = ("layers", "way", "rows", "kernels", "memory", "L2", "time of each")
    lines = ["", f"structured layers of a training step, predicted for {found['device']}, {found['dtype']}"]
    lines += [f"  {line}" for line in table(head, cells, left=2, rule=False).splitlines()]
    return [*lines, f"  {'all layers':<26}{1e3 * found['seconds']:>25.4g} ms"]
