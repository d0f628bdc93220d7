"""The fields of a configuration that trained weights determine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from structlin_nn.recipes._config import RunConfig, require

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
