"""Parameter groups: multipliers against formulas written out here, and coverage of every parameter."""

import copy
import re

import pytest
import torch
from helpers.layers import assert_covers, decays, multipliers
from torch import nn

import structlin
from structlin_nn.torch import (
    ParameterRule,
    StructuredLinear,
    format_groups,
    parameter_groups,
    replace_linear,
    with_multipliers,
)


class Net(nn.Module):
    """One parameter of every known kind, at a width."""

    def __init__(self, width: int, structure: str = "block_tensor_train", **options) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.conv = nn.Conv2d(3, width, 5)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.batch_norm = nn.BatchNorm2d(width)
        self.up = StructuredLinear(width, 4 * width, structure=structure, **options)
        self.down = StructuredLinear(4 * width, width, structure=structure, **options)
        self.attention = nn.MultiheadAttention(width, 2, kdim=7, vdim=5, add_bias_kv=True)
        self.activation = nn.PReLU(width)
        self.head = nn.Linear(width, 10)
        self.temperature = nn.Parameter(torch.ones(()))


OTHERS = {
    "embedding.weight", "conv.bias", "depthwise.bias", "norm.weight", "norm.bias", "batch_norm.weight",
    "batch_norm.bias", "up.bias", "up.gains.0", "up.gains.1", "down.bias", "down.gains.0", "down.gains.1",
    "attention.in_proj_bias", "attention.bias_k", "attention.bias_v", "attention.out_proj.bias", "activation.weight",
    "head.bias", "temperature",
}  # fmt: skip


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sign"])
def test_adam_multipliers_against_formulas(optimizer):
    model, base = Net(64, rank=2, rms_cap=True), Net(16).to("meta")
    groups = parameter_groups(model, base, lr=0.5, weight_decay=0.01, optimizer=optimizer)
    assert_covers(groups, model)
    # up: 64 = 8 x 8 -> 256 = 16 x 16; down: 256 = 16 x 16 -> 64 = 8 x 8; two factors each
    assert multipliers(groups) == {
        **dict.fromkeys(OTHERS, 1.0),
        "up.factors.0": 16 / (8 * 2),
        "up.factors.1": 16 / (2 * 8 * 2),
        "down.factors.0": 64 / (16 * 2),
        "down.factors.1": 64 / (2 * 16 * 2),
        "conv.weight": 1.0,
        "depthwise.weight": 1.0,
        "attention.q_proj_weight": 16 / 64,
        "attention.k_proj_weight": 1.0,
        "attention.v_proj_weight": 1.0,
        "attention.out_proj.weight": 16 / 64,
        "head.weight": 16 / 64,
    }
    assert {name for name, decay in decays(groups).items() if decay == 0} == OTHERS
    assert set(decays(groups).values()) == {0, 0.01}
    for group in groups:
        assert group["lr"] == 0.5 * group["multiplier"]
    keys = [(g["multiplier"], g["weight_decay"]) for g in groups]
    assert len(set(keys)) == len(keys) == 5


