"""Figures of the paper's research code: parameters, MACs, and scale and multiplier of every parameter."""

import json
import math
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from structlin_nn.counting import count_model
from structlin_nn.models import MODELS, StructureConfig, base_model, build_model
from structlin_nn.torch import StructuredLinear, parameter_groups

Configuration = dict[str, Any]
REFERENCE = Path(__file__).parents[2] / "data" / "reference_models"
SWEEPS: dict[str, list[Configuration]] = {
    name: json.loads((REFERENCE / f"{name}.json").read_text(encoding="utf-8")) for name in ("cifar-mlp", "imagenet-vit")
}
# Name there: name here, options from theirs, relative tolerance of MACs.
STRUCTURES: dict[str, tuple[str, Callable[[dict], dict], float]] = {
    "none": ("dense", lambda o: {}, 0),
    "dense": ("dense", lambda o: {}, 0),
    "low_rank": ("low_rank", lambda o: {"rank_fraction": o["rank_frac"] or None}, 0),
    "monarch": ("monarch", lambda o: {"blocks": o["num_blocks"]}, 0),
    "btt": ("block_tensor_train", lambda o: {"rank": o["tt_rank"], "factorization": "greedy"}, 0),
    "btt_norm": ("block_tensor_train", lambda o: {"rank": o["tt_rank"], "factorization": "greedy"}, 0),
    "kron": ("kronecker", lambda o: {"factorization": "greedy"}, 1e-3),
    "tt": ("tensor_train", lambda o: {"rank": o["tt_rank"], "factorization": "greedy"}, 1e-3),
}
# Without the slow tests: the narrowest and the widest MLP of each structure, and one ViT of each structure and rank.
QUICK = {"cifar-mlp": {0, 5, 6, 12, 13, 18, 19, 25, 26, 32, 33, 41}, "imagenet-vit": {0, 4, 8, 9, 13}}
CONFIGURATIONS = [
    pytest.param(
        name, i, id="-".join(map(str, (name, c["structure"], *c["options"].values(), c["width"]))),
        marks=() if i in QUICK[name] else pytest.mark.slow,
    )
    for name, sweep in SWEEPS.items()
    for i, c in enumerate(sweep)
]  # fmt: skip


def sizes(c: Configuration) -> dict[str, Any]:
    return {key: c[key] for key in ("num_classes", "depth", "heads") if key in c}


@cache
def count(name: str, index: int) -> dict[str, Any]:
    c = SWEEPS[name][index]
    structure, options, _ = STRUCTURES[c["structure"]]
    chosen = {key: value for key, value in options(c["options"]).items() if value is not None}
    return count_model(
        name, width=c["width"], base_width=c["base_width"], structure=structure, layers=c["layer_selection"],
        rms_cap=c["structure"] == "btt_norm", options=chosen, **sizes(c),
    )  # fmt: skip


def build(name: str, c: Configuration) -> nn.Module:
    structure, options, _ = STRUCTURES[c["structure"]]
    chosen = {key: value for key, value in options(c["options"]).items() if value is not None}
    config = StructureConfig(structure, chosen, layers=c["layer_selection"], rms_cap=c["structure"] == "btt_norm")
    return build_model(name, width=c["width"], structure=config, **sizes(c))


def close(ours: float, theirs: float) -> bool:
    return math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-9)


@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_counts(name: str, index: int) -> None:
    c = SWEEPS[name][index]
    record = count(name, index)
    tolerance = STRUCTURES[c["structure"]][2]
    assert record["trainable_params"] == c["trainable_params"]
    assert abs(record["forward_macs"] - c["forward_macs"]) <= tolerance * c["forward_macs"]
    assert record["layers_preset"] == MODELS[name].layers == c["layer_selection"]
    in_layers = sum(layer["params"] for layer in record["layers"])
    assert in_layers + sum(math.prod(p["shape"]) for p in record["other_params"]) == c["trainable_params"]


@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_factors(name: str, index: int) -> None:
    c = SWEEPS[name][index]
    layers = count(name, index)["layers"]
    theirs = [c["layers"]["rows"][i] for i in c["layers"]["order"]]
    assert len(theirs) == (0 if c["structure"] == "none" else len(layers) - 1)
    for layer, (d_in, d_out, bias, gains, factors) in zip(layers, theirs, strict=False):
        assert (layer["in_features"], layer["out_features"]) == (d_in, d_out), layer["name"]
        assert (layer["bias"], layer["gains"]) == (bias, gains), layer["name"]
        for ours, (numel, multiplier, std) in zip(layer["factors"], factors, strict=True):
            assert ours["numel"] == numel == ours["fan_in"] * ours["fan_out"] * ours["blocks"], layer["name"]
            # The base model of the research code has expansion 1, and that of `count_model` this one's.
            expansion = 4 if name == "imagenet-vit" and layer["name"].endswith("down") else 1
            assert close(ours["lr_multiplier"], expansion * multiplier), layer["name"]
            assert close(ours["init_std"], std), layer["name"]


