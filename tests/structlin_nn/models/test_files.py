"""Models that are built again from their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from structlin_nn.models import StructureConfig, build_model, load_model, save_model
from structlin_nn.models.files import build_of, make_timm
from structlin_nn.torch import StructuredLinear, project_linear, save_structured, to_dense_linear

SIZES: dict[str, dict[str, Any]] = {
    "cifar-mlp": {"depth": 1, "num_classes": 7},
    "cifar-vit": {"depth": 1, "heads": 2},
    "imagenet-vit": {"depth": 1, "heads": 2, "patch": 16, "input_shape": (3, 32, 48), "num_classes": 5},
    "gpt2": {"depth": 1, "heads": 2, "vocabulary": 40, "context": 8, "qk_norm": False, "bias": True, "tied": True},
}


def outputs(model: nn.Module, seed: int = 0) -> torch.Tensor:
    x = model.example_input(2)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(40, x.shape, generator=generator) if x.dtype == torch.int64 else torch.randn(
        x.shape, generator=generator, dtype=x.dtype
    )  # fmt: skip
    with torch.no_grad():
        return model(x)


def disturb(model: nn.Module) -> nn.Module:
    """No layer is zero, and no norm is at its initial value."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("how", ["dense", "structured", "projected"])
def test_models_of_the_package(name: str, how: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    structure = StructureConfig("block_tensor_train", {"rank": 2}, rms_cap=True) if how == "structured" else None
    model = disturb(build_model(name, width=16, structure=structure, **SIZES[name]))
    if how == "projected":
        to_dense_linear(model)
        project_linear(model, "low_rank", mac_fraction=0.6, layers="all")
        assert {type(m) for m in model.modules()} >= {StructuredLinear, nn.Linear}
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    state = torch.get_rng_state()
    again = load_model(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(model)
    assert not again.training
    assert torch.equal(outputs(again), outputs(model))
    assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
    assert build_of(again) == build_of(model)


def test_dtypes(tmp_path: Path) -> None:
    model = build_model("cifar-mlp", width=16, depth=1).double()
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    assert {p.dtype for p in load_model(path).parameters()} == {torch.float64}
    assert {p.dtype for p in load_model(path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    options = {"num_classes": 5, "img_size": 32}
    model = make_timm("vit_tiny_patch16_224", **options).eval()
    project_linear(model, "monarch", blocks=4, layers="*.mlp.*")
    path = tmp_path / "model.safetensors"
    save_model(model, path, build={"kind": "timm", "name": "vit_tiny_patch16_224", "options": options})
    again = load_model(path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({}, "a model is built from kind"),
        ({"kind": "Sequential"}, "one of MLP, ViT, GPT2, timm"),
        ({"kind": "MLP", "config": {"width": 3}}, "is wrong"),
        ({"kind": "timm", "name": "vit_tiny_patch16_224", "options": {"checkpoint_path": "x.pth"}}, "num_classes"),
        ({"kind": "timm", "name": "vit_tiny_patch16_224", "options": {"num_classes": "5"}}, "num_classes"),
        ({"kind": "timm", "name": "vit_tiny_patch16_224"}, "from name and options"),
    ],
)
def test_untrue_builds(build: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Neither written nor read: a file cannot make timm read another, or fetch one."""
    model = nn.Sequential(StructuredLinear(6, 4, structure="low_rank", rank=2))
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match=message):
        save_model(model, path, build=build)
    save_structured(model, path, build=build)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_misuse(tmp_path: Path) -> None:
    model = nn.Sequential(StructuredLinear(6, 4, structure="low_rank", rank=2))
    path = tmp_path / "model.safetensors"
    with pytest.raises(TypeError, match="got Sequential"):
        save_model(model, path)
    save_structured(model, path)
    with pytest.raises(ValueError, match="does not state how its model is built"):
        load_model(path)
    pytest.importorskip("timm")
    for name in ("hf_hub:timm/vit", "vit_tiny_patch16_224.augreg", "no_such_model", "hf-hub:a/b"):
        with pytest.raises(ValueError, match="timm has no model"):
            make_timm(name)
    assert build_of(make_timm("resnet18", img_size=32))["options"] == {}
    with pytest.raises(ValueError, match="num_classes and img_size"):
        make_timm("resnet18", in_chans=1)