def test_sgd_multipliers_against_formulas():
    model, base = Net(64, rank=2), Net(16).to("meta")
    found = multipliers(parameter_groups(model, base, lr=0.5, optimizer="sgd"))
    up, down = (4 * 16) / 16, 16 / (4 * 16)  # base d_out / base d_in
    by_hand = {
        "up.factors.0": 8 * (2 * 16 / 8) / up,  # 8 blocks of (2 * 16, 8)
        "up.factors.1": 16 * (16 / (2 * 8)) / up,  # 16 blocks of (16, 2 * 8)
        "down.factors.0": 16 * (2 * 8 / 16) / down,
        "down.factors.1": 8 * (8 / (2 * 16)) / down,
        "conv.weight": (64 * 25 / 75) / (16 * 25 / 75),
        "depthwise.weight": 64 / 16,  # the ratio of the numbers of blocks
        "attention.q_proj_weight": 1.0,
        "attention.k_proj_weight": (64 / 7) / (16 / 7),
        "attention.v_proj_weight": (64 / 5) / (16 / 5),
        "attention.out_proj.weight": 1.0,
        "head.weight": (10 / 64) / (10 / 16),
    }
    for name, value in by_hand.items():
        assert found.pop(name) == pytest.approx(value, rel=1e-12), name
    assert set(found.values()) == {1.0}


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("name", structlin.structure_names())
def test_every_structure_aware_and_naive(name, optimizer):
    (d_out, d_in), options = structlin.structure_class(name).examples[0]
    layer = StructuredLinear(d_in, d_out, structure=name, **options)
    model, base = nn.Sequential(layer), nn.Sequential(nn.Linear(3, 5))
    aware = multipliers(parameter_groups(model, base, lr=1, optimizer=optimizer))
    naive = multipliers(parameter_groups(model, base, lr=1, optimizer=optimizer, structure_aware=False))
    specs = [f for f in layer.structure.factors if f.trainable]
    for number, f in enumerate(specs):
        rule, dense = {
            "adam": (3 / (f.fan_in * len(specs)), 3 / d_in),
            "sgd": (f.blocks * f.carried * (f.fan_out / f.fan_in) / (5 / 3), (d_out / d_in) / (5 / 3)),
        }[optimizer]
        assert aware[f"0.factors.{number}"] == pytest.approx(rule, rel=1e-12)
        assert naive[f"0.factors.{number}"] == pytest.approx(dense, rel=1e-12)
    assert len(aware) == len(naive) == len(specs) + 1


def test_without_base_model_each_layer_is_its_own_base():
    model = Net(64)
    found = multipliers(parameter_groups(model, lr=1))
    assert found["up.factors.0"] == 64 / (8 * 2)
    assert found["down.factors.1"] == 256 / (16 * 2)
    assert found["head.weight"] == found["attention.q_proj_weight"] == found["conv.weight"] == 1


def test_dense_layers_follow_width():
    def mlp(width):
        return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3))

    groups = parameter_groups(mlp(96), mlp(32), lr=0.3)
    assert multipliers(groups) == {
        "0.weight": 1, "2.weight": 32 / 96, "3.weight": 32 / 96, **{f"{i}.bias": 1 for i in (0, 2, 3)}
    }  # fmt: skip


def test_base_may_be_structured_dense_or_replaced():
    model = Net(64)
    dense_base, structured_base = Net(16, structure="dense"), Net(16, rank=3, rms_cap=True)
    linear_base = copy.deepcopy(structured_base)
    linear_base.up, linear_base.down = nn.Linear(16, 64), nn.Linear(64, 16)
    found = [multipliers(parameter_groups(model, b, lr=1)) for b in (dense_base, structured_base, linear_base)]
    assert found[0] == found[1] == found[2]


# -- Muon --------------------------------------------------------------------------------------------------------------


def test_muon_multipliers_against_formulas():
    model, base = Net(64, rank=2, rms_cap=True), Net(16).to("meta")
    groups = parameter_groups(model, base, lr=0.5, weight_decay=0.01, optimizer="muon", adam_lr=0.003)
    assert_covers(groups, model)
    found = multipliers(groups)
    by_hand = {  # up: (4 * 16) / 16 at base width; two factors
        "up.factors.0": (2 * 16 / 8 / 4) ** 0.5 / 2,
        "up.factors.1": (16 / (2 * 8) / 4) ** 0.5 / 2,
        "down.factors.0": (2 * 8 / 16 * 4) ** 0.5 / 2,
        "down.factors.1": (8 / (2 * 16) * 4) ** 0.5 / 2,
        "conv.weight": 2.0,  # 64 / 16 outputs, as many inputs
        "depthwise.weight": 1.0,  # blocks of one output
        "attention.q_proj_weight": 1.0,
        "attention.k_proj_weight": 2.0,
        "attention.v_proj_weight": 2.0,
        "attention.out_proj.weight": 1.0,
        "head.weight": 0.5,  # 10 outputs, 64 / 16 inputs
    }
    by_muon = {name for group in groups if group["matrices"] is not None for name in group["names"]}
    assert by_muon == set(by_hand)
    for name, value in by_hand.items():
        assert found.pop(name) == pytest.approx(value, rel=1e-12), name
    assert set(found) == OTHERS
    assert set(found.values()) == {1.0}
    for group in groups:
        assert group["lr"] == (0.003 if group["matrices"] is None else 0.5) * group["multiplier"]


