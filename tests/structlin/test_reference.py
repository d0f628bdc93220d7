"""Two sweeps of published configurations, matched factor by factor: tests/data/reference/README.md."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from structlin import design, init_std, lr_multipliers

DATA = Path(__file__).parents[1] / "data" / "reference"
NAMES = {"kron": "kronecker", "tt": "tensor_train", "btt": "block_tensor_train", "btt_norm": "block_tensor_train"}
OPTIONS = {"tt_rank": "rank", "num_blocks": "blocks", "rank_frac": "rank_fraction"}
# The output layer, the query projection, and the last layer of each residual branch.
ZERO = ("output_layer", "linear2", "mlp_head", "to_q", "to_out.0", "net.4")
EXPECTED = {"cifar_mlp_sweep": (546, 42), "imagenet_vit_sweep": (2340, 234)}


def sweep(name):
    return json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))


def structure_of(config, layer):
    name = NAMES.get(config["structure"], config["structure"])
    options = {OPTIONS[k]: v for k, v in config["options"].items() if (k, v) != ("rank_frac", 0)}
    if name in ("kronecker", "tensor_train", "block_tensor_train"):
        options["factorization"] = "greedy"
    shape = (layer["out"], layer["in"])
    return design("dense", shape) if "weight" in layer else design(name, shape, **options)


def base_in(config, layer):
    """Input features of the same layer at base width."""
    width, base = config["width"], config["base_width"]
    if layer["in"] == 3072:
        return 3072
    expansion = {"MLP": 4, "ImageNet-ViT/32": 1}[config["experiment"]]
    return {width: base, 4 * width: expansion * base}[layer["in"]]


def compare(config, layer, found):
    structure = structure_of(config, layer)
    extra = 0.1 if layer["name"] == "input_layer" else 1.0
    multipliers = [extra * m for m in lr_multipliers(structure, optimizer="adam", base_d_in=base_in(config, layer))]
    zero = layer["name"].endswith(ZERO)
    where = f"{config['structure']} {config['options']} width {config['width']}, {layer['name']}"
    if "weight" in layer:
        numel, multiplier, starts_at_zero = layer["weight"]
        assert [f.numel for f in structure.factors] == [numel], where
        assert multipliers == pytest.approx([multiplier], rel=1e-15), where
        assert zero == starts_at_zero, where
        found["dense weights"] += layer["count"]
        return
    factors = [f for f in layer["factors"] if f[2] != "gain"]
    gains = [f for f in layer["factors"] if f[2] == "gain"]
    assert [f.numel for f in structure.factors] == [f[0] for f in factors], where
    assert [round(m, 10) for m in multipliers] == [f[1] for f in factors], where
    stds = init_std(structure, rule="paper", zero_last=zero)
    assert [s == 0 for s in stds] == [f[2] == 0 for f in factors], where
    assert stds == pytest.approx([f[2] for f in factors], abs=1e-9), where
    # One gain for each capped factor, at the base rate; none on query and key.
    capped = config["structure"] == "btt_norm" and not layer["name"].endswith(("to_q", "to_k"))
    assert gains == [[1, 1.0, "gain"]] * (len(factors) if capped else 0), where
    found["factors"] += layer["count"] * len(factors)
    found["gains"] += layer["count"] * len(gains)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_factor_of_the_sweep(name, capsys):
    """numel exactly, lr_mult to the ten decimals of the file, init_std to 1e-9, what starts at zero, which gains."""
    found = Counter()
    for config in sweep(name):
        for layer in config["layers"]:
            compare(config, layer, found)
    with capsys.disabled():
        print(
            f"\n{name}: {found['factors']} factors, {found['gains']} gains and "
            f"{found['dense weights']} unstructured weights compared"
        )
    assert (found["factors"] + found["gains"], found["dense weights"]) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_macs_of_the_whole_model(name):
    """Layers times the tokens they see; attention scores and values, 2 * tokens^2 * width in each of 12 blocks."""
    for config in sweep(name):
        width, total = config["width"], 0
        tokens = 1 if config["experiment"] == "MLP" else 50
        for layer in config["layers"]:
            seen = {"mlp_head": 1, "to_patch_embedding.2": tokens - 1}.get(layer["name"], tokens)
            total += seen * layer["count"] * structure_of(config, layer).macs
        if config["experiment"] != "MLP":
            total += 12 * 2 * tokens**2 * width
        if config["structure"] in ("kron", "tt"):
            assert total == pytest.approx(config["forward_macs"], rel=1e-3), config["width"]
        else:
            assert total == config["forward_macs"], (config["structure"], width)


def test_the_sweeps_cover_what_they_should():
    configs = [c for name in EXPECTED for c in sweep(name)]
    assert len(configs) == 57
    kinds = {"dense", "none", "kron", "low_rank", "btt", "btt_norm", "monarch", "tt"}
    assert {c["structure"] for c in configs} == kinds
    assert all(math.isfinite(f[1]) for c in configs for x in c["layers"] for f in x.get("factors", []))