@pytest.mark.parametrize(("name", "index"), CONFIGURATIONS)
def test_parameters_of_the_model(name: str, index: int) -> None:
    """What torch holds: sizes, zeros and deviations of the tensors, and all parameters outside structured layers."""
    c = SWEEPS[name][index]
    torch.manual_seed(0)
    model = build(name, c)
    structured = [c["layers"]["rows"][i] for i in c["layers"]["order"]]
    linear = [m for m in model.modules() if isinstance(m, StructuredLinear)]
    paper = {"expansion": 1} if name == "imagenet-vit" else {}
    base = base_model(name, c["base_width"], **sizes(c), **paper)
    groups = parameter_groups(model, base, lr=1.0, extra_multipliers=MODELS[name].extra_multipliers)
    multipliers = {parameter: group["multiplier"] for group in groups for parameter in group["names"]}
    inside = set()
    names = {id(p): parameter for parameter, p in model.named_parameters()}
    for layer, (_, _, _, gains, factors) in zip(linear, structured, strict=False):
        inside |= {id(p) for p in layer.parameters()}
        assert [p.numel() for p in layer.gains or ()] == [1] * gains
        assert {multipliers[names[id(p)]] for p in (*(layer.gains or ()), layer.bias) if p is not None} <= {1.0}
        for p, (numel, multiplier, std) in zip(layer.factors, factors, strict=True):
            assert p.numel() == numel
            assert close(multipliers[names[id(p)]], multiplier)
            spread = 6 / math.sqrt(2 * numel)  # six standard errors of a standard deviation
            assert p.detach().square().mean().sqrt().item() == pytest.approx(std, rel=spread, abs=0)
    found: Counter = Counter()
    for parameter, p in model.named_parameters():
        if id(p) in inside:
            continue
        found[squeezed(p.shape), round(multipliers[parameter], 9), not p.any().item()] += 1
    theirs: Counter = Counter()
    for shape, multiplier, zero, number in c["other_params"]:
        theirs[squeezed(shape), round(multiplier, 9), zero] += number
    assert found == theirs


def squeezed(shape: Any) -> tuple[int, ...]:
    """Without leading ones: position embeddings there are (1, tokens, width), and the class token (1, 1, width)."""
    sizes = list(shape)
    while sizes[0] == 1:
        del sizes[0]
    return tuple(sizes)


def test_both_sweeps_are_compared_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    tally = {
        name: (
            len(sweep),
            sum(len(c["layers"]["order"]) for c in sweep),
            sum(len(c["layers"]["rows"][i][4]) for c in sweep for i in c["layers"]["order"]),
            sum(n for c in sweep for *_, n in c["other_params"]),
        )
        for name, sweep in SWEEPS.items()
    }
    with capsys.disabled():
        for name, (models, layers, factors, others) in tally.items():
            print(f"\n{name}: {models} models, {layers} structured layers, {factors} factors, {others} others", end="")
    assert tally == {"cifar-mlp": (42, 294, 546, 336), "imagenet-vit": (15, 876, 1752, 1920)}


@pytest.mark.parametrize(
    ("name", "first", "second"), [("cifar-mlp", 0.1, 1.0), ("cifar-vit", 1.0, 1.0), ("imagenet-vit", 1.0, 1.0)]
)
def test_multipliers_at_base_width(name: str, first: float, second: float) -> None:
    """At base width every dense multiplier is 1, but for the MLP's first layer."""
    layers = count_model(name, width=MODELS[name].base_width)["layers"]
    got = [f["lr_multiplier"] for layer in layers for f in layer["factors"]]
    names = [layer["name"] for layer in layers]
    assert got[0] == pytest.approx(first)
    assert got[1] == got[-1] == second
    assert {m for m, n in zip(got, names, strict=True) if n.endswith("down")} == {1.0}


def test_base_model_is_dense_at_base_width() -> None:
    base = base_model("gpt2")
    assert base.config.width == 768
    assert (base.config.heads, base.config.head_dim, base.config.expansion) == (12, 64, 4)
    assert {p.device.type for p in base.parameters()} == {"meta"}
    assert {m.structure for m in base.modules() if isinstance(m, StructuredLinear)} >= {base.head.structure}
    wide = base_model("cifar-vit", 96, heads=3, head_dim=40, num_classes=7, depth=2)
    assert (wide.config.heads, wide.config.head_dim) == (8, 12), "heads stand in for width: the base has its own"
    assert (wide.config.width, wide.config.num_classes, wide.config.depth) == (96, 7, 2)
    with pytest.raises(ValueError, match="no size 'hedas'"):
        base_model("cifar-vit", hedas=3)