def test_what_muon_leaves_to_adam():
    model = nn.Sequential(
        StructuredLinear(9, 9, structure="toeplitz"), StructuredLinear(9, 9, structure="diagonal"), nn.Linear(9, 9),
        nn.ConvTranspose1d(9, 6, 3, groups=3), nn.ConvTranspose1d(9, 6, 3), nn.Linear(6, 4),
    )  # fmt: skip
    options = {"lr": 1.0, "optimizer": "muon", "adam_lr": 0.1}
    rules = {"2.weight": ParameterRule(3.0)}

    def left(**more):
        groups = parameter_groups(model, rules=rules, **options, **more)
        assert_covers(groups, model)
        found = multipliers(groups)
        assert found["2.weight"] == 3.0
        assert found["0.factors.0"] == 9 / 9  # Adam's
        return {n for g in groups if g["matrices"] is None for n in g["names"] if not n.endswith("bias")}

    assert left() == {"0.factors.0", "1.factors.0", "2.weight", "3.weight"}
    assert left(adam_layers="5") - left() == {"5.weight"}
    assert left(adam_layers=[re.compile("5.weight"), "4"]) - left() == {"5.weight", "4.weight"}


def test_naive_muon():
    layer = StructuredLinear(64, 256, structure="low_rank", rank=4)
    base = nn.Sequential(nn.Linear(16, 32))
    options = {"optimizer": "muon", "adam_lr": 1, "structure_aware": False}
    found = multipliers(parameter_groups(nn.Sequential(layer), base, lr=1, **options))
    assert found["0.factors.0"] == found["0.factors.1"] == pytest.approx((4 / 2) ** 0.5)


def test_tied_weights_under_muon():
    model = nn.ModuleDict({"embedding": nn.Embedding(30, 16), "head": nn.Linear(16, 30, bias=False)})
    model["head"].weight = model["embedding"].weight
    options = {"lr": 1, "optimizer": "muon", "adam_lr": 0.1, "weight_decay": 1.0}
    groups = parameter_groups(model, **options)
    assert [(g["matrices"], g["lr"], g["names"], g["weight_decay"]) for g in groups] == [
        (None, 0.1, ["embedding.weight"], 0)
    ]
    groups = parameter_groups(model, rules={"*": ParameterRule(3.0, decay=True)}, **options)
    assert [(g["matrices"], g["multiplier"], g["weight_decay"]) for g in groups] == [(None, 3.0, 1.0)]

    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ConvTranspose1d(16, 16, 1, groups=16, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"0.weight and 1.weight share a parameter .*adam_layers"):
        parameter_groups(model, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer": "muon"}, "adam_lr is required, because Adam updates 0.bias"),
        ({"optimizer": "muon", "adam_lr": -1.0}, "adam_lr must not be negative"),
        ({"optimizer": "muon", "adam_lr": 1.0, "adam_layers": "haed"}, "adam_layers: no layer .* matches 'haed'"),
        ({"optimizer": "sgd", "adam_lr": 1.0}, "need optimizer='muon', got 'sgd'"),
        ({"adam_layers": "0"}, "need optimizer='muon'"),
    ],
)
def test_bad_arguments_of_muon(options, words):
    with pytest.raises(ValueError, match=words):
        parameter_groups(nn.Sequential(nn.Linear(4, 4)), lr=1, **options)
    with pytest.raises(ValueError, match=r"adam_lr=1\.0 has no effect"):
        parameter_groups(nn.Sequential(nn.Linear(4, 4, bias=False)), lr=1, optimizer="muon", adam_lr=1.0)


# -- decay -------------------------------------------------------------------------------------------------------------


