"""Which layers are replaced, by what, and what the report says of the others."""

import warnings

import pytest
import torch
from helpers.layers import structured
from torch import nn

import structlin
from structlin_nn.torch import (
    StructuredPointwise,
    load_structured,
    parameter_groups,
    project_linear,
    replace_linear,
    save_structured,
    to_dense_linear,
)


class Block(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.fc2(self.fc1(x).relu())


class Net(nn.Module):
    """A layer 2 -> 13 that does not split, a gate to 1, an attention that reads its weights, an embedding."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 12)
        self.bias = nn.Sequential(nn.Linear(2, 13), nn.ReLU())
        self.gate = nn.Linear(12, 1)
        self.attention = nn.MultiheadAttention(12, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        if head:
            self.head = nn.Linear(12, 5)


BLOCKS = [f"blocks.{i}.fc{k}" for i in (0, 1) for k in (1, 2)]


def test_layers_that_cannot_be_replaced_stay_dense_and_are_named():
    model = Net()
    report = replace_linear(model, "block_tensor_train")
    assert structured(model) == BLOCKS
    reasons = dict(report.skipped)
    assert list(reasons) == ["bias.0", "gate", "attention.out_proj"]
    assert "'bias.0' (2 -> 13)" in reasons["bias.0"]
    assert "cannot be split" in reasons["gate"]
    assert "MultiheadAttention" in reasons["attention.out_proj"]
    assert [(name, role) for name, _, role in report.dense] == [
        ("table.weight", "embedding"),
        ("attention.in_proj_weight", "packed projections of nn.MultiheadAttention"),
        ("head.weight", "not chosen"),
    ]
    text = str(report)
    assert "left alone: gate (" in text
    assert "stays dense: head.weight (not chosen, 60 parameters)" in text
    model = Net()
    with pytest.raises(ValueError, match=r"layer 'bias.0' \(2 -> 13\)"):
        replace_linear(model, "block_tensor_train", impossible="error")
    assert structured(model) == []
    with pytest.raises(ValueError, match=r"layer 'gate' \(12 -> 1\)"):  # nothing is left
        replace_linear(model, "block_tensor_train", layers=["gate", "bias.*"], exclude="bias.*")


def test_every_matrix_of_the_model_is_named_once():
    model = Net()
    before = {n for n, p in model.named_parameters() if p.ndim > 1}
    report = replace_linear(model, "low_rank", rank=2, layers="blocks.*")
    replaced = {f"{name}.weight" for row in report.layers for name in row.names}
    rest = [name for name, _, _ in report.dense]
    assert len(rest) == len(set(rest))
    assert replaced | set(rest) | {f"{name}.weight" for name, _ in report.skipped} == before


@pytest.mark.parametrize(("head", "last"), [(True, "head"), (False, None)])
def test_a_model_without_a_head_has_no_last_layer(head, last):
    model = Net(head)
    replace_linear(model, "low_rank", rank=1, exclude=["gate", "bias.*"])
    assert structured(model) == BLOCKS
    plain = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 12))  # here the last is the head
    replace_linear(plain, "low_rank", rank=1)
    assert structured(plain) == ["0"]


def test_overrides():
    model = Net()
    overrides = {"blocks.0.fc1": {"rank": 3}, "*.fc2": {"structure": "monarch", "blocks": 4}, "*": {"rms_cap": True}}
    replace_linear(model, "low_rank", rank=2, layers="blocks.*", overrides=overrides)
    first, second, third, fourth = (model.get_submodule(name) for name in BLOCKS)
    assert first.structure == structlin.design("low_rank", (48, 12), rank=3)
    assert second.structure == fourth.structure == structlin.design("monarch", (12, 48), blocks=4)
    assert third.structure == structlin.design("low_rank", (48, 12), rank=2)
    assert [layer.rms_cap for layer in (first, second, third)] == [False, False, True]


def test_least_size():
    model = Net()
    report = replace_linear(model, "low_rank", rank=1, min_features=12, exclude="attention.*")
    assert structured(model) == BLOCKS
    assert dict(report.skipped) == {
        "bias.0": "it has fewer than 12 features: 2 -> 13", "gate": "it has fewer than 12 features: 12 -> 1",
    }  # fmt: skip


def test_forms_that_are_dearer_than_dense():
    def small():
        return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8), nn.Linear(8, 8))

    with pytest.warns(
        UserWarning, match=r"2 of 2 structured layers cost more than dense, the first of them 0: 128,000 multiply"
    ):
        replace_linear(small(), "low_rank", rank=1000)
    with pytest.raises(ValueError, match=r"layer '0' \(64 -> 64\) would cost more than dense: .* instead of 4,096"):
        replace_linear(small(), "low_rank", rank=40, dearer="error")
    model = small()
    report = replace_linear(model, "low_rank", rank=20, dearer="skip")
    assert structured(model) == ["0"]
    assert "a structured layer would cost more: 1,440 multiply-accumulates instead of 512" in dict(report.skipped)["1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_linear(small(), "low_rank", rank=40, dearer="allow")
        replace_linear(small(), "low_rank", rank=2)
        replace_linear(small(), "dense")


def test_structures_may_be_given_by_their_classes():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4))
    replace_linear(model, structlin.LowRank, rank=2)
    assert model[0].structure == structlin.design("low_rank", (12, 12), rank=2)
    to_dense_linear(model)
    project_linear(model, structlin.LowRank, rank=2)
    assert model[0].structure == structlin.design("low_rank", (12, 12), rank=2)


# -- projection --------------------------------------------------------------------------------------------------------


def test_projection_names_what_it_cannot_do():
    model = Net()
    report = project_linear(model, "monarch", blocks=4, layers="all")
    assert {name for name, _ in report.skipped} >= {"attention.out_proj"}
    assert set(structured(model)) >= set(BLOCKS)


def test_projection_without_a_budget_says_what_is_lost():
    with pytest.warns(UserWarning, match=r"low_rank the layers have relative errors of up to 0\.[5-9]"):
        project_linear(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)), "low_rank")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        project_linear(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4)), "low_rank", mac_fraction=0.5)


# -- convolutions of kernel size 1 -------------------------------------------------------------------------------------


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1, stride=2), nn.ReLU(), nn.Conv2d(12, 6, 1, bias=False),
        nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 4, 1, padding=1),
    )  # fmt: skip


def test_pointwise_convolutions(tmp_path):
    model, x = convolutions(), torch.randn(2, 3, 9, 7)
    report = replace_linear(model, "low_rank", rank=2, convolutions=True, layers="all")
    assert structured(model) == ["1", "3"]
    assert [role for _, _, role in report.dense] == [
        "convolution of 3 x 3", "convolution of 1 x 1 in 2 groups", "convolution of 1 x 1"
    ]  # fmt: skip
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    base = convolutions()
    groups = parameter_groups(model, base, lr=1.0)
    assert {n: g["multiplier"] for g in groups for n in g["names"]}["1.factors.0"] == 8 / (8 * 2)
    save_structured(model, tmp_path / "m.safetensors")
    again = load_structured(convolutions(), tmp_path / "m.safetensors")
    assert isinstance(again[1], StructuredPointwise)
    assert torch.equal(again(x), model(x))
    expected = model(x)
    to_dense_linear(model)
    assert [type(layer) for layer in model] == [type(layer) for layer in base]
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("kind", "shape"), [(nn.Conv1d, (2, 6, 5)), (nn.Conv3d, (2, 6, 3, 4, 5)), (nn.Conv2d, (6, 3, 4))]
)
def test_pointwise_against_the_convolution(kind, shape):
    old = kind(6, 4, 1).double()
    model = nn.Sequential(old, nn.Identity())
    replace_linear(model, "low_rank", rank=3, convolutions=True, layers="all")
    with torch.no_grad():
        old.weight.copy_(model[0].weight.view_as(old.weight))
        old.bias.copy_(model[0].bias)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(model(x), old(x))
    with pytest.raises(ValueError, match=r"must have a batch, channels and"):
        model(x.reshape(-1))