def test_decay_kinds():
    model = Net(64, rms_cap=True)
    kinds = {
        "factor": {f"{layer}.factors.{i}" for layer in ("up", "down") for i in (0, 1)},
        "gain": {f"{layer}.gains.{i}" for layer in ("up", "down") for i in (0, 1)},
        "embedding": {"embedding.weight"},
        "norm": {"norm.weight", "batch_norm.weight"},
        "vector": {"activation.weight", "temperature"},
        "weight": {"conv.weight", "depthwise.weight", "head.weight", "attention.out_proj.weight"}
        | {f"attention.{k}_proj_weight" for k in "qkv"},
    }
    for kind, names in kinds.items():
        groups = parameter_groups(model, lr=1, weight_decay=0.3, decay=[kind])
        assert {name for name, decay in decays(groups).items() if decay} == names, kind
    everything = parameter_groups(model, lr=1, weight_decay=0.3, decay=[*kinds, "bias"])
    assert set(decays(everything).values()) == {0.3}


def shrinkage(optimizer, **options):
    """By how much one step without gradient shrinks each decayed parameter, relative to itself."""
    model = nn.Sequential(StructuredLinear(64, 64, structure="low_rank", rank=4), nn.Linear(64, 10))
    base = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 10))
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    groups = parameter_groups(model, base, lr=0.01, weight_decay=0.1, optimizer=optimizer, **options)
    optimizer = kind(groups)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    after = dict(model.named_parameters())
    ratio = {n: 1 - (after[n] / before[n]).mean().item() for n in ("0.factors.0", "0.factors.1", "1.weight")}
    return ratio, multipliers(groups)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_decay_goes_with_the_learning_rate_or_not(optimizer):
    ratio, found = shrinkage(optimizer)
    for name, value in ratio.items():
        assert value == pytest.approx(0.01 * 0.1 * found[name], rel=1e-2), name
    assert len(set(found.values())) >= 3
    ratio, found = shrinkage(optimizer, independent_decay=True)
    for name, value in ratio.items():
        assert value == pytest.approx(0.01 * 0.1, rel=1e-2), name


# -- extra multipliers, rules, frozen and shared parameters ------------------------------------------------------------


def test_extra_multipliers():
    model = Net(64, rms_cap=True)
    plain = multipliers(parameter_groups(model, lr=1))
    extra = {"up": 0.1, re.compile(r"(up|head)"): 3.0, "*.gains.1": 5.0, "norm.bias": 7.0}
    found = multipliers(parameter_groups(model, lr=1, extra_multipliers=extra))
    changed = {name: found[name] / plain[name] for name in plain if found[name] != plain[name]}
    assert changed == pytest.approx(
        {"up.factors.0": 0.3, "up.factors.1": 0.3, "head.weight": 3, "up.gains.1": 5, "down.gains.1": 5, "norm.bias": 7}
    )


class Mixing(nn.Module):
    """Weights that go by no known name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(9, width))
        self.fixed = nn.Parameter(torch.zeros(5, 7))
        self.layer = nn.Linear(width, width)


def test_unknown_parameters_need_a_rule_where_they_grow():
    model, base = Mixing(8), Mixing(4)
    with pytest.raises(ValueError, match=r"no rule covers the parameters mixing \(9, 8\) of Mixing; pass rules="):
        parameter_groups(model, base, lr=1)
    groups = parameter_groups(
        model, base, lr=1, weight_decay=0.1, extra_multipliers={"mixing": 2.0},
        rules={"mixing": ParameterRule(3.0, decay=True), "*.weight": ParameterRule(0.5)},
    )  # fmt: skip
    assert multipliers(groups) == {"mixing": 6.0, "fixed": 1.0, "layer.weight": 0.5, "layer.bias": 1.0}
    assert {name for name, decay in decays(groups).items() if decay} == {"mixing", "fixed"}
    assert_covers(groups, model)
    found = multipliers(parameter_groups(model, lr=1))  # each is its own base
    assert set(found.values()) == {1.0}


def test_frozen_parameters_are_left_out():
    model = Net(64)
    model.up.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    groups = parameter_groups(model, Net(16).to("meta"), lr=1)
    assert_covers(groups, model)
    assert not any(name.startswith("up") for name in multipliers(groups))


def test_shared_module_and_tied_parameter():
    layer = StructuredLinear(16, 16, structure="low_rank")
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(16, 16))
    groups = parameter_groups(model, lr=1)
    assert_covers(groups, model)

    model = nn.ModuleDict({"embedding": nn.Embedding(30, 16), "head": nn.Linear(16, 30, bias=False)})
    base = nn.ModuleDict({"embedding": nn.Embedding(30, 8), "head": nn.Linear(8, 30, bias=False)})
    model["head"].weight = model["embedding"].weight
    groups = parameter_groups(model, base, lr=1, weight_decay=0.1)
    assert [(g["names"], g["multiplier"], g["weight_decay"]) for g in groups] == [(["embedding.weight"], 1, 0)]
    assert parameter_groups(model, base, lr=1, weight_decay=0.1, decay=["embedding"])[0]["weight_decay"] == 0.1
    for name in ("embedding.weight", "head.*"):
        groups = parameter_groups(model, base, lr=1, rules={name: ParameterRule(1.0)})
        assert_covers(groups, model)
        assert list(multipliers(groups).values()) == [1.0]

    model = nn.ModuleDict({"up": nn.Linear(16, 8, bias=False), "mix": nn.Conv1d(16, 8, 1, bias=False)})
    base = nn.ModuleDict({"up": nn.Linear(16, 8, bias=False), "mix": nn.Conv1d(4, 8, 1, bias=False)})
    model["mix"].weight = model["up"].weight
    with pytest.raises(ValueError, match=r"several rules \(up.weight: multiplier 1, .*; mix.weight: multiplier 0.25"):
        parameter_groups(model, base, lr=1)

    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    assert_covers(parameter_groups(model, lr=1, extra_multipliers={"*.weight": 2.0}), model)
    assert multipliers(parameter_groups(model, lr=1, extra_multipliers={"*.weight": 2.0}))["0.weight"] == 2


def test_parameter_that_hides_in_a_structured_layer():
    model = nn.Sequential(StructuredLinear(16, 16))
    model[0].adapter = nn.Linear(16, 16)
    with pytest.raises(ValueError, match=r"no rule covers the parameters 0.adapter.weight, 0.adapter.bias"):
        parameter_groups(model, lr=1)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_models_that_do_not_match():
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="base model lacks modules with parameters that the model has: 1, 2"):
        parameter_groups(model, nn.Sequential(nn.Linear(4, 4)), lr=1)
    longer = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="base model has modules with parameters that the model lacks: 3"):
        parameter_groups(model, longer, lr=1)
    other = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(4, 4, 1))
    with pytest.raises(ValueError, match="module '2' is a Linear in the model and a Conv1d in the base model"):
        parameter_groups(model, other, lr=1)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"optimizer": "adagrad"}, ValueError, "unknown optimizer 'adagrad'; one of adam"),
        ({"optimizer": torch.optim.AdamW}, TypeError, "the name of a rule, one of adam, .*, got <class"),
        ({"lr": None}, TypeError, "lr must be a number, got None"),
        ({"weight_decay": "much"}, TypeError, "weight_decay must be a number, got 'much'$"),
        ({"lr": float("nan")}, ValueError, "must not be negative, got nan"),
        ({"weight_decay": -0.1}, ValueError, "got 1 and -0.1"),
        ({"extra_multipliers": {"haed": 2.0}}, ValueError, "nothing matches 'haed'"),
        ({"extra_multipliers": {"norm": 2.0}}, ValueError, "nothing matches 'norm'"),  # a layer without a matrix
        ({"extra_multipliers": {"head": float("inf")}}, ValueError, "finite and at least 0, got inf"),
        ({"rules": {re.compile("head"): ParameterRule(2.0)}}, ValueError, "nothing matches 'head'"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        parameter_groups(Net(16), **{"lr": 1, **options})


def test_a_multiplier_of_zero_keeps_a_layer():
    """With decay that does not go with the rate, and under a scheduler, too."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    groups = parameter_groups(
        model, lr=0.1, optimizer="adamw", weight_decay=0.5, independent_decay=True, extra_multipliers={"0": 0}
    )
    assert {group["multiplier"]: group["lr"] for group in groups if "0.weight" in group["names"]} == {0: 0.0}
    optimizer = torch.optim.AdamW(groups)
    scheduler = with_multipliers(torch.optim.lr_scheduler.OneCycleLR, optimizer, max_lr=0.1, total_steps=5)
    before = [layer.weight.detach().clone() for layer in model]
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    assert [torch.equal(old, layer.weight) for old, layer in zip(before, model, strict=True)] == [True, False]


def test_bad_rules():
    model = nn.Sequential(nn.Linear(4, 4))
    for given, words in (
        (model.parameters(), "got a generator: pass the model, not its parameters"),
        (list(model.parameters()), "got a list: pass the model"),
        (nn.Linear, r"got a type: it is a class; pass an instance, Linear\(\.\.\.\)"),
        ({}, "takes a torch.nn.Module, got a dict$"),
    ):
        with pytest.raises(TypeError, match=words):
            parameter_groups(given, lr=1)
        with pytest.raises(TypeError, match=r"as base_model, takes a torch\.nn\.Module"):
            parameter_groups(model, given, lr=1)
    with pytest.raises(ValueError, match="finite and at least 0, got -1"):
        ParameterRule(-1)
    with pytest.raises(TypeError, match=r"decay must be True or False, got 0\.1"):
        ParameterRule(1.0, 0.1)


# -- use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_optimisers_take_the_groups(kind):
    torch.manual_seed(0)
    model = nn.Sequential(StructuredLinear(16, 16, structure="low_rank"), nn.Linear(16, 3))
    name = {"SGD": "sgd", "RMSprop": "adam"}.get(kind.__name__, kind.__name__.lower())
    groups = parameter_groups(model, lr=0.5, weight_decay=0.1, optimizer=name)
    rates = [g["lr"] for g in groups]
    optimizer = kind(groups, lr=123.0)
    assert [g["lr"] for g in optimizer.param_groups] == rates
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(4, 16)).square().sum().backward()
    optimizer.step()
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [rate / 2 for rate in rates]
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    fresh = kind(parameter_groups(model, lr=0.5, weight_decay=0.1, optimizer=name))
    fresh.load_state_dict(optimizer.state_dict())
    assert format_groups(fresh.param_groups) == format_groups(optimizer.param_groups)


def test_table():
    model = nn.Sequential(*(StructuredLinear(16, 16, structure="low_rank", rank=2) for _ in range(3)))
    groups = parameter_groups(model, lr=0.5, weight_decay=0.1, extra_multipliers={"2": 4.0})
    assert str(groups) == format_groups(groups)
    assert str(groups).splitlines() == [
        "multiplier    lr  decay  tensors  parameters  names",
        "       0.5  0.25    0.1        2          64  *.factors.*",
        "         4     2    0.1        2          64  *.factors.*",
        "         1   0.5      0        3          48  *.bias",
        "         2     1    0.1        1          32  2.factors.0",
        "        16     8    0.1        1          32  2.factors.1",
    ]
    sizes = [int(line.split()[4]) for line in str(groups).splitlines()[1:]]
    assert sum(sizes) == sum(p.numel() for p in model.parameters())


def test_groups_of_a_replaced_model():
    def mlp(width):
        return nn.Sequential(nn.Linear(12, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))

    model = mlp(64)
    replace_linear(model, "block_tensor_train", layers="2", rank=2)
    groups = parameter_groups(model, mlp(16).to("meta"), lr=1)
    assert_covers(groups, model)
    assert multipliers(groups)["2.factors.0"] == 16 / (8 * 2)
    assert multipliers(groups)["2.factors.1"] == 16 / (2 * 8 * 2)
    assert multipliers(groups)["4.weight"] == 16 / 64


def test_meta_model():
    model = Net(64).to("meta")
    assert multipliers(parameter_groups(model, Net(16).to("meta"), lr=1)) == multipliers(
        parameter_groups(Net(64), Net(16), lr=1)
    )
